"""How long a user waits for generated text: until the first token is there, and for each one after it.

What is timed is what ``generate`` does: prompts read into a new cache, then a token for each row at a time. Choosing
the token is not in it, since that depends on the keywords.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from transom.runtime.bench import SEED, Effort, Timing, check_size, timing_of
from transom.runtime.errors import InputError

if TYPE_CHECKING:
    from transom.runtime.tasks.generator import Generator

NEW_TOKENS = 64  # unless the context is too short for them and a prompt


def generation_sizes(loaded: Generator, asked: Mapping[str, int], new_tokens: int | None) -> dict[str, int]:
    """Rows B, tokens S of each prompt or source, and "new" ones; what is not asked for is as the bundle is tuned.

    Raises InputError for another axis and for more tokens than the context holds, ShapeError for a size out
    of its bounds.
    """
    axes, context = loaded.axes, loaded.context
    for name, size in asked.items():
        if name not in ("B", "S"):
            raise InputError(f"unknown axis {name!r}; a generation has B and S, the tokens of each prompt.")
        check_size(axes, name, size)
    B = asked.get("B", axes["B"].opt)
    new = new_tokens if new_tokens is not None else max(1, min(NEW_TOKENS, context // 2))
    shared = loaded.decoder_length([0, 0]) == 2  # the context, by the prompt and what is new
    room = max(1, context - new) if shared else axes["S"].max
    S = asked.get("S", min(axes["S"].opt, room))
    length = loaded.decoder_length([0] * S)
    if length + new > context:
        raise InputError(
            f"a prompt of {length} tokens and {new} new ones make {length + new}; the context holds {context}. "
            "Ask for fewer of either."
        )
    return {"B": B, "S": S, "new": new}


def measure_generation(loaded: Generator, sizes: Mapping[str, int], effort: Effort) -> list[Timing]:
    """Time whole generations of random tokens: "prefill" ms a call, "decode" ms a token of each of the B rows.

    The first new token comes from the prefill, so that ``new`` tokens take ``new - 1`` steps; a generation of one
    token has no "decode". Warm-up is one prompt and ``effort.warmup`` steps at most. A generation that has begun when
    the time is over is finished: its last steps, over the fullest cache, are the slowest.
    """
    B, S, new = sizes["B"], sizes["S"], sizes["new"]
    source = np.random.default_rng(SEED)
    prompts = source.integers(0, loaded.prompt_tokens().exclusive_max or 1, (B, S)).tolist()
    vocabulary = int(loaded.backend("decoder").graph.outputs[0].shape[2])
    steps = source.integers(0, vocabulary, (new - 1, B))
    label = " ".join(["generation", *(f"{name}={size}" for name, size in sizes.items())])
    effort.progress(label, 0, effort.runs)
    if effort.warmup:
        decoder = loaded.prefill(prompts).decoder
        for tokens in steps[: effort.warmup]:
            decoder.decode_step(tokens)
    prefill_ms: list[float] = []
    decode_ms: list[float] = []
    deadline = time.perf_counter() + effort.seconds
    while len(prefill_ms) < effort.runs:
        started = time.perf_counter()
        decoder = loaded.prefill(prompts).decoder
        ended = time.perf_counter()
        prefill_ms.append((ended - started) * 1e3)
        for tokens in steps:
            started = time.perf_counter()
            decoder.decode_step(tokens)
            ended = time.perf_counter()
            decode_ms.append((ended - started) * 1e3)
        effort.progress(label, len(prefill_ms), effort.runs)
        if ended > deadline:
            break
    timings = [timing_of("prefill", sizes, prefill_ms, B * S, "tokens")]
    return timings + ([timing_of("decode", sizes, decode_ms, B, "tokens")] if decode_ms else [])
