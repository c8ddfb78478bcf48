"""Held-out samples as questions to a bundle: what is asked, what an answer holds, and which samples are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transom.calib.samples import Sample
from transom.export.datasets import digit_prompts, heldout_dates, heldout_text, masked_text, wordnet_pairs
from transom.export.scores import DIGIT_NAMES, blocks, heldout_images
from transom.runtime.errors import CalibrationError, TransomError, one_line
from transom.runtime.session import LoadedBundle

MAX_SAMPLES = 1000
TOKENS_PER_SAMPLE = 4  # of tasks that answer at every token: so many are asked for, wherever they stand
BATCH_BYTES = 64 << 20  # of a main output, computed at once

CHOICE = "choice"  # top-1 of a task with logits is the largest
NEIGHBOUR = "neighbour"  # of embeddings the nearest other sample
NOTHING = "nothing"  # of a regression

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Answers:
    """What one held-out sample got; of a long text, one run of its tokens.

    values    float32, any shape: the main output at the positions that count
    chosen    int64 (cases, k): two bundles agree on a case where all its k numbers are equal
    vector    float32 (E,), of embeddings alone: what the nearest neighbour is told by
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
class Questions:
    """What is asked of every bundle of a family and task.

    ask      gives the answers, in one order and one division into batches; they come and go one by one
    top1     CHOICE, NEIGHBOUR or NOTHING
    cases    the word for what is counted where two bundles agree
    output   what the relative error is taken over
    """

    ask: Callable[[LoadedBundle], Iterator[Answers]]
    top1: str
    cases: str
    output: str


def reference_samples(source: str) -> list[Sample]:
    """The held-out inputs that a reference model's score runs on.

    Of MiniLM's pairs the definitions; with CLIP's images the ten names in the first of the unseen prompts.
    """
    if source in ("vit", "clip"):
        images = [Sample(f"scan {index}", image=image) for index, image in enumerate(heldout_images()[0])]
        prompt = digit_prompts()[0]
        labels = [prompt.replace("{}", name) for name in DIGIT_NAMES] if source == "clip" else []
        return images + [Sample(repr(label), text=label) for label in labels]
    made: dict[str, Callable[[], list[str]]] = {
        "minilm": lambda: wordnet_pairs()[0],
        "gpt": lambda: ["\n" + block for block in blocks(heldout_text())],
        "bert": lambda: [text for text, _ in masked_text()],
        "transformer": lambda: heldout_dates()[0],
    }
    return [Sample(f"held-out text {index}", text=text) for index, text in enumerate(made[source]())]


def drawn(samples: Sequence[Sample], most: int = MAX_SAMPLES) -> list[Sample]:
    """At most ``most`` samples with an image and as many without, drawn by a fixed seed; each text once.

    A text that is there twice would be its own nearest neighbour, and count twice. Raises CalibrationError for none.
    """
    found: list[Sample] = []
    texts: set[tuple[str | None, str | None]] = set()
    left = {True: most, False: most}
    for index in np.random.RandomState(0).permutation(len(samples)):  # a stream that no version of numpy changes
        if not any(left.values()):
            break
        sample = samples[int(index)]
        pictured, text = sample.image is not None, (sample.text, sample.text_pair)
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
    """An error of ours inside becomes a CalibrationError that says which samples were read."""
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
