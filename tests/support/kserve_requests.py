"""Ask KServe's server with its own clients, and read what they say. Needs kserve, in the environment of its tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from kserve.utils.numpy_codec import from_np_dtype

from paths import KEPT
from serving_engines import Array, example, free_port
from time_limits import PATIENCE_S
from transom.runtime.serving.service import Request

REST, GRPC = "REST", "gRPC"
HALF = KEPT / "gpt-fp16"  # its tensors are float16, which v2 has in binary alone


@dataclass(frozen=True)
class Running:
    """A server: its addresses, and its log."""

    http: str
    grpc: str
    log: Path

    @classmethod
    def command(cls, log: Path, *arguments: str | Path) -> tuple[Running, list[str]]:
        """Return a server on free ports, and the command that starts it."""
        http, rpc = free_port(), free_port()
        command = example("kserve_predictor.py", *arguments, "--http_port", http, "--grpc_port", rpc)
        return cls(f"http://127.0.0.1:{http}", f"127.0.0.1:{rpc}", log), command

    def infer(self, protocol: str, model: str, request: Request, **how: Any) -> dict[str, Array]:
        """Ask with KServe's client; ``how`` are ``binary``, which is False for a JSON body, and ``outputs``."""
        asked = infer_request(model, request, **how)
        return asyncio.run(self._rest(model, asked) if protocol == REST else self._grpc(asked))

    async def _rest(self, model: str, request: InferRequest) -> dict[str, Array]:
        client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=PATIENCE_S))
        try:
            response: Any = await client.infer(self.http, request, model_name=model)
        finally:
            await client.close()
        return {output.name: as_bytes(output.as_numpy()) for output in response.outputs}

    async def _grpc(self, request: InferRequest) -> dict[str, Array]:
        async with InferenceGRPCClient(self.grpc, timeout=PATIENCE_S, retries=0) as client:
            response = await client.infer(request)
        return {output.name: output.as_numpy() for output in response.outputs}

    def post(self, path: str, body: object, **headers: str) -> tuple[int, str]:
        """Send a body, bytes or a document, without KServe's client; return the status and the error."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        found = httpx.post(self.http + path, content=content, headers=names, timeout=PATIENCE_S)
        return found.status_code, found.json().get("error", found.text)

    def ready(self, protocol: str, model: str) -> bool:
        return asyncio.run(self._ready(protocol, model))

    async def _ready(self, protocol: str, model: str) -> bool:
        if protocol == GRPC:
            async with InferenceGRPCClient(self.grpc, retries=0) as client:
                return bool(await client.is_model_ready(model))
        rest = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
        try:
            return bool(await rest.is_model_ready(self.http, model))
        finally:
            await rest.close()


def refusal(ask: Callable[[], object]) -> tuple[object, str]:
    """Return the status of a request that is refused, and its message."""
    try:
        ask()
    except httpx.HTTPStatusError as error:
        return error.response.status_code, json.loads(error.response.content)["error"]
    except grpc.aio.AioRpcError as error:
        return error.code(), str(error.details())
    pytest.fail("it was answered")


def as_bytes(array: Array) -> Array:
    """Return texts of JSON as bytes; other arrays as they are."""
    if array.dtype != object:
        return array
    return np.vectorize(lambda value: value.encode() if isinstance(value, str) else value, otypes=[object])(array)


def infer_request(
    model: str, request: Request, *, binary: bool = True, outputs: tuple[str, ...] = (), encoded: bool = False
) -> InferRequest:
    inputs = []
    for name, array in request.inputs.items():
        parameters = {"content_type": "base64"} if encoded else None
        given = InferInput(name, list(array.shape), str(from_np_dtype(array.dtype)), parameters=parameters)
        given.set_data_from_numpy(array, binary_data=binary)
        inputs.append(given)
    asked = [RequestedOutput(name, {"binary_data": binary}) for name in outputs]
    parameters = {**request.parameters, "binary_data_output": binary}
    return InferRequest(model, inputs, request_id="1", parameters=parameters, request_outputs=asked or None)
