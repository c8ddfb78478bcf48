"""Read checkpoint folders, and change what transformers wrote into them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from transom.export.checkpoint import LoadedCheckpoint, load_checkpoint


def read(folder: Path, **options: Any) -> LoadedCheckpoint:
    """Load a checkpoint as an export without options does."""
    defaults: dict[str, Any] = {"task": None, "max_sizes": {}, "image_size": None, "ignore_unused": False}
    return load_checkpoint(str(folder), **{**defaults, **options})


def edit_config(folder: Path, **changes: Any) -> Path:
    """Set fields of config.json; return the folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Let ``change`` edit the stored tensors by their names; return the folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})  # which transformers asks for
    return folder
