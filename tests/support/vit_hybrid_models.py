"""Random hybrid ViTs in transformers' checkpoint layout, by examples/hybrid_vit.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from paths import REPO

BACKBONE: dict[str, Any] = {
    "model_type": "bit",
    "embedding_size": 24,
    "hidden_sizes": [128, 160],
    "depths": [1, 1],
    "num_groups": 8,
    "layer_type": "bottleneck",
    "global_padding": "same",
    "embedding_dynamic_padding": True,
    "out_features": ["stage2"],
}
SIZES: dict[str, Any] = {  # no kernel could like these: a prime width, an odd image, three layers
    "image_size": 45,
    "patch_size": 1,
    "hidden_size": 74,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 131,
    "num_channels": 3,
    "backbone_config": BACKBONE,
}
PREPROCESSOR = {"image_processor_type": "ViTHybridImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def hybrid_vit() -> Any:
    """Return the class ``HybridViT`` of examples/, which is no package."""
    spec = importlib.util.spec_from_file_location("hybrid_vit", REPO / "examples" / "hybrid_vit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HybridViT


def save_hybrid(folder: Path, architecture: str, *, seed: int = 0, **settings: Any) -> Path:
    """Write a random checkpoint; ``settings`` are of its config.json.

    A ``backbone_config`` among them changes single settings of BACKBONE.
    """
    config = {**SIZES, **settings, "backbone_config": {**BACKBONE, **settings.get("backbone_config", {})}}
    torch.manual_seed(seed)
    theirs = hybrid_vit()(architecture, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    theirs.save_pretrained(folder)
    size = config["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    processor = {
        **PREPROCESSOR,
        "size": {"shortest_edge": min(height, width)},
        "crop_size": {"height": height, "width": width},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return folder


def read_hybrid(folder: Path) -> Any:
    """Return transformers' halves with the weights of a checkpoint, in eval mode."""
    return hybrid_vit().from_pretrained(folder)
