"""Calibrate, evaluate and draw GPT: how probable the next token of a text is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from transom.calib.samples import Sample
from transom.export.families.base import ExportFamily, Figure
from transom.export.families.evaluation import CHOICE, EvaluationCases, Floats, GateLimits, Outputs
from transom.export.families.token_rows import ids_of, row_runner
from transom.runtime.bundle import Bundle
from transom.runtime.decoder import CHUNK
from transom.runtime.numeric import token_log_probabilities
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.gpt import GPT
from transom.runtime.tasks.prompts import Row


def read(bundle: GPT, ids: Row) -> None:
    """Read the first context's worth of tokens; a single one has no probability, but is read all the same."""
    shown = ids[: bundle.context]
    if len(shown) == 1:
        bundle.prefill([shown])
    else:
        bundle.log_probabilities(shown)


def next_token_cases(fp32: GPT, samples: Sequence[Sample], most: int) -> EvaluationCases:
    """Compare the next token at every position of texts, cut into windows of one context (teacher forcing).

    At most ``most`` of them; a window's first token has nothing before it and is not predicted.
    """
    windows: list[tuple[str, Row]] = []
    left = most
    for sample in samples:
        if left <= 0:
            break
        ids = ids_of(fp32, sample)
        for start in range(0, len(ids), fp32.context):
            window = ids[start : start + min(fp32.context, left + 1)]
            if len(window) > 1 and left > 0:
                windows.append((sample.name, window))
                left -= len(window) - 1

    def run(bundle: LoadedBundle) -> Iterator[Outputs]:
        for name, window in windows:
            decoder = cast(GPT, bundle).new_decoder(1)
            read, following = np.array([window[:-1]]), np.array(window[1:])
            for first in range(0, len(following), CHUNK):
                logits = decoder.forward_logits(read[:, first : first + CHUNK])[0]
                targets = following[first : first + CHUNK]
                yield Outputs(
                    name,
                    logits,
                    logits.argmax(1)[:, None],
                    nats=(negative_log_likelihood(logits, targets), len(targets)),
                )

    return EvaluationCases(run, CHOICE, "next tokens of held-out texts", "logits")


def negative_log_likelihood(logits: Floats, targets: NDArray[np.int64]) -> float:
    """Return -sum of log softmax(logits)[i, targets[i]] in nats; logits (n, V), targets (n,)."""
    return -float(token_log_probabilities(logits, targets).sum())


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.gpt import draw_token_surprisal

    return draw_token_surprisal(bundle, inputs)


FAMILY = ExportFamily(
    "GPT-2",
    row_runner("decoder", read),
    next_token_cases,
    GateLimits(growth={"static": 0.05, "dynamic": 0.03, "weight-only": 0.03}),
    Figure(draw, texts=True),
)
