"""Trains the reference hybrid ViT on scikit-learn's digits and writes its checkpoint folder.

    python examples/train_vit_hybrid_digits.py --out DIR        config, weights and preprocessing
    python examples/train_vit_hybrid_digits.py --dev            how its settings were chosen

The scans, their split, the augmentation and the training are those of train_vit_digits.py. What differs is the model,
in whose stem an image becomes a sixteenth as high and wide: it sees the scans at 32x32 pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrid_vit import HybridViT
from torch import Tensor, nn
from train_vit_digits import run

SIDE = 32  # pixels
CONFIG = {
    "image_size": SIDE,
    "patch_size": 1,
    "num_channels": 3,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "backbone_config": {
        "model_type": "bit",
        "layer_type": "bottleneck",
        "embedding_size": 32,
        "hidden_sizes": [128, 256],
        "depths": [1, 1],
        "num_groups": 8,
        "global_padding": "same",
        "embedding_dynamic_padding": True,
        "out_features": ["stage2"],
    },
    "id2label": {str(i): str(i) for i in range(10)},
    "label2id": {str(i): i for i in range(10)},
}
PREPROCESSOR = {
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTHybridImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": SIDE},
}


class EnlargedDigits(HybridViT):
    """The hybrid behind the resizing of its image processor."""

    def forward(self, pixel_values: Tensor) -> Any:
        """Enlarge ``pixel_values`` (B, 3, 8, 8) as Pillow does, whose pixels end at black and white."""
        large = nn.functional.interpolate(pixel_values, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        return super().forward(large.clamp(-1, 1))

    def save_pretrained(self, folder: Path) -> None:
        """Write the checkpoint with its weights in FP16."""
        self.half()
        super().save_pretrained(folder)


def main() -> None:
    run(__doc__, lambda: EnlargedDigits("ViTHybridForImageClassification", CONFIG), PREPROCESSOR)


if __name__ == "__main__":
    main()
