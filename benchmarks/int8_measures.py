"""Measure one side beside FP32, the same for every quantiser, and format the table.

- Score: the reference model's own (export/scores.py), with its 95 % interval.
- Relative error: ||side - FP32|| / ||FP32|| over what the task reads of the graphs (logits or embeddings), padding left
  out; a Transformer is fed the tokens that FP32 chose.
- Top-1 agreement: the fraction of rows of logits whose largest number is where FP32 has it.
- Size: the graphs' files that this CPU needs, weights included.
- Speed: FP32's median time over this side's, blocks of runs alternating; above 1 is faster than FP32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from int8_cases import HeldOut, Side

from transom.export.metrics import Rate
from transom.export.reference_models import REFERENCE_MODELS
from transom.runtime.backends.base import Array
from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.bench import example_feeds, sizes_of
from transom.runtime.host import cpu_name, instruction_set
from transom.runtime.tasks.generator import Generator

S_TIMED = 128  # tokens of a text that is timed, or as many as the bundle allows
GENERATED = {"gpt": 32, "transformer": 10}  # new tokens of a generation that is timed
BLOCKS, RUNS = 3, 12  # runs of one side before the other has its turn
REST_S = 0.05  # between blocks: an idle session's threads go on spinning for a while
HEAD = "| model | who | score | 95 % | relative error | top-1 agreement | MiB | times as fast as FP32 |"


@dataclass(frozen=True)
class Row:
    """One side's figures for one model; with a ``failure``, the first line of an error, the rest is None."""

    model: str
    who: str
    score: float | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None
    lower_is_better: bool = False  # of the score
    relative_error: float | None = None
    agreement: float | None = None
    size: int | None = None  # bytes
    speed: float | None = None
    failure: str | None = None
    note: str = ""  # what the quantiser said of itself: layers kept, alpha, ...


def measured(who: str, side: Side, fp32: Side, held_out: HeldOut, *, note: str = "") -> Row:
    """Return all figures of a side. Errors are raised."""
    answers = held_out.answers(side)
    score = REFERENCE_MODELS[side.case.name].score(side.loaded)
    ratios = alternating({"fp32": timed_call(fp32), "side": timed_call(side)}) if side is not fp32 else None
    return Row(
        side.case.name,
        who,
        score=score.value,
        interval=score.interval,
        n=score.n,
        lower_is_better=isinstance(score, Rate),
        relative_error=relative_error(answers, held_out.reference),
        agreement=agreement(answers, held_out.reference) if side.case.has_logits else None,
        size=side.size,
        speed=ratios["fp32"] / ratios["side"] if ratios else 1.0,
        note=note,
    )


def relative_error(side: Sequence[Array], reference: Sequence[Array]) -> float:
    """Return ||side - reference|| / ||reference|| over all outputs."""
    wrong = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(side, reference, strict=True))
    return float(np.sqrt(wrong / sum(float(np.square(b.astype(np.float64)).sum()) for b in reference)))


def agreement(side: Sequence[Array], reference: Sequence[Array]) -> float:
    """Return the fraction of rows with equal top-1."""
    same = [(a.argmax(-1) == b.argmax(-1)).ravel() for a, b in zip(side, reference, strict=True)]
    return float(np.concatenate(same).mean())


def timed_call(side: Side) -> Callable[[], object]:
    """Return the timed calls: each graph at B = 1 with S_TIMED tokens or one image, or a greedy generation."""
    loaded = side.loaded
    if isinstance(loaded, Generator):
        prompt, new = list(range(2, 10)), GENERATED[side.case.name]
        return lambda: loaded.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=1)
    axes = loaded.manifest.axes
    feeds = []
    for file in loaded.manifest.graphs:
        asked = {"B": 1, "S": min(S_TIMED, axes["S"].max)} if "S" in axes else {"B": 1}
        feeds.append(example_feeds(file.graph, sizes_of(file.graph, axes, asked)))
    return lambda: [loaded.run(feed) for feed in feeds]


def alternating(calls: Mapping[str, Callable[[], object]], blocks: int = BLOCKS, runs: int = RUNS) -> dict[str, float]:
    """Return the median seconds of each call: ``runs`` of one, a pause, ``runs`` of the next, ``blocks`` times over."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(blocks):
        for name, call in calls.items():
            time.sleep(REST_S)
            call()  # warms caches up, and wakes the session's threads
            for _ in range(runs):
                started = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def first_line(error: BaseException) -> str:
    """Return an exception's text for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"


def line(row: Row) -> str:
    """Return a row of the table."""
    if row.failure is not None:
        return f"| {row.model} | {row.who} | failed: {row.failure.replace('|', '/')[:200]} | | | | | |"
    low, high = row.interval or (0.0, 0.0)
    agreed = "–" if row.agreement is None else f"{100 * row.agreement:.1f} %"
    figures = f"{row.score:.4f} | {low:.4f} to {high:.4f} | {row.relative_error:.4f} | {agreed}"
    return f"| {row.model} | {row.who} | {figures} | {(row.size or 0) / 2**20:.2f} | {row.speed:.2f} |"


def machine() -> dict[str, Any]:
    """Name what INT8 figures depend on: the processor, what it multiplies 8-bit integers with, and how it adds them."""
    return {"cpu": cpu_name(), "instruction_set": instruction_set(), "sums": integer_sums().means}
