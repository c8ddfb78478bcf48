"""Calibrate, evaluate and draw Flamingo: answers to questions about images, and captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from transom.calib.run_samples import IDS, MASK, PIXELS, SampleRunner, require_no_pair
from transom.calib.samples import IMAGE, TEXT, Sample
from transom.export.families.base import ExportFamily, Figure
from transom.export.families.evaluation import BATCH_BYTES, CHOICE, EvaluationCases, GateLimits, Outputs, naming
from transom.export.families.greedy_tokens import NEW_TOKENS, along
from transom.export.families.token_rows import row_of
from transom.runtime.backends.base import Array
from transom.runtime.bundle import Bundle
from transom.runtime.errors import InputError
from transom.runtime.greedy_check import PAD
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.flamingo import Flamingo
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt
from transom.runtime.tasks.prompts import Row


def run(bundle: Flamingo, sample: Sample) -> None:
    """Answer a sample's question, or caption its image, greedily."""
    answers_to(bundle, [prompt_of(bundle, sample)])


def run_raw(bundle: Flamingo, feeds: Mapping[str, Array]) -> None:
    """Continue raw token ids with the pixel values of their images greedily; other raw inputs run as they are."""
    if feeds.keys() <= {IDS, MASK, PIXELS} and feeds.keys() & {IDS, PIXELS}:
        answers_to(bundle, [raw_prompt(bundle, feeds)])
    else:
        bundle.run(feeds)


def prompt_of(bundle: Flamingo, sample: Sample) -> InterleavedPrompt:
    """Return what ``answer`` makes of a sample's parts, or of its image and question; an image alone is captioned."""
    if sample.feeds is not None:
        return raw_prompt(bundle, sample.feeds)
    require_no_pair(sample)
    if sample.parts is not None:
        return bundle.prompt_of(list(sample.parts))
    parts = [part for part in (sample.image, sample.text) if part is not None]
    return bundle.prompt_of(parts) if sample.text is not None else bundle.caption_prompt(parts[0])


def raw_prompt(bundle: Flamingo, feeds: Mapping[str, Array]) -> InterleavedPrompt:
    """Return token ids (1, S) with their images, ``pixel_values`` (1, C, H, W) or (1, images, C, H, W).

    Pixel values alone are captioned.
    """
    pixels = np.asarray(feeds.get(PIXELS, np.empty((1, 0))), np.float32)
    images = [pixels[0]] if pixels.ndim == 4 else list(pixels[0])
    if IDS not in feeds:
        return bundle.caption_prompt(images[0])
    row = row_of({name: array for name, array in feeds.items() if name != PIXELS})
    if row is None:
        raise InputError(f"it has the inputs {', '.join(feeds)}; expected {IDS}, with {PIXELS} where images are.")
    return InterleavedPrompt(row, images)


def answers_to(bundle: Flamingo, prompts: Sequence[InterleavedPrompt]) -> list[Row]:
    """Return the tokens of a greedy answer to each prompt, in one batch."""
    rows: list[Row] = bundle.generate(
        list(prompts),
        num_beams=1,
        do_sample=False,
        num_return_sequences=1,
        max_new_tokens=max(1, min(NEW_TOKENS, bundle.context - max(map(len, prompts)))),
    )
    return rows


def answer_cases(fp32: Flamingo, samples: Sequence[Sample], most: int) -> EvaluationCases:
    """Compare whole greedy answers; where every sample has its true answer, how many are right.

    The relative error is of the logits along FP32's answers (teacher forcing): an answer that differs early does not
    drag what follows with it.
    """
    found = [(sample, named_prompt(fp32, sample)) for sample in samples]
    found.sort(key=lambda pair: len(pair[1]))
    vocabulary = int(fp32.backend("decoder").graph.outputs[0].shape[2])
    size = max(1, min(fp32.max_size("B"), BATCH_BYTES // (4 * vocabulary * NEW_TOKENS)))
    starts = range(0, len(found), size)
    batches = [
        found[starts[index] : starts[index] + size] for index in np.random.RandomState(0).permutation(len(starts))
    ]
    expected = [named_answers(fp32, batch) for batch in batches]

    def run_cases(bundle: LoadedBundle) -> Iterator[Outputs]:
        flamingo = cast(Flamingo, bundle)
        for batch, answers in zip(batches, expected, strict=True):
            prompts = [prompt for _, prompt in batch]
            logits, own = along(flamingo, prompts, answers), named_answers(flamingo, batch)
            for row, (sample, _) in enumerate(batch):
                values = logits[row, : len(answers[row])]
                yield Outputs(sample.name, values, padded_answer(own[row]), right=right(flamingo, sample, own[row]))

    return EvaluationCases(run_cases, CHOICE, "answers", "logits")


def named_prompt(bundle: Flamingo, sample: Sample) -> InterleavedPrompt:
    with naming([sample]):
        return prompt_of(bundle, sample)


def named_answers(bundle: Flamingo, batch: Sequence[tuple[Sample, InterleavedPrompt]]) -> list[Row]:
    with naming([sample for sample, _ in batch]):
        return answers_to(bundle, [prompt for _, prompt in batch])


def padded_answer(answer: Row) -> NDArray[np.int64]:
    """Return the tokens of one answer, one case of the comparison: int64 (1, NEW_TOKENS), PAD behind its end."""
    return np.array([[*answer, *[PAD] * (NEW_TOKENS - len(answer))]], np.int64)


def right(bundle: Flamingo, sample: Sample, answer: Row) -> tuple[int, int] | None:
    """Return whether an answer is the sample's true one, as (right, cases); None where the truth is not known."""
    if sample.answer is None:
        return None
    return int(bundle.answer_text(answer) == sample.answer.strip()), 1


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.flamingo import draw_answers

    return draw_answers(bundle, inputs, prompts)


FAMILY = ExportFamily(
    "Flamingo",
    SampleRunner({"encoder": (IMAGE, PIXELS)}, run, run_raw, also=((TEXT, IDS),), interleaved=True),
    answer_cases,
    GateLimits(points=0.010),
    Figure(draw, texts=True, images=True, prompts=True),
)
