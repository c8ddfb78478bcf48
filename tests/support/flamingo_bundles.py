"""Bundles of a small random Flamingo with its gates wide open, images, and questions about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from conftest import Once, export_to
from flamingo_models import VOCABULARY, write_flamingo
from transom.export.quantization.options import QuantizeOptions

SEED = 8  # of weights that four bits change the least
ROWS = 3
QUESTIONS = ("how many sevens?", "what is left of the three?", "how many twos?")
SMALL: dict[str, Any] = {  # traced in half the time
    "text_config": {"n_layer": 2},
    "vision_config": {"num_hidden_layers": 1},
    "cross_attention_every_n_layers": 1,
}


def picture(row: int) -> Image.Image:
    """Return a smooth image of random colours: what is calibrated on must not look like noise."""
    small = np.random.default_rng(row).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((12 + row % 5, 20), Image.Resampling.BICUBIC)


def write_questions(folder: Path, *, answers: bool = False, count: int = 12) -> Path:
    """Write images with a question each, every second after an example about another image."""
    folder.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = []
    for row in range(count):
        picture(row).save(folder / f"{row}.png")
        asked = QUESTIONS[row % 3]
        line: dict[str, Any] = {"image": f"{row}.png", "text": asked}
        if row % 2:
            line = {"parts": [{"image": f"{row - 1}.png"}, [QUESTIONS[0], "two"], {"image": f"{row}.png"}, asked]}
        lines.append({**line, "answer": "two"} if answers else line)
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "questions.jsonl"


def bundle_of(once: Once, precision: str = "fp32") -> Path:
    """Export once per run, the gates wide open, of at most ROWS rows a call."""

    def make(folder: Path) -> None:
        options: dict[str, Any] = {}
        if precision.startswith("int"):
            data = write_questions(folder / "data")
            options["quantize"] = QuantizeOptions(calibration_data=(str(data),), gate=False)
        checkpoint = write_flamingo(folder / "checkpoint", gates=1.0, seed=SEED, **SMALL)
        export_to(folder, checkpoint, max_sizes={"B": ROWS}, precision=precision, **options)

    return once(f"flamingo-{precision}", make) / "bundle"


def pixels(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, 3, 20, 12), np.float32)


def words(*given: str) -> list[int]:
    return [VOCABULARY[word] for word in given]
