"""The top-k against a full sort."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.runtime.numeric import token_log_probabilities, topk, topk_candidates


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 60),
    size=st.integers(1, 4000),
    seed=st.integers(0, 2**32 - 1),
    decimals=st.sampled_from([0, 1, 8]),
    ruled_out=st.floats(0, 1),
)
def test_topk_equals_a_full_sort(count: int, size: int, seed: int, decimals: int, ruled_out: float) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal(size).round(decimals).astype(np.float32)
    values[random.random(size) < ruled_out] = -np.inf
    count = min(count, size)
    assert topk(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()
    few = topk_candidates(values, count)
    assert len(few) >= count
    assert (np.diff(few) > 0).all()


def test_log_probabilities_of_tokens_are_those_of_float64() -> None:
    logits = np.array([[0, 0], [np.log(3), 0], [1e4, -1e4]], np.float32)
    found = token_log_probabilities(logits, np.array([1, 0, 1]))
    np.testing.assert_allclose(found, [-np.log(2), np.log(0.75), -2e4], rtol=1e-7)
    assert found.dtype == np.float64
