"""Trains the reference Swin or Swin v2 on scikit-learn's digits and writes its checkpoint folder.

    python examples/train_swin_digits.py swin --out DIR          config, weights and preprocessing
    python examples/train_swin_digits.py swinv2 --dev            how its settings were chosen

The scans, their split, the augmentation and the training are those of train_vit_digits.py. What differs is the model:
it sees the scans at 32x32 pixels, 16 by 16 patches in windows of 4 by 4, then 8 by 8.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from train_vit_digits import PREPROCESSOR, run
from transformers import (
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
)

SIDE = 32  # pixels
EPOCHS = 60
SIZES: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 2,
    "num_channels": 3,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
    "id2label": {i: str(i) for i in range(10)},
    "label2id": {str(i): i for i in range(10)},
}


def enlarge(model: nn.Module, arguments: Any, keywords: dict[str, Any]) -> Any:
    """Enlarge ``pixel_values`` (B, 3, 8, 8) before a forward pass, bilinear, as the image processor does."""
    pixels = keywords["pixel_values"]
    large = nn.functional.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return arguments, {**keywords, "pixel_values": large}


def make(name: str) -> PreTrainedModel:
    """A Swin or Swin v2 with first weights that takes scans of 8x8 pixels."""
    model: PreTrainedModel
    if name == "swin":
        model = SwinForImageClassification(SwinConfig(**SIZES))
    else:
        model = Swinv2ForImageClassification(Swinv2Config(**SIZES, pretrained_window_sizes=[0, 0]))
    model.register_forward_pre_hook(enlarge, with_kwargs=True)
    return model


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in ("swin", "swinv2"):
        sys.exit("give swin or swinv2 first, then --out DIR or --dev")
    preprocessor = {**PREPROCESSOR, "size": {"height": SIDE, "width": SIDE}}
    out = run(__doc__, lambda: make(name), preprocessor, EPOCHS)
    if out is not None:
        make(name).from_pretrained(out).half().save_pretrained(out)


if __name__ == "__main__":
    main()
