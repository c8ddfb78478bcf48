"""Ask examples/kserve_predictor.py with KServe's own clients: every family by both protocols, bit for bit."""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferenceGRPCClient
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelMetadataRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from kserve_requests import GRPC, HALF, REST, Running, infer_request, refusal
from paths import KEPT
from served_requests import task_or_none
from serving_engines import BUNDLES, SERVED, bytes_of, expected, require_same, task_requests, tensor_request
from transom.runtime import load
from transom.runtime.serving.service import Request
from transom.runtime.serving.tasks import task_operation
from transom.runtime.serving.tensors import graph_operation

TORN, TEXTS, TOKENS = "torn", "bert-fp32", "gpt-fp32"
THE = bytes_of(["the"])


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.name)
@pytest.mark.parametrize("protocol", [REST, GRPC])
def test_the_task_of_every_family_is_answered_as_by_the_runtime(running: Running, path: Path, protocol: str) -> None:
    with load(path, threads=1) as bundle:
        operation = task_or_none(bundle)
        if operation is None:
            assert not running.ready(protocol, path.name)
            return
        for request in task_requests(bundle, operation):
            wanted = expected(operation, request)
            require_same(running.infer(protocol, path.name, request), wanted, path.name)
            if protocol == REST and "image" not in request.inputs:
                require_same(running.infer(protocol, path.name, request, binary=False), wanted, f"{path.name} in JSON")


@pytest.mark.parametrize("path", [*BUNDLES, HALF], ids=lambda path: path.name)
@pytest.mark.parametrize("protocol", [REST, GRPC])
def test_the_tensors_of_every_graph_are_answered_as_by_the_runtime(running: Running, path: Path, protocol: str) -> None:
    with load(path, threads=1) as bundle:
        for file in bundle.manifest.graphs:
            name = file.graph.name
            request = tensor_request(bundle, name)
            wanted = expected(graph_operation(bundle, name), request)
            model = f"{path.name}_{name}"
            require_same(running.infer(protocol, model, request), wanted, model)
            if protocol == REST and path != HALF:
                require_same(running.infer(protocol, model, request, binary=False), wanted, f"{model} in JSON")


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("protocol", [REST, GRPC])
def test_the_reference_bundles_are_answered_as_by_the_runtime(
    references: Running, reference_bundles: Path, name: str, protocol: str
) -> None:
    with load(reference_bundles / name, threads=1) as bundle:
        operation = task_operation(bundle)
        for request in task_requests(bundle, operation):
            require_same(references.infer(protocol, name, request), expected(operation, request), name)


@pytest.mark.parametrize("protocol", [REST, GRPC])
def test_metadata_are_the_ports_of_the_operation(running: Running, protocol: str) -> None:
    assert metadata(running, protocol, TEXTS) == (
        [("text", "BYTES", [-1, 1]), ("pair", "BYTES", [-1, 1])],
        [("label", "BYTES", [-1, -1]), ("score", "FP32", [-1, -1])],
    )
    inputs, outputs = metadata(running, protocol, f"{TOKENS}_decoder")
    assert inputs[:2] == [("input_ids", "INT64", [-1, -1]), ("write_indices", "INT64", [-1])]
    assert outputs[0] == ("logits", "FP32", [-1, -1, 32])


def metadata(running: Running, protocol: str, model: str) -> tuple[list[Any], list[Any]]:
    if protocol == REST:
        found = httpx.get(f"{running.http}/v2/models/{model}").json()
        inputs, outputs = ([tuple(tensor.values()) for tensor in found[side]] for side in ("inputs", "outputs"))
    else:
        with grpc.insecure_channel(running.grpc) as channel:
            answer = GRPCInferenceServiceStub(channel).ModelMetadata(ModelMetadataRequest(name=model))
        inputs, outputs = (
            [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in side]
            for side in (answer.inputs, answer.outputs)
        )
    return inputs, outputs


@pytest.mark.parametrize("protocol", [REST, GRPC])
def test_the_outputs_that_are_asked_for_are_answered(running: Running, protocol: str) -> None:
    request = Request({"text": bytes_of(["the city"])}, {"top_k": 2})
    found = running.infer(protocol, TEXTS, request, outputs=("score",))
    assert {name: array.shape for name, array in found.items()} == {"score": (1, 2)}
    status, message = refusal(lambda: running.infer(protocol, TEXTS, request, outputs=("scores",)))
    assert status in (400, grpc.StatusCode.INVALID_ARGUMENT)
    assert message == "unknown output 'scores'; this model has label, score."


def test_parameters_without_a_type_of_grpc_are_texts(running: Running) -> None:
    """gRPC's parameters have no fractions and no lists: "0.5" is read as JSON."""
    inputs = {"input_ids": np.array([[3, 5]])}
    keywords: dict[str, Any] = {"do_sample": True, "temperature": 0.5, "seed": 7, "max_new_tokens": 3}
    wanted = running.infer(REST, TOKENS, Request(inputs, keywords))
    require_same(running.infer(GRPC, TOKENS, Request(inputs, keywords | {"temperature": "0.5"})), wanted, TOKENS)


def test_an_image_may_be_base64_in_json(running: Running) -> None:
    with load(KEPT / "vit-fp32", threads=1) as bundle:
        operation = task_operation(bundle)
        request = task_requests(bundle, operation)[0]
        wanted = expected(operation, request)
    encoded = Request({"image": bytes_of([base64.b64encode(request.inputs["image"][0, 0])])})
    require_same(running.infer(REST, "vit-fp32", encoded, binary=False, encoded=True), wanted, "vit-fp32")
    wrong = Request({"image": bytes_of(["no base64!"])})
    status, message = refusal(lambda: running.infer(REST, "vit-fp32", wrong, binary=False, encoded=True))
    assert (status, message) == (400, "the data of 'image' are not BYTES values of the shape [1, 1].")


def test_callers_at_the_same_time_get_their_own_answers(running: Running) -> None:
    with load(KEPT / TOKENS, threads=1) as bundle:
        operation = task_operation(bundle)
        requests = [Request({"input_ids": np.array([[1 + row, 2, 3]])}, {"max_new_tokens": 4}) for row in range(12)]
        wanted = [expected(operation, request) for request in requests]
    protocols = [REST, GRPC] * 6
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(running.infer, protocols, [TOKENS] * 12, requests))
    for answer, right in zip(found, wanted, strict=True):
        require_same(answer, right, TOKENS)


def test_a_caller_that_leaves_keeps_nobody_waiting(running: Running) -> None:
    async def leave() -> None:
        async with InferenceGRPCClient(running.grpc, retries=0) as client:
            asked = infer_request(TOKENS, Request({"input_ids": np.array([[1, 2, 3]])}, {"max_new_tokens": 9}))
            calls = [asyncio.create_task(client.infer(asked)) for _ in range(20)]
            await asyncio.sleep(0.01)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(leave())
    request = Request({"input_ids": np.array([[1, 2, 3]])}, {"max_new_tokens": 2})
    assert running.infer(GRPC, TOKENS, request)["generated_ids"].shape == (1, 1, 2)
