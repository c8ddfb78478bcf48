"""Test calls with many inputs: answers in the caller's order, and memory for these and one batch alone."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from paths import KEPT
from transom.runtime import load
from transom.runtime.errors import InputError
from transom.runtime.tasks import text_bundle as texts_module
from transom.runtime.tasks.batches import batch_costs, batches, by_tokens, collected, packed

TEXTS = [" ".join("abcd"[: 1 + place % 4]) for place in range(2500)]
IMAGES = list(np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 3), np.uint8))
# Bytes beside the answers: lists of references and lengths, a batch. All rows of texts took millions, those of features
# and of labels 600,000 and more.
BESIDE = 300_000
LABELS = [f"{place}" for place in range(60)]


def extra(call: Callable[[], object]) -> int:
    """Return the bytes held at the peak of a call beyond its result."""
    call()  # what is imported and cached
    tracemalloc.start()
    try:
        kept = call()
        now, peak = tracemalloc.get_traced_memory()
        assert kept is not None
        return peak - now
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("bert", lambda b: b.embed(TEXTS)),
        ("bert", lambda b: b.classify(TEXTS, top_k=1)),
        ("bert", lambda b: b.classify(TEXTS, TEXTS[::-1], top_k=1, truncate=True)),
        ("clip", lambda c: c.embed_text(TEXTS)),
        ("clip", lambda c: c.embed_labels(TEXTS[:200], ["{}"] * 20)),
        ("clip", lambda c: c.zero_shot(IMAGES, LABELS, top_k=1)),
        ("clip", lambda c: c.embed_image(IMAGES)),
        ("vit", lambda v: v.features(IMAGES)),
        ("vit", lambda v: v.classify(IMAGES, top_k=1)),
    ],
)
def test_memory_beside_the_answers_is_a_batch(family: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "KEPT_BYTES", 0, raising=False)  # rows that wait have a bound of their own
    with load(KEPT / f"{family}-fp32", threads=1) as bundle:
        assert extra(lambda: call(bundle)) < BESIDE


def test_rows_that_wait_are_bounded_and_the_others_are_tokenized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = TEXTS[:50]
    with load(KEPT / "bert-fp32", threads=1) as bert:
        encoder = bert.tokenizer()
        tokenized, whole = [], encoder.row
        monkeypatch.setattr(encoder, "row", lambda text, *a, **k: (tokenized.append(text), whole(text, *a, **k))[1])
        expected = bert.embed(texts)
        assert len(tokenized) == len(texts)
        tokenized.clear()
        monkeypatch.setattr(texts_module, "KEPT_BYTES", 10 * (texts_module.ROW_BYTES + 8 * 7))
        np.testing.assert_array_equal(bert.embed(texts), expected)
        assert len(texts) + 30 < len(tokenized) <= 2 * len(texts) - 10


def test_a_batch_is_padded_to_its_own_longest() -> None:
    """By fours, up to the bundle's 7."""
    with load(KEPT / "bert-fp32", threads=1) as bert:
        shapes = []
        inner = bert._backends[0].run
        bert._backends[0].run = lambda feeds, outs: (shapes.append(feeds["input_ids"].shape), inner(feeds, outs))[1]
        bert.embed(["a b c d e", "a", "b", "a b c d"])
    assert shapes == [(2, 4), (2, 7)]


def test_answers_come_in_the_callers_order() -> None:
    texts, images = TEXTS[:23], IMAGES[:7]
    with load(KEPT / "bert-fp32", threads=1) as bert:
        np.testing.assert_allclose(bert.embed(texts), [bert.embed(text) for text in texts], atol=1e-6)
        assert [row[0][0] for row in bert.classify(texts)] == [bert.classify(text)[0][0] for text in texts]
    with load(KEPT / "vit-fp32", threads=1) as vit:
        np.testing.assert_allclose(vit.features(images), [vit.features(image) for image in images], atol=1e-6)
    with load(KEPT / "clip-fp32", threads=1) as clip:
        whole = clip.embed_labels(texts, ["{}", "a {}"]).embeds
        each = [clip.embed_labels([text], ["{}", "a {}"]).embeds[0] for text in texts]
        np.testing.assert_allclose(whole, each, atol=1e-6)


def test_many_labels_are_embedded_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from transom.runtime.tasks import clip as module

    with load(KEPT / "clip-fp32", threads=1) as clip:
        expected = clip.embed_labels(TEXTS[:9], ["{}", "a {}"])
        monkeypatch.setattr(module, "LABEL_TEXTS", 5)
        found = clip.embed_labels(TEXTS[:9], ["{}", "a {}"])
        np.testing.assert_allclose(found.embeds, expected.embeds, atol=1e-6)
        with pytest.raises(InputError, match=r"label 7 in template 0, '', has no tokens"):
            clip.embed_labels([*TEXTS[:7], ""], ["{}", "a {}"])


def test_errors_name_the_place_in_the_callers_list() -> None:
    with load(KEPT / "bert-fp32", threads=1) as bert:
        ran = []
        bert._backends[0].run = lambda *arguments: ran.append(arguments)
        with pytest.raises(InputError, match=r"text 4, '', has no tokens"):
            bert.embed(["a", "b", "a", "b", ""])
        with pytest.raises(InputError, match=r"pair 2, '', has no tokens"):
            bert.classify(["a"] * 3, ["b", "b", ""])
        assert not ran
    with load(KEPT / "vit-fp32", threads=1) as vit, pytest.raises(InputError, match=r"image 4 of 5: .*absent"):
        vit.classify([*IMAGES[:4], "absent.png"])


def test_batches_by_pencil() -> None:
    assert [places.tolist() for places in batches([5, 1, 3, 1, 9], 2)] == [[1, 3], [2, 0], [4]]
    assert [places.tolist() for places in batches([1] * 5, 3)] == [[0, 1, 2], [3, 4]]
    parts = [(np.array([1, 0]), np.float32([[10], [0]])), (np.array([2]), np.float32([[20]]))]
    assert collected(parts, 3).tolist() == [[0], [10], [20]]


def costs(groups: Iterable[Sequence[int]], lengths: Sequence[int]) -> float:
    """Return the cost of the groups of places, each padded to a multiple of 4."""
    return sum(
        float(batch_costs(len(group), -(-max(lengths[place] for place in group) // 4) * 4)[-1]) for group in groups
    )


def groupings(places: Sequence[int], most: int) -> Iterator[list[list[int]]]:
    """Yield every way to group the places into groups of at most ``most``."""
    if not places:
        yield []
        return
    for size in range(min(most, len(places))):
        for others in combinations(places[1:], size):
            left = [place for place in places[1:] if place not in others]
            for rest in groupings(left, most):
                yield [[places[0], *others], *rest]


@pytest.mark.parametrize("seed", range(8))
def test_no_other_grouping_costs_less(seed: int) -> None:
    """Of 7 rows there are 827 with at most 4 in a group."""
    lengths = np.random.default_rng(seed).integers(1, [9, 40, 300, 2000][seed % 4], 7).tolist()
    found = [places.tolist() for places in packed(lengths, 4, lambda length: -(-length // 4) * 4)]
    every = list(groupings(range(7), 4))
    assert len(every) == 827
    assert costs(found, lengths) == pytest.approx(min(costs(groups, lengths) for groups in every), rel=1e-12)
    assert sorted(place for group in found for place in group) == list(range(7))


def test_cuts_by_pencil() -> None:
    """A long text is alone, short ones are together."""
    assert batch_costs(2, 8).tolist() == [64 + 8 * (1 + 8 / 2048 + 8 / 16384), 64 + 16 * (1 + 8 / 2048 + 16 / 16384)]
    cut = [places.tolist() for places in packed([8, 200, 7, 8, 5, 600], 16, int)]
    assert cut == [[4, 2, 0, 3], [1], [5]]
    assert [places.tolist() for places in packed([3] * 5, 2, int)] == [[0], [1, 2], [3, 4]]
    assert list(packed([], 4, int)) == []


def test_a_gpu_gets_as_many_rows_as_fit() -> None:
    lengths = [1, 7, 2, 7, 1]
    with load(KEPT / "bert-fp32", threads=1) as bert:
        assert [places.tolist() for places in bert._batches(lengths)] == [[0], [4, 2], [1, 3]]
        bert.device = "cuda"
        assert [places.tolist() for places in bert._batches(lengths)] == [[0, 4], [2, 1], [3]]


def test_prompts_become_ids_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        prompts = [[1 + place % 9, 2] for place in range(7)]
        sizes, prefill = [], gpt.prefill
        monkeypatch.setattr(gpt, "prefill", lambda rows: (sizes.append(len(rows)), prefill(rows))[1])
        found = gpt.generate(prompts, max_new_tokens=3)
        assert sizes == [2, 2, 2, 1]
        assert found == [gpt.generate(prompt, max_new_tokens=3) for prompt in prompts]
        assert gpt.score(prompts) == [gpt.score(prompt) for prompt in prompts]


@pytest.mark.parametrize("asked", [{}, {"do_sample": True, "seed": 5, "num_return_sequences": 2}, {"num_beams": 2}])
def test_prompts_of_like_length_share_a_batch(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers, and what is drawn for each, stand at the prompts' own places."""
    prompts = [[1, 2, 3, 4], [5], [6, 7, 8], [2]]
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        read, prefill = [], gpt.prefill
        monkeypatch.setattr(gpt, "prefill", lambda rows: (read.append([len(row) for row in rows]), prefill(rows))[1])
        found = gpt.generate(prompts, max_new_tokens=3, **asked)
        assert [length for lengths in read for length in lengths] == [1, 1, 3, 4]
        assert found[:2] == gpt.generate(prompts[:2], max_new_tokens=3, **asked)
        if "seed" not in asked:
            assert found == [gpt.generate(prompt, max_new_tokens=3, **asked) for prompt in prompts]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([3], [[0]]),
        ([4, 4, 4], [[0, 1], [2]]),
        ([9, 1, 12, 2, 6, 1], [[0], [1], [2], [3, 4], [5]]),
        ([1] * 9, [[0, 1, 2, 3, 4, 5, 6, 7], [8]]),
    ],
)
def test_rows_without_padding_stay_in_order_up_to_so_many_tokens(lengths: list[int], expected: list[list[int]]) -> None:
    """At most 8 tokens together; a longer row is alone."""
    assert [places.tolist() for places in by_tokens(lengths, 8)] == expected
