"""Task scores of the reference models: what is measured, on which data, and the same for PyTorch and the bundle.

A score takes a function from inputs to answers. Whoever computes them, everything around it is the same code on
the same data, so that two scores differ by the artefact alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from transom.export.inputs import heldout_digits, wordnet_pairs
from transom.runtime.errors import ExportError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.bert import Bert
from transom.runtime.tasks.vit import ViT

DIGITS = 10
Z = 1.959963984540054  # standard normal quantile of 0.975: a 95 % interval leaves 2.5 % on either side


@dataclass(frozen=True)
class Score:
    """``correct`` of ``n`` cases of the data set ``data`` answered right."""

    name: str
    data: str
    n: int
    correct: int

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the true fraction: what other cases of this kind would give. Wilson (1927)."""
        n, p = self.n, self.value
        middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
        return middle - half, middle + half

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "data": self.data, "n": self.n, **self.figures()}

    def figures(self) -> dict[str, Any]:
        """What differs between two sides that are scored alike."""
        return {"correct": self.correct, "value": self.value, "interval": list(self.interval)}


def digits_score(predict: Callable[[list[NDArray[np.uint8]]], NDArray[Any]]) -> Score:
    """Fraction of the held-out scans whose digit has the largest number.

    ``predict`` takes N images, uint8 (8, 8, 3) of 0..255, and gives (N, 10): logits or probabilities.
    Raises ExportError for another shape and for values that are not finite.
    """
    scans, labels = heldout_digits()
    images = [np.repeat(scan[:, :, None], 3, axis=2) for scan in scans]
    answers = finite(predict(images), (len(images), DIGITS), "predict(images)")
    correct = int((answers.argmax(1) == labels).sum())
    return Score("top-1 accuracy", "held-out scans of scikit-learn's digits", len(labels), correct)


def retrieval_score(embed: Callable[[list[str]], NDArray[Any]]) -> Score:
    """Fraction of the definitions whose own word is, of all words, the nearest by cosine similarity.

    ``embed`` takes N texts and gives (N, E); it is called twice, for 1,000 definitions and their 1,000 words.
    Raises ExportError for another shape, values that are not finite, and vectors of length zero.
    """
    definitions, words = wordnet_pairs()
    queries = unit_rows(embed(definitions), len(definitions))
    targets = unit_rows(embed(words), len(words))
    correct = int(((queries @ targets.T).argmax(1) == np.arange(len(definitions))).sum())
    return Score("top-1 retrieval", "definitions and words of WordNet 3.0", len(definitions), correct)


def unit_rows(vectors: NDArray[Any], n: int) -> NDArray[np.float64]:
    """Rows of length one, in FP64."""
    rows = finite(vectors, (n, None), "embed(texts)")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise ExportError(
            f"embed(texts)[{int(lengths.argmin())}] is a vector of zeros; expected a direction. Check the pooling."
        )
    return np.asarray(rows / lengths, np.float64)


def finite(answers: NDArray[Any], shape: tuple[int, int | None], call: str) -> NDArray[np.float64]:
    """The answers in FP64. NaN is refused: argmax would take its place for an answer."""
    array = np.asarray(answers, np.float64)
    if array.ndim != 2 or any(size not in (None, found) for size, found in zip(shape, array.shape, strict=True)):
        raise ExportError(
            f"{call} has shape {array.shape}; expected ({shape[0]}, {shape[1] or 'E'}): one row per input. "
            "Check which checkpoint is being scored."
        )
    if not np.isfinite(array).all():
        row = int(np.isfinite(array).all(1).argmin())
        raise ExportError(f"{call}[{row}] is not finite; a score needs numbers. Try a wider precision.")
    return array


@dataclass(frozen=True)
class TaskScore:
    """How a loaded bundle is scored, if it was exported for ``task``."""

    task: str
    of: Callable[[LoadedBundle], Score]


def digits_score_of(bundle: LoadedBundle) -> Score:
    def predict(images: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
        ranked = cast(ViT, bundle).classify(images, top_k=DIGITS)
        return np.array([[dict(row)[str(digit)] for digit in range(DIGITS)] for row in ranked])

    return digits_score(predict)


def retrieval_score_of(bundle: LoadedBundle) -> Score:
    return retrieval_score(cast(Bert, bundle).embed)


SCORES = {  # by the reference model's name
    "vit": TaskScore("image-classification", digits_score_of),
    "minilm": TaskScore("feature-extraction", retrieval_score_of),
}


def score_both(source: str, theirs: LoadedBundle, ours: LoadedBundle) -> dict[str, Any] | None:
    """The task score of both sides as bundle.json records it.

    ``source`` is SOURCE as the user gave it, ``theirs`` PyTorch behind the runtime's own code, ``ours`` the
    artefact. None where ``source`` names no reference model, or is exported for another task than the scored
    one (the features of ``vit``, say).
    """
    scored = SCORES.get(source)
    if scored is None or ours.manifest.task != scored.task:
        return None
    pytorch, bundle = scored.of(theirs), scored.of(ours)
    shared = {"name": bundle.name, "data": bundle.data, "n": bundle.n}
    return {**shared, "pytorch": pytorch.figures(), "bundle": bundle.figures()}
