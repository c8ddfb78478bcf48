"""A row's result does not depend on its neighbours in a batch, bit for bit, on whatever processor runs this.

Not so weights in blocks (INT4): of a single row MatMulNBits adds up otherwise where the processor has no VNNI, by
BLOCKS_BOUND of the largest value at most. And not sentence embeddings of bundles of version 0.1.0, whose graphs pool in
an order that depends on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from paths import KEPT
from transom.runtime import load
from transom.runtime.feeds import is_decoder
from transom.runtime.graph_spec import Graph
from transom.runtime.greedy_check import forced_logits
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator
from transom.runtime.text.batch import row_length

EARLIER = sorted(path.name for path in KEPT.iterdir() if path.name.count("-") == 1)
BLOCKS_BOUND = 1e-5
POOLED = "sentence_embedding"
FRESH = ("bert_bundle", "vit_bundle", "clip_bundle", "gpt_bundle", "dates_bundle", "half_gpt_bundle", "int8_bundle")
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
    """Prompts of several lengths, then tokens one by one: in a batch whose caches are as long as the longest needs."""
    random = np.random.default_rng(1)
    rows, context = min(8, bundle.max_size("B")), min(bundle.context, 80)
    prompt_below = bundle.prompt_tokens().exclusive_max or 100
    token_below = bundle.backend("decoder").graph.inputs[0].exclusive_max or 100
    most = min(context // 2, bundle.max_size(str(bundle.prompt_tokens().shape[1])))
    prompts = [random.integers(1, prompt_below, max(1, min(length, most))).tolist() for length in LENGTHS[:rows]]
    chunks = [random.integers(1, token_below, (rows, 1)) for _ in range(min(6, context // 2 - 1))]

    def logits(chosen: Sequence[int]) -> list[NDArray[np.float32]]:
        return list(forced_logits(bundle, [prompts[row] for row in chosen], [chunk[list(chosen)] for chunk in chunks]))

    whole = logits(range(rows))
    for chosen in some_rows(rows):
        if chosen:
            for step, (ours, theirs) in enumerate(zip(logits(chosen), whole, strict=True)):
                require_equal(ours, theirs[chosen], bound, f"logits of rows {chosen}, step {step}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FRESH)
def test_rows_of_new_bundles(name: str, threads: int, request: pytest.FixtureRequest) -> None:
    with load(request.getfixturevalue(name), threads=threads) as bundle:
        check_encoders(bundle, lambda output: 0.0)
        if isinstance(bundle, Generator):
            check_decoder(bundle, 0.0)


@pytest.mark.parametrize("name", EARLIER)
def test_rows_of_every_family_and_precision(name: str) -> None:
    blocks = BLOCKS_BOUND if name.endswith("int4") else 0.0
    with load(KEPT / name, threads=2) as bundle:
        check_encoders(bundle, lambda output: max(blocks, 1e-6 if output == POOLED else 0.0))
        if isinstance(bundle, Generator):
            check_decoder(bundle, blocks)


def test_texts_of_any_length_beside_each_other(bert_bundle: Path) -> None:
    """One text of 1 to 50 words alone, and in a batch padded to the longest."""
    texts = [" ".join(["people"] * count) for count in (1, 2, 3, 4, 5, 7, 9, 14, 22, 31, 50)]
    with load(bert_bundle, threads=2) as bert:
        together = bert.embed(texts)
        for text, row in zip(texts, together, strict=True):
            np.testing.assert_array_equal(bert.embed(text), row)
        np.testing.assert_array_equal(bert.embed(texts[::-1]), together[::-1])


def test_images_beside_each_other_and_their_labels(clip_bundle: Path) -> None:
    """The product of both towers' vectors too, which numpy adds up otherwise for one row than for two."""
    images = [np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8) for seed in range(5)]
    labels = ["the people", "a city", "paris"]
    with load(clip_bundle, threads=2) as clip:
        together = clip.zero_shot(images, labels)
        assert [clip.zero_shot(image, labels) for image in images] == together
        pixels = np.stack([clip.embed_image(image) for image in images])
        np.testing.assert_array_equal(pixels, clip.embed_image(images))


@pytest.mark.parametrize(
    ("longest", "most", "length"), [(1, 512, 4), (4, 512, 4), (5, 512, 8), (66, 67, 67), (3, 3, 3), (9, 4, 9)]
)
def test_rows_are_padded_by_fours(longest: int, most: int, length: int) -> None:
    assert row_length(longest, most) == length


def test_sources_are_padded_by_fours(dates_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a source of 7 tokens the decoder reads 8, whatever lies beside it."""
    with load(dates_bundle) as mt:
        run, sizes = mt.backend("encoder").run, []

        def note(feeds: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
            sizes.append(feeds["input_ids"].shape)
            return run(feeds, shapes)

        monkeypatch.setattr(mt.backend("encoder"), "run", note)
        mt.prefill([[5] * 7])
        mt.prefill([[5] * 7, [5] * 9])
    assert sizes == [(1, 8), (2, 12)]
