"""A row's result does not depend on its neighbours in a batch, bit for bit, on whatever processor runs this.

Not so weights in blocks (INT4): of a single row MatMulNBits adds up otherwise where the processor has no VNNI, by
BLOCKS_BOUND of the largest value at most; or by ROUNDED, where an activation so becomes another integer. And not
sentence embeddings of bundles of version 0.1.0, whose graphs pool in an order that depends on the batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paths import KEPT
from row_independence import check_decoder, check_encoders
from transom.runtime import load
from transom.runtime.tasks.generator import Generator
from transom.runtime.text.batch import row_length

EARLIER = sorted(path.name for path in KEPT.iterdir() if path.name.count("-") == 1 or path.name.endswith("-bytes"))
BLOCKS_BOUND = 1e-5
ROUNDED = {"perceiver-int4-bytes": 2e-2}  # 1.1e-2 on AVX2
POOLED = "sentence_embedding"
FRESH = ("bert_bundle", "vit_bundle", "clip_bundle", "gpt_bundle", "dates_bundle", "half_gpt_bundle", "int8_bundle")


@pytest.mark.parametrize(("name", "threads"), [*((name, 2) for name in FRESH), ("bert_bundle", 1), ("gpt_bundle", 1)])
def test_rows_of_new_bundles(name: str, threads: int, request: pytest.FixtureRequest) -> None:
    with load(request.getfixturevalue(name), threads=threads) as bundle:
        check_encoders(bundle, lambda output: 0.0)
        if isinstance(bundle, Generator):
            check_decoder(bundle, 0.0)


@pytest.mark.parametrize("name", EARLIER)
def test_rows_of_every_family_and_precision(name: str) -> None:
    blocks = ROUNDED.get(name, BLOCKS_BOUND) if "-int4" in name else 0.0
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
