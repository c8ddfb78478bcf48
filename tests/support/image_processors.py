"""Write the settings of image processors into checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path


def write_image_processor(folder: Path, height: int, width: int) -> None:
    """Write the settings of a ViTImageProcessor that resizes to ``height`` x ``width`` pixels."""
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": height, "width": width},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
