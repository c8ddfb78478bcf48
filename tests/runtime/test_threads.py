"""Threads that share a loaded bundle get the serial answers, to the bit; benchmarks/threads.py is the long run."""

from __future__ import annotations

import pytest

from mixed_requests import different_answers, requests, same
from transom.runtime import load


@pytest.mark.parametrize("name", ["bert", "clip", "dates", "gpt", "vit"])
def test_32_threads_of_every_family(name: str, request: pytest.FixtureRequest) -> None:
    with load(request.getfixturevalue(f"{name}_bundle"), threads=1) as model:
        assert different_answers(model, requests(model, count=25, seed=1), threads=32, each=4) == 0


def test_a_difference_would_be_seen(vit_bundle: object) -> None:
    with load(str(vit_bundle), threads=1) as vit:
        first, second, *_ = (request(vit) for request in requests(vit, count=2, seed=1))
    assert same(first, first)
    assert not same(first, second)
