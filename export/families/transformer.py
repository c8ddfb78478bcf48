"""Calibrate, evaluate and draw the encoder-decoder: the tokens along a greedy translation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from transom.calib.samples import Sample
from transom.export.families.base import ExportFamily, Figure
from transom.export.families.evaluation import (
    BATCH_BYTES,
    CHOICE,
    EvaluationCases,
    Floats,
    GateLimits,
    Outputs,
    naming,
)
from transom.export.families.token_rows import ids_of, row_runner
from transom.runtime.bundle import Bundle
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator
from transom.runtime.tasks.prompts import Row
from transom.runtime.tasks.transformer import Transformer

NEW_TOKENS = 64  # of a generated text, at most: most sentences end before


def translate(bundle: Transformer, ids: Row) -> None:
    """Translate greedily, up to ``most_new_tokens``."""
    bundle.generate(
        cut_source(bundle, ids),
        num_beams=1,
        do_sample=False,
        num_return_sequences=1,
        max_new_tokens=most_new_tokens(bundle),
    )


def cut_source(bundle: Transformer, ids: Row) -> Row:
    """Cut a source to as many tokens as the encoder takes; the last stays, which closes a source."""
    most = bundle.max_size(str(bundle.prompt_tokens().shape[1]))
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def most_new_tokens(bundle: Transformer) -> int:
    """Return how many tokens of a translation are compared."""
    return max(1, min(NEW_TOKENS, bundle.context - 1))


def translation_cases(fp32: Transformer, samples: Sequence[Sample], most: int) -> EvaluationCases:
    """Compare every token along the greedy output of ``fp32``, on every side (teacher forcing).

    So a token that differs counts once and does not drag what follows with it. Sentences are added until there are
    ``most`` tokens.
    """
    vocabulary = int(fp32.backend("decoder").graph.outputs[0].shape[2])
    new_tokens = most_new_tokens(fp32)
    size = max(1, min(fp32.max_size("B"), BATCH_BYTES // (4 * vocabulary * new_tokens)))
    sources = sorted(((sample, cut_source(fp32, ids_of(fp32, sample))) for sample in samples), key=by_length)
    batches: list[tuple[list[Sample], list[Row], list[Row]]] = []
    left = most
    for index in np.random.RandomState(0).permutation(-(-len(sources) // size)):
        chosen, rows = (list(part) for part in zip(*sources[index * size : (index + 1) * size], strict=True))
        if left <= 0:
            break
        with naming(chosen):
            outputs = fp32.generate(
                rows,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
            )
        left -= sum(map(len, outputs))
        batches.append((chosen, rows, outputs))

    def run(bundle: LoadedBundle) -> Iterator[Outputs]:
        for chosen, rows, outputs in batches:
            for sample, tokens, logits in zip(
                chosen, outputs, along(cast(Generator, bundle), rows, outputs), strict=True
            ):
                values = logits[: len(tokens)]
                yield Outputs(sample.name, values, values.argmax(1)[:, None])

    return EvaluationCases(run, CHOICE, "tokens along FP32's greedy output", "logits")


def by_length(source: tuple[Sample, Row]) -> int:
    return len(source[1])


def along(bundle: Generator, rows: Sequence[Row], outputs: Sequence[Row]) -> Floats:
    """Return the logits that each token of ``outputs`` is chosen from: (R, n, V), n the longest of them."""
    longest = max(map(len, outputs))
    fed = np.array([[*tokens, *tokens[-1:] * (longest - len(tokens))] for tokens in outputs], np.int64)[:, :-1]
    prefilled = bundle.prefill(rows)
    first = prefilled.logits[:, None]
    return np.concatenate([first, prefilled.decoder.forward_logits(fed)], axis=1) if fed.shape[1] else first


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.transformer import draw_alignments

    return draw_alignments(bundle, inputs)


FAMILY = ExportFamily(
    "Transformer",
    row_runner("encoder", translate),
    translation_cases,
    GateLimits(points=0.010),
    Figure(draw, texts=True),
)
