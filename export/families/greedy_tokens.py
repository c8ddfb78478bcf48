"""Compare quantised encoder-decoders token by token, along FP32's greedy outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from transom.calib.samples import Sample
from transom.export.families.evaluation import (
    BATCH_BYTES,
    CHOICE,
    EvaluationCases,
    Floats,
    Outputs,
    naming,
)
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.encoder_decoder import EncoderDecoder
from transom.runtime.tasks.generator import Generator
from transom.runtime.tasks.prompts import Prompt, Row

NEW_TOKENS = 64  # of a generated text, at most: most sentences end before


def generate_greedily(bundle: EncoderDecoder, prompt: Prompt) -> None:
    """Generate greedily, up to ``most_new_tokens``; answers are dropped."""
    bundle.generate(
        prompt, num_beams=1, do_sample=False, num_return_sequences=1, max_new_tokens=most_new_tokens(bundle)
    )


def most_new_tokens(bundle: EncoderDecoder) -> int:
    """Return how many tokens of an output are compared."""
    return max(1, min(NEW_TOKENS, bundle.context - 1))


def greedy_token_cases(fp32: EncoderDecoder, prompts: Sequence[tuple[Sample, Prompt]], most: int) -> EvaluationCases:
    """Compare every token along the greedy output of ``fp32``, on every side (teacher forcing).

    So a token that differs counts once and does not drag what follows with it. ``prompts`` are each sample's, in the
    order in which they are cut into batches; batches are added, in an order of chance, until there are ``most`` tokens.
    """
    vocabulary = int(fp32.backend("decoder").graph.outputs[0].shape[2])
    new_tokens = most_new_tokens(fp32)
    size = max(1, min(fp32.max_size("B"), BATCH_BYTES // (4 * vocabulary * new_tokens)))
    batches: list[tuple[list[Sample], list[Prompt], list[Row]]] = []
    left = most
    for index in np.random.RandomState(0).permutation(-(-len(prompts) // size)):
        chosen, rows = (list(part) for part in zip(*prompts[index * size : (index + 1) * size], strict=True))
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


def along(bundle: Generator, rows: Sequence[Prompt], outputs: Sequence[Row]) -> Floats:
    """Return the logits that each token of ``outputs`` is chosen from: (R, n, V), n the longest of them."""
    longest = max(map(len, outputs))
    fed = np.array([[*tokens, *tokens[-1:] * (longest - len(tokens))] for tokens in outputs], np.int64)[:, :-1]
    prefilled = bundle.prefill(rows)
    first = prefilled.logits[:, None]
    return np.concatenate([first, prefilled.decoder.forward_logits(fed)], axis=1) if fed.shape[1] else first
