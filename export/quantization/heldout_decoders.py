"""What decoders are asked on held-out samples: the logits of every next token, behind tokens that are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from transom.calib.run_samples import cut_source, most_new_tokens
from transom.calib.samples import Sample
from transom.export.quantization.heldout import (
    BATCH_BYTES,
    CHOICE,
    Answers,
    Floats,
    Questions,
    naming,
    text_of,
)
from transom.runtime.decoder import CHUNK
from transom.runtime.errors import CalibrationError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator, Row
from transom.runtime.tasks.gpt import GPT
from transom.runtime.tasks.transformer import Transformer


def generation_questions(fp32: GPT, samples: Sequence[Sample], most: int) -> Questions:
    """Teacher forcing: the next token at every position of texts, which are cut into windows of one context.

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

    def ask(bundle: LoadedBundle) -> Iterator[Answers]:
        for name, window in windows:
            decoder = cast(GPT, bundle).new_decoder(1)
            read, following = np.array([window[:-1]]), np.array(window[1:])
            for first in range(0, len(following), CHUNK):
                logits = decoder.forward_logits(read[:, first : first + CHUNK])[0]
                targets = following[first : first + CHUNK]
                yield Answers(name, logits, logits.argmax(1)[:, None], nats=(surprise(logits, targets), len(targets)))

    return Questions(ask, CHOICE, "next tokens of held-out texts", "logits")


def surprise(logits: Floats, targets: NDArray[np.int64]) -> float:
    """-sum of log softmax(logits)[i, targets[i]] in nats; logits (n, V), targets (n,)."""
    wide = logits.astype(np.float64)
    top = wide.max(1)
    normalisers = np.log(np.exp(wide - top[:, None]).sum(1)) + top
    return float((normalisers - wide[np.arange(len(targets)), targets]).sum())


def translation_questions(fp32: Transformer, samples: Sequence[Sample], most: int) -> Questions:
    """Teacher forcing along the greedy output of ``fp32``: every token of it is a case, on every side.

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

    def ask(bundle: LoadedBundle) -> Iterator[Answers]:
        for chosen, rows, outputs in batches:
            for sample, tokens, logits in zip(
                chosen, outputs, along(cast(Generator, bundle), rows, outputs), strict=True
            ):
                values = logits[: len(tokens)]
                yield Answers(sample.name, values, values.argmax(1)[:, None])

    return Questions(ask, CHOICE, "tokens along FP32's greedy output", "logits")


def by_length(source: tuple[Sample, Row]) -> int:
    return len(source[1])


def along(bundle: Generator, rows: Sequence[Row], outputs: Sequence[Row]) -> Floats:
    """The logits that each token of ``outputs`` was to be chosen from: (R, n, V), n the longest of them."""
    longest = max(map(len, outputs))
    fed = np.array([[*tokens, *tokens[-1:] * (longest - len(tokens))] for tokens in outputs], np.int64)[:, :-1]
    prefilled = bundle.prefill(rows)
    first = prefilled.logits[:, None]
    return np.concatenate([first, prefilled.decoder.forward_logits(fed)], axis=1) if fed.shape[1] else first


def ids_of(bundle: Generator, sample: Sample) -> Row:
    """A sample as token ids: of its text, or its raw ``input_ids`` without what its mask leaves out."""
    if sample.feeds is not None and "input_ids" in sample.feeds:
        given = sample.feeds["input_ids"][0]
        mask = sample.feeds.get("attention_mask")
        ids = [int(token) for token in (given if mask is None else given[mask[0] != 0])]
    else:
        text = text_of(sample)
        with naming([sample]):
            ids = list(bundle.tokenizer().encode([text], truncate=False).rows[0].ids)
    outside = [token for token in ids if not 0 <= token < bundle.vocabulary]
    if outside:
        raise CalibrationError(
            f"held-out sample {sample.name} has the token {outside[0]}; the model knows 0..{bundle.vocabulary - 1}. "
            "Leave it out."
        )
    return ids
