"""Serve bundles by KServe's Open Inference Protocol (v2), REST and gRPC: KServe's model server around the runtime.

    make export
    python examples/kserve_predictor.py bundles/minilm bundles/vit bundles/gpt
    curl localhost:8080/v2/models/minilm
    curl localhost:8080/v2/models/minilm/infer -H 'content-type: application/json' -d '{"inputs":
        [{"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": ["A man is eating.", "A cat sits."]}]}'
    curl localhost:8080/v2/models/gpt/infer -H 'content-type: application/json' -d '{"inputs":
        [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["It is a truth"]}],
        "parameters": {"max_new_tokens": 20}}'

A model is the task of a bundle, called as its folder: text or images in; vectors, labels or text out. --tensors serves
the tensors of its graphs beside it, as NAME_GRAPH. Requests that arrive while a call runs share the next one. Images
are the bytes of their files: binary in gRPC and behind the JSON of REST, base64 within it where the input has the
parameter "content_type": "base64". What a caller got wrong is answered with 400 (INVALID_ARGUMENT) and the runtime's
message, what is wrong on this side with 500 (INTERNAL) and no detail, which is in the log. A bundle that cannot be
loaded is not ready (503, UNAVAILABLE), and does not keep the others from being served.
Needs the runtime and kserve: `pip install '.[kserve]'`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import struct
import sys
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from grpc import aio
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER
from kserve.errors import InvalidInput, ModelNotReady, ServerNotReady
from kserve.model_server import app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.infer_type import deserialize_bytes_tensor, to_http_parameters
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v2_datamodels import InferenceRequest
from kserve.utils.numpy_codec import from_np_dtype, to_np_dtype
from starlette.responses import JSONResponse

from transom.runtime import load
from transom.runtime.errors import InputError, TransomError
from transom.runtime.serving.batches import Batches, BusyError
from transom.runtime.serving.operation import Operation
from transom.runtime.serving.ports import BYTES, Array, Port
from transom.runtime.serving.service import Request, Service
from transom.runtime.serving.tasks import task_operation
from transom.runtime.serving.tensors import WholeOperation, graph_operation
from transom.runtime.session import LoadedBundle

MAX_BODY_BYTES = 16 << 20
MAX_ROWS = 256  # of a request
OF_PROTOCOL = {"binary_data_output"}  # parameters of a request that are not the model's
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, struct.error)  # of what clients sent
SHUTDOWN_S = 5  # for calls to end by themselves

log = logging.getLogger("transom.kserve")


class Busy(ServerNotReady):
    """Too many requests wait, with the ``reason`` that gRPC's interceptor asks for."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.reason = str(self)


class NotServed(ModelNotReady):
    """A bundle that did not load, with the ``reason`` that gRPC's interceptor asks for."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "Its bundle could not be loaded; the server's log says why.")
        self.reason = str(self)


class Served(Model):
    """A model of KServe that answers by an operation; without one, a bundle that could not be loaded."""

    def __init__(self, name: str, operation: Operation | None, most: int = 1) -> None:
        super().__init__(name)
        self.operation = operation
        self.ready = operation is not None
        self.batches = None if operation is None else Batches(Service(operation), most)

    def load(self) -> bool:
        """Refuse: KServe calls this for a model that is not ready when a request comes by gRPC; its own sets ready."""
        raise NotServed(self.name)

    def get_input_types(self) -> list[dict[str, Any]]:
        return self._described(self.operation.inputs if self.operation else ())

    def get_output_types(self) -> list[dict[str, Any]]:
        return self._described(self.operation.outputs if self.operation else ())

    def _described(self, ports: Sequence[Port]) -> list[dict[str, Any]]:
        rows = [] if isinstance(self.operation, WholeOperation) else [-1]
        return [
            {
                "name": port.name,
                "datatype": "BYTES" if port.dtype == BYTES else from_np_dtype(np.dtype(port.dtype)),
                "shape": [*rows, *(-1 if size is None else size for size in port.shape)],
            }
            for port in ports
        ]

    async def predict(self, payload: Any, headers: Mapping[str, str] | None = None) -> InferResponse:
        """Answer a request of v2."""
        if self.batches is None or self.operation is None:
            raise NotServed(self.name)
        if not isinstance(payload, InferRequest):
            raise InvalidInput(f"this server speaks the v2 protocol; POST to /v2/models/{self.name}/infer.")
        wanted = [output.name for output in payload.request_outputs or ()]
        unknown = set(wanted) - {port.name for port in self.operation.outputs}
        if unknown:
            known = ", ".join(port.name for port in self.operation.outputs)
            raise InvalidInput(f"unknown output {min(unknown)!r:.60}; this model has {known}.")
        given = to_http_parameters(payload.parameters or {})
        parameters = {name: value for name, value in given.items() if name not in OF_PROTOCOL}
        try:
            answer = await self.batches.answer(Request(arrays_of(payload.inputs), parameters))
        except InputError as error:
            raise InvalidInput(str(error)) from None
        except BusyError as error:
            raise Busy(str(error)) from None
        except TransomError as error:
            log.error("%s: %s: %s", self.name, type(error).__name__, error)
            raise RuntimeError("the server cannot answer this; its log says why.") from None
        outputs = [
            InferOutput(name, list(array.shape), from_np_dtype(array.dtype), array)
            for name, array in answer.items()
            if not wanted or name in wanted
        ]
        if payload.from_grpc:  # KServe 0.21 asks an array that is left as it is whether it is true: always with float16
            for output in outputs:
                output.set_data_from_numpy(output.data, binary_data=True)
        return InferResponse(
            payload.id or str(uuid.uuid4()),
            self.name,
            outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


def arrays_of(inputs: Sequence[InferInput]) -> dict[str, Array]:
    """Return the arrays of a request; InvalidInput for data that does not fit its shape or datatype."""
    arrays: dict[str, Array] = {}
    for given in inputs:
        if given.name in arrays:
            raise InvalidInput(f"the input {given.name!r:.60} is there twice; send it once.")
        try:
            array = given.as_numpy()
            if isinstance(given.data, list) and given.data:
                check_kind(given.datatype, np.asarray(given.data))
            if (given.parameters or {}).get("content_type") == "base64":
                array = decoded(array)
        except InvalidInput:
            raise InvalidInput(f"{given.name!r:.60} has the datatype {given.datatype!r:.20}, which is none.") from None
        except MALFORMED:
            wanted = f"{given.datatype:.20} values of the shape {given.shape!s:.60}"
            raise InvalidInput(f"the data of {given.name!r:.60} are not {wanted}.") from None
        if array.shape[:1] > (MAX_ROWS,):
            raise InvalidInput(f"{given.name!r:.60} has {len(array)} rows; send at most {MAX_ROWS} in a request.")
        arrays[given.name] = array
    return arrays


def check_kind(datatype: str, data: Array) -> None:
    """Raise ValueError for JSON that numpy would cut or parse to make it fit: 1.5 for INT64, "1.5" for FP32."""
    kinds = {"BOOL": "b", "BYTES": "OSU"}.get(datatype, "iuf" if datatype.startswith("FP") else "iu")
    if data.dtype.kind not in kinds:
        raise ValueError(f"{data.dtype}")


def decoded(array: Array) -> Array:
    """Return the bytes that base64 stands for; ValueError for what is none."""
    found = np.empty(array.shape, object)
    for place, text in np.ndenumerate(array):
        found[place] = base64.b64decode(text, validate=True)
    return found


class Protocol(DataPlane):
    """KServe's, but for tensors behind the JSON of REST: KServe 0.21 reads bytes there as UTF-8, and images are not."""

    def decode_inference_request(self, body: Any, headers: Mapping[str, str], model_name: str) -> InferRequest:
        if not isinstance(body, bytes):
            return super().decode_inference_request(body, headers, model_name)
        try:
            length = int(headers.get(INFERENCE_CONTENT_LENGTH_HEADER, len(body)))
            return request_with_binary(body[:length], body[length:], model_name)
        except InvalidInput:
            raise
        except (*MALFORMED, RecursionError) as error:
            said = " ".join(str(error).split())
            raise InvalidInput(f"this is no request of the v2 protocol: {said:.200}") from None


def request_with_binary(head: bytes, rest: bytes, model: str) -> InferRequest:
    """Return the request of a JSON document and the binary tensors behind it."""
    document = json.loads(head)
    for entry in document["inputs"]:
        entry.setdefault("data", [])
    request = InferRequest.from_inference_request(InferenceRequest.model_validate(document), model)
    for given in request.inputs:
        size = given.parameters.get("binary_data_size")
        if size is None:
            continue
        if not 0 <= size <= len(rest):
            raise InvalidInput(f"{given.name!r:.60} has {size} bytes behind the JSON; {len(rest)} are left.")
        raw, rest = rest[:size], rest[size:]
        binary = given.datatype == "BYTES"
        given.data = deserialize_bytes_tensor(raw) if binary else np.frombuffer(raw, to_np_dtype(given.datatype))
    return request


class FixedModels(ModelRepositoryExtension):
    """Models that no request loads or unloads."""

    async def load(self, model_name: str) -> None:
        raise InvalidInput("the models of this server are those of its command line.")

    unload = load


class BoundedBodies:
    """ASGI middleware that refuses a body over MAX_BODY_BYTES, or of a length that is not said, before reading it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                await JSONResponse({"error": "send the body's content-length."}, 411)(scope, receive, send)
                return
            if int(length) > MAX_BODY_BYTES:
                error = f"the body has {int(length)} bytes; send at most {MAX_BODY_BYTES}."
                await JSONResponse({"error": error}, 413)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Grpc(GRPCServer):
    """KServe's gRPC server on one address."""

    def __init__(self, address: str, plane: DataPlane, models: ModelRepositoryExtension) -> None:
        super().__init__(0, plane, models, kwargs={}, grace_period=SHUTDOWN_S)
        self.address, self.servicer = address, InferenceServicer(plane, models)

    async def start(self, max_workers: int) -> None:
        options = [("grpc.max_receive_message_length", MAX_BODY_BYTES), ("grpc.max_send_message_length", -1)]
        self._server = aio.server(
            ThreadPoolExecutor(max_workers), interceptors=(ExceptionToStatusInterceptor(),), options=options
        )
        add_GRPCInferenceServiceServicer_to_server(self.servicer, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()
        await self._server.wait_for_termination()


class Server(ModelServer):
    """KServe's server on one address, where its own listens on every address of the machine."""

    def __init__(self, host: str, http_port: int, grpc_port: int) -> None:
        super().__init__(
            http_port=http_port, workers=1, enable_grpc=False, enable_latency_logging=False, grace_period=SHUTDOWN_S
        )
        self.host = host
        self.dataplane = Protocol(self.registered_models)
        self.model_repository_extension = FixedModels(self.registered_models)
        self.grpc_address = f"{host}:{grpc_port}"
        app.add_middleware(BoundedBodies)

    async def _serve(self) -> None:
        self._rest_server.config.host = self.host
        self._grpc_server = Grpc(self.grpc_address, self.dataplane, self.model_repository_extension)
        await asyncio.gather(*self.servers, self._grpc_server.start(1))


def bundle_folders(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the bundles among the paths, and in those that are folders of bundles, by the names of their folders.

    Raises InputError for a path that has none, and for two bundles of one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        folder = path.resolve()
        inside = sorted(manifest.parent for manifest in folder.glob("*/bundle.json"))
        bundles = [folder] if (folder / "bundle.json").exists() else inside
        if not bundles:
            raise InputError(f"{path} holds no bundle.json; expected a bundle or a folder of bundles.")
        for bundle in bundles:
            if found.setdefault(bundle.name, bundle) != bundle:
                raise InputError(
                    f"two bundles are called {bundle.name}: {found[bundle.name]} and {bundle}; rename one."
                )
    return found


def models_of(name: str, bundle: LoadedBundle, tensors: bool, most: int) -> list[Served]:
    """Return the models of a bundle: its task, and its graphs where ``tensors`` says so or it has no task."""
    models = []
    try:
        models.append(Served(name, task_operation(bundle), most))
    except InputError as error:
        log.warning("%s: %s", name, error)
        tensors = True
    if tensors:
        graphs = [file.graph.name for file in bundle.manifest.graphs]
        models += [Served(f"{name}_{graph}", graph_operation(bundle, graph), most) for graph in graphs]
    return models


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", help="bundles, or folders of bundles")
    parser.add_argument("--tensors", action="store_true", help="serve the tensors of each graph, too, as NAME_GRAPH")
    parser.add_argument("--model_name", help="what the one bundle is called, in place of its folder's name")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "tensorrt", "auto"])
    parser.add_argument("--threads", type=int, default=1, help="of a call; default: 1")
    parser.add_argument("--max_batch", type=int, default=32, help="requests that share a call; default: 32")
    parser.add_argument("--host", default="127.0.0.1", help="there is no authentication: think before you open it")
    parser.add_argument("--http_port", type=int, default=8080)
    parser.add_argument("--grpc_port", type=int, default=8081)
    options = parser.parse_args()
    try:
        folders = bundle_folders(options.bundles)
        if options.model_name and len(folders) > 1:
            raise InputError(f"--model_name names one bundle, and there are {len(folders)}: {', '.join(folders)}.")
    except InputError as error:
        print(f"kserve_predictor: {error}", file=sys.stderr)
        return 1
    if options.model_name:
        folders = dict.fromkeys([options.model_name], *folders.values())
    server = Server(options.host, options.http_port, options.grpc_port)
    with ExitStack() as stack:
        models: list[Served] = []
        for name, folder in folders.items():
            try:
                bundle = stack.enter_context(load(folder, device=options.device, threads=options.threads))
                models += models_of(name, bundle, options.tensors, options.max_batch)
            except TransomError as error:
                print(f"kserve_predictor: {name} is not served: {error}", file=sys.stderr, flush=True)
                broken = Served(name, None)
                server.register_model(broken)  # KServe itself registers those that are ready
        if not models:
            print("kserve_predictor: no bundle could be loaded.", file=sys.stderr)
            return 1
        server.start(models)
    return 0


if __name__ == "__main__":
    sys.exit(main())
