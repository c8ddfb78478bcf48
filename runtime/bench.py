"""Measure how fast a bundle runs on this machine: latency, throughput, memory, and how long loading takes.

Timed is ``LoadedBundle.run``, checks and copies included: what an application waits for. Of a bundle that generates it
is what ``generate`` does: a prefill of the prompts into a new cache, then decode steps of one token for each row.
Choosing the token is not in it, since that depends on the keywords.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike

import numpy as np

from transom.runtime.backends.base import Array
from transom.runtime.backends.kernels import AUTO, KernelChoice
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.errors import InputError, ShapeError
from transom.runtime.feeds import allowed_sizes, filled
from transom.runtime.graph_spec import IMAGES, Axis, Graph, Tensor, is_decoder, shape_of
from transom.runtime.host import cpu_name, instruction_set, peak_memory_mib, usable_cores
from transom.runtime.loading import load
from transom.runtime.progress import Progress, silent
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator

SEED = 0  # of the inputs: two benchmarks of one bundle compute the same
NEW_TOKENS = 64  # unless the context is too short for them and a prompt


@dataclass(frozen=True)
class Effort:
    """Length of a measurement: ``warmup`` calls first, then ``runs`` or until ``seconds`` are over."""

    runs: int = 100
    warmup: int = 10
    seconds: float = 10.0
    progress: Progress = silent


@dataclass(frozen=True)
class Timing:
    """Percentiles over ``runs`` calls of one thing at one size, milliseconds each."""

    name: str  # of the graph that was run, or of the step of a generation: "prefill", "decode"
    sizes: Mapping[str, int]  # axis -> elements; "new" are the tokens generated
    runs: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    items_per_s: float  # axis B counted, 1 item per call where a graph has none; in a generation tokens
    items: str = "items"  # or "tokens"


@dataclass(frozen=True)
class BenchReport:
    """The timings of ``bench`` with the machine they were measured on."""

    device: str
    threads: int | None  # None: one per physical core
    cores: int  # that this process may use
    cpu: str
    instruction_set: str  # that INT8 is multiplied with: transom.runtime.host has the names
    onnxruntime: str
    kernels: Mapping[str, KernelChoice]  # by graph: what executed it, and why
    load_s: float  # hashing every file and building the sessions; importing the libraries is not in it
    memory_before_mib: float | None  # peak of the process until the bundle was loaded, libraries included
    memory_peak_mib: float | None  # peak of the process at the end; None where the system does not say
    timings: tuple[Timing, ...]


def bench(
    path: str | PathLike[str],
    shapes: Sequence[Mapping[str, int]] = (),
    *,
    runs: int = 100,
    warmup: int = 10,
    seconds: float = 10.0,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = silent,
    new_tokens: int | None = None,
    kernels: str = AUTO,
) -> BenchReport:
    """Load a bundle and time each of its graphs at each of ``shapes`` (axis -> size; the rest at opt).

    A shape is run ``warmup`` times, then ``runs`` times or until ``seconds`` are over, whichever comes
    first. Of a bundle that generates, S is the length of the prompt or source and ``new_tokens`` how many
    follow. Raises what ``load`` raises, InputError for an unknown axis, ShapeError for a size out of
    its bounds.
    """
    version = str(onnxruntime().__version__)
    before = peak_memory_mib()
    started = time.perf_counter()
    with load(path, device, threads, kernels) as loaded:
        load_s = time.perf_counter() - started
        plan = [one for shape in shapes or [{}] for one in measurements(loaded, shape, new_tokens)]
        effort = Effort(runs, warmup, seconds, progress)
        timings = tuple(timing for measurement in plan for timing in measurement(effort))
        return BenchReport(
            device=loaded.device,
            threads=threads,
            cores=usable_cores(),
            cpu=cpu_name(),
            instruction_set=instruction_set(),
            onnxruntime=version,
            kernels=dict(loaded.kernels),
            load_s=load_s,
            memory_before_mib=before,
            memory_peak_mib=peak_memory_mib(),
            timings=timings,
        )


def measurements(
    loaded: LoadedBundle, asked: Mapping[str, int], new_tokens: int | None = None
) -> list[Callable[[Effort], list[Timing]]]:
    """Return the measurements, one per graph; the sizes ``asked`` for are checked before anything runs."""
    if isinstance(loaded, Generator):
        sizes = generation_sizes(loaded, asked, new_tokens)
        encoders = [file.graph for file in loaded.manifest.graphs if is_image_encoder(file.graph)]
        images = [partial(measure, loaded, graph, {"B": sizes["B"]}, items="images") for graph in encoders]
        return [*images, partial(measure_generation, loaded, sizes)]
    if new_tokens is not None:
        raise InputError(f"new_tokens is {new_tokens}, but a bundle for {loaded.manifest.task} generates nothing.")
    axes = loaded.axes
    return [partial(measure, loaded, file.graph, sizes_of(file.graph, axes, asked)) for file in loaded.manifest.graphs]


def sizes_of(graph: Graph, axes: Mapping[str, Axis], asked: Mapping[str, int]) -> dict[str, int]:
    """Return the size of each named axis of the graph's inputs: the one ``asked`` for, else its opt.

    Raises InputError for an axis that the bundle does not have, ShapeError for a size out of bounds.
    """
    for name, size in asked.items():
        if name not in axes:
            raise InputError(f"unknown axis {name!r}; this bundle has {', '.join(axes)}.")
        check_size(axes, name, size)
    named = [size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)]
    return {name: asked.get(name, axes[name].opt) for name in dict.fromkeys(named)}


def check_size(axes: Mapping[str, Axis], name: str, size: int) -> None:
    """Raise ShapeError for a size out of the bounds of an axis."""
    if not axes[name].min <= size <= axes[name].max:
        raise ShapeError(f"axis {name} is {size}; this bundle allows {allowed_sizes(name, axes[name], size)}")


def is_image_encoder(graph: Graph) -> bool:
    """Return whether a graph of a generator encodes images, from pixels alone: what an image costs, each time."""
    return not is_decoder(graph) and [tensor.name for tensor in graph.inputs] == ["pixel_values"]


def measure(
    loaded: LoadedBundle, graph: Graph, sizes: Mapping[str, int], effort: Effort, items: str = "items"
) -> list[Timing]:
    """Time one graph of a loaded bundle at one size, on inputs of ``example_feeds``; ``items`` is what B counts."""
    feeds = example_feeds(graph, sizes)
    label = " ".join([graph.name, *(f"{name}={size}" for name, size in sizes.items())])
    effort.progress(label, 0, effort.runs)
    for _ in range(effort.warmup):
        loaded.run(feeds)
    times_ms: list[float] = []
    deadline = time.perf_counter() + effort.seconds
    while len(times_ms) < effort.runs:
        started = time.perf_counter()
        loaded.run(feeds)
        ended = time.perf_counter()
        times_ms.append((ended - started) * 1e3)
        effort.progress(label, len(times_ms), effort.runs)
        if ended > deadline:
            break
    return [timing_of(graph.name, sizes, times_ms, sizes.get("B", 1), items)]


def timing_of(name: str, sizes: Mapping[str, int], times_ms: Sequence[float], each: int, items: str) -> Timing:
    """Return the percentiles of calls that took ``times_ms`` each, and the rate at ``each`` items a call.

    Percentiles are numpy's default: linear between the two nearest ranks.
    """
    p50, p95, p99 = np.percentile(times_ms, [50, 95, 99]).tolist()
    return Timing(
        name=name,
        sizes=dict(sizes),
        runs=len(times_ms),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        items_per_s=each * len(times_ms) * 1e3 / sum(times_ms),
        items=items,
    )


def example_feeds(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Make seeded inputs as the graph declares them: ids below their bound, floats of N(0, 1).

    An input with a default gets its default: a mask of ones is the work that one pays for.
    """
    rng = np.random.default_rng(SEED)

    def values(tensor: Tensor) -> Array:
        if tensor.default is not None:
            return filled(tensor, sizes)
        shape = shape_of(tensor, sizes)
        if tensor.dtype == "int64":
            return rng.integers(0, tensor.exclusive_max or 1, shape, np.int64)
        return rng.standard_normal(shape, np.float32)

    return {tensor.name: values(tensor) for tensor in graph.inputs}


def generation_sizes(loaded: Generator, asked: Mapping[str, int], new_tokens: int | None) -> dict[str, int]:
    """Return rows B, tokens S of each prompt or source where it has any, images I of those tokens, and "new" ones.

    What is not ``asked`` for is the axis' opt.
    Raises InputError for another axis and for more tokens than the context holds, ShapeError for a size out
    of its bounds.
    """
    axes, context = loaded.axes, loaded.context
    for name, size in asked.items():
        known = ("B",) if loaded.prompt_axis() is None else ("B", "S", *({IMAGES} & axes.keys()))
        if name not in known:
            words = "B, its images" if len(known) == 1 else "B and S, the tokens of each prompt"
            words += ", and I, the images among them" if IMAGES in known else ""
            raise InputError(f"unknown axis {name!r}; a generation has {words}.")
        check_size(axes, name, size)
    B = asked.get("B", axes["B"].opt)
    new = new_tokens if new_tokens is not None else max(1, min(NEW_TOKENS, context // 2))
    shared = loaded.decoder_length([0, 0]) == 2  # the context, by the prompt and what is new
    if loaded.prompt_axis() is None:  # an image
        S = 1
    else:
        S = asked.get("S", min(axes["S"].opt, max(1, context - new) if shared else axes["S"].max))
    length = loaded.decoder_length([0] * S)
    if length + new > context:
        raise InputError(
            f"a prompt of {length} tokens and {new} new ones make {length + new}; the context holds {context}. "
            "Ask for fewer of either."
        )
    if loaded.prompt_axis() is None:
        return {"B": B, "new": new}
    if IMAGES not in axes:
        return {"B": B, "S": S, "new": new}
    images = asked.get(IMAGES, axes[IMAGES].opt)
    if images >= S:
        raise InputError(
            f"{images} images take as many of the {S} tokens of a prompt, and a text follows them. Ask for fewer "
            f"images, or S={images + 1} at least."
        )
    return {"B": B, "S": S, IMAGES: images, "new": new}


def measure_generation(loaded: Generator, sizes: Mapping[str, int], effort: Effort) -> list[Timing]:
    """Time whole generations of random tokens: "prefill" ms a call, "decode" ms a token of each of the B rows.

    The first new token comes from the prefill, so that ``new`` tokens take ``new - 1`` steps; a generation of one
    token has no "decode". Images among the tokens are encoded before: "encoder" has their time. Warm-up is one prompt
    and ``effort.warmup`` steps at most. A generation that runs when the time is over is finished: its last steps, over
    the fullest cache, are the slowest.
    """
    B, S, new = sizes["B"], sizes.get("S", 1), sizes["new"]
    rng = np.random.default_rng(SEED)
    prefill = loaded.prefill_call(loaded.random_prompts(rng, B, S, sizes.get(IMAGES, 0)))
    vocabulary = int(loaded.backend("decoder").graph.outputs[0].shape[2])
    steps = rng.integers(0, vocabulary, (new - 1, B))
    label = " ".join(["generation", *(f"{name}={size}" for name, size in sizes.items())])
    effort.progress(label, 0, effort.runs)
    if effort.warmup:
        decoder = prefill().decoder
        for tokens in steps[: effort.warmup]:
            decoder.decode_step(tokens)
    prefill_ms: list[float] = []
    decode_ms: list[float] = []
    deadline = time.perf_counter() + effort.seconds
    while len(prefill_ms) < effort.runs:
        started = time.perf_counter()
        decoder = prefill().decoder
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
    timings = [timing_of("prefill", sizes, prefill_ms, B * S, "tokens" if "S" in sizes else "images")]
    return timings + ([timing_of("decode", sizes, decode_ms, B, "tokens")] if decode_ms else [])
