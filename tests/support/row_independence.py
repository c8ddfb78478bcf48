"""Compare what a bundle computes of a row with what it computes of the same row beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.graph_spec import Graph, is_decoder
from transom.runtime.greedy_check import forced_logits
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.flamingo import Flamingo
from transom.runtime.tasks.generator import Generator

LENGTHS = (1, 7, 3, 12, 2, 30, 5, 16)  # tokens of the rows


def require_equal(ours: NDArray[Any], theirs: NDArray[Any], bound: float, what: str) -> None:
    if bound == 0:
        np.testing.assert_array_equal(ours, theirs, err_msg=what)
    else:
        scale = float(np.abs(theirs).max())
        assert float(np.abs(ours - theirs).max()) <= bound * scale, what


def feeds_of(graph: Graph, sizes: dict[str, int], random: np.random.Generator) -> dict[str, NDArray[Any]]:
    feeds = {}
    for tensor in graph.inputs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        if tensor.name == "attention_mask":
            feeds[tensor.name] = np.ones(shape, np.int64)
        elif tensor.dtype == "int64" and tensor.default is None:
            feeds[tensor.name] = random.integers(1, tensor.exclusive_max or 100, shape)
        elif tensor.default is None:
            feeds[tensor.name] = random.standard_normal(shape).astype(np.float32)
    return feeds


def some_rows(count: int) -> Iterator[list[int]]:
    """Each row alone, neighbours of one row, all but the first: in other places than in the whole batch."""
    yield from ([row] for row in range(count))
    yield from ([0, row] for row in range(1, count))
    yield list(range(1, count))[::-1]


def check_encoders(bundle: LoadedBundle, bound: Callable[[str], float]) -> None:
    random = np.random.default_rng(0)
    for file in bundle.manifest.graphs:
        graph = bundle.backend(file.graph.name).graph
        if is_decoder(graph):
            continue
        rows = min(8, bundle.max_size("B"))
        lengths = (1, 5, 8) if any("S" in tensor.shape for tensor in graph.inputs) else (1,)
        for length in lengths:
            feeds = feeds_of(
                graph,
                {"B": rows, "S": min(length, bundle.manifest.axes["S"].max) if "S" in bundle.manifest.axes else 1},
                random,
            )
            whole = bundle.run(feeds)
            for chosen in some_rows(rows):
                if not chosen:
                    continue
                part = bundle.run({name: np.ascontiguousarray(array[chosen]) for name, array in feeds.items()})
                for name, found in part.items():
                    require_equal(found, whole[name][chosen], bound(name), f"{name} of rows {chosen}, S={length}")


def check_decoder(bundle: Generator, bound: float) -> None:
    """Prompts of several lengths, or images, then tokens one by one, with caches as long as the longest row needs."""
    random = np.random.default_rng(1)
    rows, context = min(8, bundle.max_size("B")), min(bundle.context, 80)
    token_below = bundle.backend("decoder").graph.inputs[0].exclusive_max or 100
    axis = bundle.prompt_axis()
    if axis is None:
        prompts = bundle.random_prompts(random, rows, 1)
    else:
        below, most = bundle.prompt_tokens().exclusive_max or 100, min(context // 2, bundle.max_size(axis))
        lengths = [max(1, min(length, most)) for length in LENGTHS[:rows]]
        prompts = [random.integers(1, below, length).tolist() for length in lengths]
        if isinstance(bundle, Flamingo):  # of no image, one and two
            prompts = [
                bundle.random_prompts(random, 1, length, images=row % 3)[0] for row, length in enumerate(lengths)
            ]
    chunks = [random.integers(1, token_below, (rows, 1)) for _ in range(min(6, context // 2 - 1))]

    def logits(chosen: Sequence[int]) -> list[NDArray[np.float32]]:
        return list(forced_logits(bundle, [prompts[row] for row in chosen], [chunk[list(chosen)] for chunk in chunks]))

    whole = logits(range(rows))
    for chosen in some_rows(rows):
        if chosen:
            for step, (ours, theirs) in enumerate(zip(logits(chosen), whole, strict=True)):
                require_equal(ours, theirs[chosen], bound, f"logits of rows {chosen}, step {step}")
