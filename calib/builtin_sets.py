"""Read the calibration sets that ship: training inputs of the reference models (calib/datasets/README.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from transom.calib.digit_compositions import read_compositions
from transom.calib.digit_questions import read_questions
from transom.calib.samples import Sample

DATA = files("transom.calib").joinpath("datasets")


@dataclass(frozen=True)
class BuiltinSet:
    """Samples in memory: the largest set is 410 KB."""

    samples: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        return self.samples[index]


def builtin_set(name: str) -> BuiltinSet:
    """Read the set of that name, one of NAMES."""
    return BuiltinSet(SETS[name]())


def austen() -> list[Sample]:
    """Read passages of Jane Austen with their line breaks, which the reference GPT and BERT trained on."""
    return texts("austen", [json.loads(line)["text"] for line in lines("austen.jsonl")])


def wordnet() -> list[Sample]:
    """Read definitions and words of WordNet, none of them scored."""
    return texts("wordnet", lines("wordnet.txt"))


def dates() -> list[Sample]:
    """Read dates of days that the reference Transformer trained on."""
    return texts("dates", lines("dates.txt"))


def date_lists() -> list[Sample]:
    """Read lists of one to six dates, of days that the reference seq2seq models trained on."""
    return texts("date-lists", lines("date_lists.txt"))


def digits() -> list[Sample]:
    """Read scans that the reference ViT and CLIP trained on."""
    return [Sample(f"digits[{index}]", image=scan) for index, scan in enumerate(scans())]


def digit_captions() -> list[Sample]:
    """Read the same scans, each with a caption of the kind that the reference CLIP trained on."""
    pairs = zip(scans(), lines("digit_captions.txt"), strict=True)
    return [Sample(f"digit-captions[{index}]", text=text, image=scan) for index, (scan, text) in enumerate(pairs)]


def digit_compositions() -> list[Sample]:
    """Read images of one or two of these scans, which the reference Show, Attend and Tell trained on."""
    text = DATA.joinpath("digit_compositions.tsv").read_text(encoding="ascii")
    found, available = read_compositions(text), scans()
    return [Sample(f"digit-compositions[{index}]", image=each.draw(available)) for index, each in enumerate(found)]


def digit_questions() -> list[Sample]:
    """Read questions about images of one to four of these scans, and examples, as the reference Flamingo trained on."""
    found, available = read_questions(DATA.joinpath("digit_questions.tsv").read_text(encoding="ascii")), scans()
    images = [each.draw(available) for each in found]
    samples = []
    for index, each in enumerate(found):
        shown = [(images[other], (found[other].question, found[other].answer)) for other in each.examples]
        parts = [part for example in shown for part in example]
        samples.append(
            Sample(f"digit-questions[{index}]", parts=(*parts, images[index], each.question), answer=each.answer)
        )
    return samples


SETS: dict[str, Callable[[], list[Sample]]] = {
    "austen": austen,
    "digits": digits,
    "digit-captions": digit_captions,
    "digit-compositions": digit_compositions,
    "digit-questions": digit_questions,
    "wordnet": wordnet,
    "dates": dates,
    "date-lists": date_lists,
}
NAMES = tuple(SETS)


def texts(name: str, found: Sequence[str]) -> list[Sample]:
    return [Sample(f"{name}[{index}]", text=text) for index, text in enumerate(found)]


def lines(file: str) -> list[str]:
    return DATA.joinpath(file).read_text(encoding="utf-8").splitlines()


def scans() -> NDArray[np.uint8]:
    """Read the scans as uint8 (512, 8, 8) of 0..255."""
    from safetensors.numpy import load

    images: NDArray[np.uint8] = load(DATA.joinpath("digits.safetensors").read_bytes())["images"]
    return images
