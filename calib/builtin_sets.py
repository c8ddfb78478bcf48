"""The calibration sets that ship: training inputs of the reference models, as calib/sets/README.md says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from transom.calib.samples import Sample

DATA = files("transom.calib").joinpath("sets")


@dataclass(frozen=True)
class Shipped:
    """Samples that are in memory: the largest set is 220 KB."""

    samples: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        return self.samples[index]


def named_samples(name: str) -> Shipped:
    """The set of that name, one of NAMES."""
    return Shipped(SETS[name]())


def austen() -> list[Sample]:
    """Passages of Jane Austen with their line breaks: what the reference GPT and BERT trained on."""
    return texts("austen", [json.loads(line)["text"] for line in lines("austen.jsonl")])


def wordnet() -> list[Sample]:
    """Definitions and words of WordNet, none of them scored."""
    return texts("wordnet", lines("wordnet.txt"))


def dates() -> list[Sample]:
    """Dates of days that the reference Transformer trained on."""
    return texts("dates", lines("dates.txt"))


def digits() -> list[Sample]:
    """Scans that the reference ViT and CLIP trained on."""
    return [Sample(f"digits[{index}]", image=scan) for index, scan in enumerate(scans())]


def digit_captions() -> list[Sample]:
    """The same scans, each beside a caption of the kind that the reference CLIP trained on."""
    pairs = zip(scans(), lines("digit_captions.txt"), strict=True)
    return [Sample(f"digit-captions[{index}]", text=text, image=scan) for index, (scan, text) in enumerate(pairs)]


SETS: dict[str, Callable[[], list[Sample]]] = {
    "austen": austen,
    "digits": digits,
    "digit-captions": digit_captions,
    "wordnet": wordnet,
    "dates": dates,
}
NAMES = tuple(SETS)


def texts(name: str, found: Sequence[str]) -> list[Sample]:
    return [Sample(f"{name}[{index}]", text=text) for index, text in enumerate(found)]


def lines(file: str) -> list[str]:
    return DATA.joinpath(file).read_text(encoding="utf-8").splitlines()


def scans() -> NDArray[np.uint8]:
    """uint8 (512, 8, 8) of 0..255."""
    from safetensors.numpy import load

    images: NDArray[np.uint8] = load(DATA.joinpath("digits.safetensors").read_bytes())["images"]
    return images
