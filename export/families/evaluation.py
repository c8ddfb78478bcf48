"""Define the cases on which bundles are compared with FP32: how they run, what is kept, and the limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.calib.samples import IMAGE, Part, Sample
from transom.runtime.errors import CalibrationError, TransomError, one_line
from transom.runtime.session import LoadedBundle

MAX_SAMPLES = 1000
TOKENS_PER_SAMPLE = 4  # of tasks that answer at every token: so many are asked for, wherever they stand
BATCH_BYTES = 64 << 20  # of a main output, computed at once

CHOICE = "choice"  # top-1 of a task with logits is the largest
NEIGHBOUR = "neighbour"  # of embeddings the nearest other sample
NOTHING = "nothing"  # of a regression

Floats = NDArray[np.float32]
NO_CHOICE = np.empty((0, 1), np.int64)


@dataclass(frozen=True)
class Outputs:
    """The outputs for one held-out sample; of a long text, for one run of its tokens.

    values    float32, any shape: the main output at the positions that count
    chosen    int64 (cases, k): two bundles agree on a case where all its k numbers are equal
    vector    float32 (E,), of embeddings alone, by which the nearest neighbour is found
    nats      of the tokens that follow, their negative log-probabilities summed, and how many there are
    right     of cases whose truth is known, how many were answered right, and how many there are
    """

    sample: str
    values: Floats
    chosen: NDArray[np.int64]
    vector: Floats | None = None
    nats: tuple[float, int] | None = None
    right: tuple[int, int] | None = None


@dataclass(frozen=True)
class EvaluationCases:
    """The cases on which every bundle of a family and task is run.

    run      yields the outputs of a bundle, in one order and one division into batches, one by one
    top1     CHOICE, NEIGHBOUR or NOTHING
    counted  the word for what is counted where two bundles agree
    output   what the relative error is taken over
    """

    run: Callable[[LoadedBundle], Iterator[Outputs]]
    top1: str
    counted: str
    output: str


@dataclass(frozen=True)
class GateLimits:
    """The most that a quantised bundle of a family may lose against FP32.

    points  of a score, or of agreement with FP32 where there is none, as a fraction
    growth  of perplexity, by how activations are quantised; where it is given, it is judged and nothing else
    """

    points: float | None = None
    growth: Mapping[str, float] | None = None


def drawn(samples: Sequence[Sample], most: int = MAX_SAMPLES) -> list[Sample]:
    """Draw at most ``most`` samples with an image and as many without, drawn by a fixed seed; each text once.

    A text that is there twice would be its own nearest neighbour, and count twice. Raises CalibrationError for none.
    """
    found: list[Sample] = []
    texts: set[tuple[str | None, str | None, tuple[Part, ...] | None]] = set()
    left = {True: most, False: most}
    for index in np.random.RandomState(0).permutation(len(samples)):  # a stream that no version of numpy changes
        if not any(left.values()):
            break
        sample = samples[int(index)]
        pictured = IMAGE in sample.kinds
        text = sample.text, sample.text_pair, None if pictured else sample.parts  # arrays of images have no hash
        repeated = not pictured and sample.feeds is None and text in texts
        if left[pictured] and not repeated:
            texts.add(text)
            left[pictured] -= 1
            found.append(sample)
    if not found:
        raise CalibrationError("there are no held-out samples; expected at least one. Give more calibration data.")
    return found


@contextmanager
def naming(samples: Sequence[Sample]) -> Iterator[None]:
    """Turn an error inside into a CalibrationError that says which samples were read."""
    try:
        yield
    except TransomError as error:
        more = f" or one of the {len(samples) - 1} read with it" if len(samples) > 1 else ""
        raise CalibrationError(
            f"held-out sample {samples[0].name}{more} does not fit the model: {one_line(error)} Leave it out."
        ) from None


def text_of(sample: Sample) -> str:
    if sample.text is None:
        raise CalibrationError(f"held-out sample {sample.name} has no text, which this model reads. Leave it out.")
    return sample.text


def top1_of_head(options: Mapping[str, Any]) -> str:
    return NOTHING if options.get("problem_type") == "regression" else CHOICE


def choice_of_head(logits: Floats, options: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return the label of logits (L,); of a single one whether it is above even odds; of a regression nothing."""
    if top1_of_head(options) == NOTHING:
        return NO_CHOICE
    return np.array([[int(logits.argmax()) if len(logits) > 1 else int(logits[0] > 0)]], np.int64)
