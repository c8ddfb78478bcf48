"""Every family behind a real Triton: tasks, tensors and streams, bit for bit as the runtime answers here."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from paths import KEPT
from served_requests import request_for
from serving_engines import BUNDLES, expected, require_same, tensor_request
from time_limits import PATIENCE_S
from transom.runtime import load
from transom.runtime.serving.service import Service
from transom.runtime.serving.tasks import task_operation
from transom.runtime.serving.tensors import graph_operation
from transom.runtime.session import LoadedBundle
from triton_requests import PROTOCOLS, Triton

TOGETHER = 8


def model_of(bundle: LoadedBundle) -> str:
    return bundle._bundle.folder.name


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tasks(triton: Triton, kept: LoadedBundle, protocol: str) -> None:
    operation = task_operation(kept)
    for request in (request_for(operation, 0), request_for(operation, 1, rows=3)):
        require_same(triton.ask(protocol, model_of(kept), request), expected(operation, request), protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors(triton: Triton, kept: LoadedBundle, protocol: str) -> None:
    for file in kept.manifest.graphs:
        name = file.graph.name
        request = tensor_request(kept, name)
        wanted = expected(graph_operation(kept, name), request)
        require_same(triton.ask(protocol, f"{model_of(kept)}_{name}", request), wanted, f"{protocol}, {name}")


def test_streams(triton: Triton, kept: LoadedBundle) -> None:
    operation = task_operation(kept)
    if operation.stream is None:
        assert f"{model_of(kept)}_stream" not in triton.states()
        return
    request = request_for(operation, 0)
    pieces = triton.pieces(f"{model_of(kept)}_stream", request)
    wanted = list(Service(operation).stream(request))
    assert len(pieces) == len(wanted) > 1
    for number, (piece, other) in enumerate(zip(pieces, wanted, strict=True)):
        require_same(piece, other, f"piece {number}")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_together_are_answered_as_alone(triton: Triton, kept: LoadedBundle, protocol: str) -> None:
    """Eight callers at once, with texts of different lengths: fewer calls of the model than requests."""
    operation = task_operation(kept)
    requests = [request_for(operation, seed) for seed in range(TOGETHER)]
    wanted = [expected(operation, request) for request in requests]
    before = triton.statistics(model_of(kept))
    with ThreadPoolExecutor(TOGETHER) as pool:
        found = list(pool.map(lambda request: triton.ask(protocol, model_of(kept), request), requests))
    for answer, other in zip(found, wanted, strict=True):
        require_same(answer, other, protocol)
    assert calls_of_rows(triton, model_of(kept), before, TOGETHER) < TOGETHER


def calls_of_rows(triton: Triton, model: str, before: dict[str, Any], rows: int) -> int:
    """Return how many calls answered ``rows`` since ``before``; the server counts them after it has answered."""
    until = time.monotonic() + PATIENCE_S
    while True:
        now = triton.statistics(model)
        found, calls = (int(now[name]) - int(before[name]) for name in ("inference_count", "execution_count"))
        if found >= rows:
            assert found == rows
            return calls
        assert time.monotonic() < until, f"{found} of {rows} rows were counted"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["bert-int8", "gpt-int8", "vit-int8"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_integer_bundles(triton: Triton, name: str, protocol: str) -> None:
    with load(KEPT / name, threads=1) as bundle:
        operation = task_operation(bundle)
        request = request_for(operation, 1, rows=3)
        require_same(triton.ask(protocol, name, request), expected(operation, request), protocol)


def test_every_family_is_among_them() -> None:
    from transom.runtime.families import FAMILIES

    assert {path.name.split("-")[0] for path in BUNDLES} == set(FAMILIES)
