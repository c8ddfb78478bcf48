"""Run calibration samples through a loaded bundle by the code that serves users.

A sample runs alone, or with others of its own size: padding, which no user's row need have, would otherwise stand
beside it. Texts longer than the bundle allows are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transom.calib.data import CalibrationData
from transom.calib.samples import IMAGE, PARTS, TEXT, Sample
from transom.runtime.backends.base import Array
from transom.runtime.errors import CalibrationError, InputError
from transom.runtime.session import LoadedBundle

IDS, MASK, PIXELS = "input_ids", "attention_mask", "pixel_values"


def run_as_given(bundle: LoadedBundle, feeds: Mapping[str, Array]) -> None:
    """Run raw inputs through the family's own ``run``: CLIP's takes those of both towers."""
    bundle.run(feeds)


@dataclass(frozen=True)
class Together:
    """The functions that run a family's loaded bundle on several samples at once, none of them raw inputs.

    tokens   bundle, sample -> the tokens of its row as the graph gets it; rows of as many tokens need no padding
    run      bundle, samples of equally many tokens -> nothing
    """

    tokens: Callable[[Any, Sample], int]
    run: Callable[[Any, Sequence[Sample]], None]


@dataclass(frozen=True)
class SampleRunner:
    """The functions that run a family's loaded bundle on one sample.

    graphs   the kinds of a sample that make each graph run, as ("text", "input_ids"); a graph that is not named here
             runs whenever these do
    run      bundle, sample of texts and images -> nothing; answers are dropped
    run_raw  bundle, raw inputs by name -> nothing
    also     kinds that a sample may hold beside those, or without them, that make no graph run which these do not
    interleaved  whether ``run`` takes samples of parts
    together  how samples run in batches; None where each runs alone
    """

    graphs: Mapping[str, tuple[str, str]]
    run: Callable[[Any, Sample], None]
    run_raw: Callable[[Any, Mapping[str, Array]], None] = run_as_given
    also: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False
    together: Together | None = None


def run_sample(bundle: LoadedBundle, sample: Sample, runner: SampleRunner) -> None:
    """Run ``bundle`` on one sample, for what its backends collect; answers are dropped.

    Raises CalibrationError, which names the sample, for one that does not fit the graph.
    """
    manifest = bundle.manifest
    family, tokenizer, preprocess = manifest.family, manifest.tokenizer is not None, manifest.preprocess is not None
    check_kinds(family, runner, sample.name, sample.kinds, tokenizer=tokenizer, preprocess=preprocess)
    try:
        if sample.feeds is not None:
            runner.run_raw(bundle, sample.feeds)
        else:
            runner.run(bundle, sample)
    except InputError as error:
        raise CalibrationError(
            f"{sample.name} does not fit the graph of this {family}: {error} Correct the sample, or leave it out."
        ) from None


def sample_batches(bundle: LoadedBundle, samples: Sequence[Sample], runner: SampleRunner) -> Iterator[list[Sample]]:
    """Yield the samples in batches of equal rows, with no more tokens in a batch than a row may have.

    So no run takes more memory than that of a sample alone. A batch comes when it is full, or at the end; raw inputs
    and images, and what ``run_sample`` will refuse, come at once and alone.
    """
    waiting: dict[int, list[Sample]] = {}
    for sample in samples:
        tokens = None
        if runner.together is not None and sample.kinds == {TEXT}:
            with suppress(InputError):  # ``run_sample`` raises it
                tokens = runner.together.tokens(bundle, sample)
        if tokens is None:
            yield [sample]
            continue
        batch = waiting.setdefault(tokens, [])
        batch.append(sample)
        if len(batch) >= min(bundle.max_size("B"), bundle.max_size("S") // tokens):
            yield waiting.pop(tokens)
    yield from waiting.values()


def run_batch(bundle: LoadedBundle, samples: Sequence[Sample], runner: SampleRunner) -> None:
    """Run ``bundle`` on a batch of ``sample_batches``, as ``run_sample`` does on each.

    Raises CalibrationError, which names the first of them, for a batch that does not fit the graph.
    """
    if len(samples) == 1 or runner.together is None:
        for sample in samples:
            run_sample(bundle, sample, runner)
        return
    try:
        runner.together.run(bundle, samples)
    except InputError as error:
        raise CalibrationError(f"{samples[0].name} or one read with it does not fit the graph: {error}") from None


def check_reach(family: str, runner: SampleRunner, data: CalibrationData, *, tokenizer: bool, preprocess: bool) -> None:
    """Raise CalibrationError unless every sample fits the family by its kind, and some sample runs each graph.

    ``tokenizer`` and ``preprocess`` say whether the checkpoint has them. Nothing is computed, and no graph is needed:
    this is to be called before anything takes its time.
    """
    for entry in data.entries:
        check_kinds(family, runner, entry.name, entry.kinds, tokenizer=tokenizer, preprocess=preprocess)
    missed = {graph: wanted for graph, wanted in runner.graphs.items() if not data.kinds & {*wanted}}
    for graph, (kind, raw) in missed.items():
        raise CalibrationError(
            f"{data.name} holds {listed(data.kinds)}, which never reach the graph {graph!r} of this {family}: it takes "
            f"{kind}s ({raw}). Give both, as in a folder of images and a .txt file."
        )


def check_kinds(
    family: str, runner: SampleRunner, name: str, kinds: frozenset[str], *, tokenizer: bool, preprocess: bool
) -> None:
    """Raise CalibrationError where nothing of a sample is what the family takes."""
    wanted = [*runner.graphs.values(), *runner.also]
    if not any(kinds & {*pair} for pair in wanted) or (PARTS in kinds and not runner.interleaved):
        takes = " and ".join(f"{kind}s (or a .npz file with {raw})" for kind, raw in wanted)
        raise CalibrationError(
            f"{name} holds {listed(kinds)}: samples that don't fit the graph. This {family} takes {takes}. "
            "Give calibration data of that kind."
        )
    for kind, there, raw in ((TEXT, tokenizer, IDS), (IMAGE, preprocess, PIXELS)):
        if kind in kinds and not there and any(kind in pair for pair in wanted):
            lacks = "tokenizer" if kind == TEXT else "image preprocessing"
            raise CalibrationError(
                f"{name} holds {listed(kinds)}, but this {family} has no {lacks}, since its checkpoint had none. "
                f"Give a .npz file with {raw}."
            )


def require_no_pair(sample: Sample) -> None:
    """Raise InputError for a pair of texts, which only BERT and its relatives take."""
    if sample.text_pair is not None:
        raise InputError("it has a text_pair, and only BERT takes pairs.")


def listed(kinds: frozenset[str]) -> str:
    """Return kinds of samples in words: ``an image and a text``, ``input_ids``."""
    words = {TEXT: "a text", IMAGE: "an image", PARTS: "parts in their order"}
    return " and ".join(words.get(kind, kind) for kind in sorted(kinds)) or "nothing"
