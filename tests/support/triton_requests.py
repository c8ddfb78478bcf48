"""Ask a running Triton Inference Server over HTTP and gRPC, by its own clients. Needs tritonclient[http,grpc]."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import np_to_triton_dtype

from serving_engines import Array, example, free_port, server
from time_limits import PATIENCE_S
from transom.runtime.serving.service import Request

PROTOCOLS = ("http", "grpc")
LIBRARIES: Mapping[str, Any] = {"http": tritonclient.http, "grpc": tritonclient.grpc}


class Triton:
    """A running server and clients of it. A client belongs to one thread: each call makes its own."""

    process: subprocess.Popen[bytes]  # of examples/triton_server.py

    def __init__(self, ports: Mapping[str, int], log: Path) -> None:
        self.log = log
        self.addresses = {protocol: f"127.0.0.1:{port}" for protocol, port in ports.items()}

    def ask(self, protocol: str, model: str, request: Request) -> dict[str, Array]:
        """Return the arrays of the answer; raises InferenceServerException."""
        library = LIBRARIES[protocol]
        with library.InferenceServerClient(self.addresses[protocol]) as client:
            found = client.infer(model, tensors(library, request), parameters=dict(request.parameters) or None)
            response = found.get_response()
            names = (
                [output["name"] for output in response["outputs"]]
                if protocol == "http"
                else [output.name for output in response.outputs]
            )
            return {name: found.as_numpy(name) for name in names}

    def pieces(self, model: str, request: Request) -> list[dict[str, Array]]:
        """Return the pieces of a streamed answer over gRPC, to its end."""
        with self.stream(model, request) as stream:
            return list(stream)

    @contextmanager
    def stream(self, model: str, request: Request) -> Iterator[Iterator[dict[str, Array]]]:
        """Begin a streamed answer over gRPC; leaving early leaves the server, too."""
        arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        with tritonclient.grpc.InferenceServerClient(self.addresses["grpc"]) as client:
            client.start_stream(lambda result, error: arrived.put((result, error)))
            client.async_stream_infer(
                model,
                tensors(tritonclient.grpc, request),
                parameters=dict(request.parameters) or None,
                enable_empty_final_response=True,
            )
            try:
                yield pieces_of(arrived)
            finally:
                client.stop_stream(cancel_requests=True)

    def generate_stream(self, model: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the events of Triton's own streaming over HTTP."""
        with self.open_generate_stream(model, body) as answer:
            lines = [line.decode().strip() for line in answer]
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]

    def open_generate_stream(self, model: str, body: Mapping[str, Any]) -> Any:
        """Return the response of Triton's own streaming over HTTP, as ``urlopen`` does."""
        url = f"http://{self.addresses['http']}/v2/models/{model}/generate_stream"
        return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=PATIENCE_S)

    def states(self) -> dict[str, tuple[str, str]]:
        """Return the state of each model, and the reason of one that was not loaded."""
        with tritonclient.http.InferenceServerClient(self.addresses["http"]) as client:
            found = client.get_model_repository_index()
        return {model["name"]: (model.get("state", ""), model.get("reason", "")) for model in found}

    def statistics(self, model: str) -> dict[str, Any]:
        with tritonclient.http.InferenceServerClient(self.addresses["http"]) as client:
            (found,) = client.get_inference_statistics(model)["model_stats"]
        return dict(found)

    def left(self, model: str) -> list[int]:
        """Return how many pieces were sent of each stream that its client left, as the server's log has them."""
        found = re.findall(rf"\b{model}: the client left after (\d+) pieces", self.log.read_text("utf-8", "replace"))
        return [int(pieces) for pieces in found]

    def live(self) -> bool:
        with tritonclient.http.InferenceServerClient(self.addresses["http"]) as client:
            return bool(client.is_server_live())


def tensors(library: Any, request: Request) -> list[Any]:
    """Return a request's arrays as inputs of a client library."""
    found = []
    for name, array in request.inputs.items():
        tensor = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        found.append(tensor)
    return found


def pieces_of(arrived: queue.Queue[tuple[Any, Any]]) -> Iterator[dict[str, Array]]:
    while True:
        result, error = arrived.get(timeout=PATIENCE_S)
        if error is not None:
            raise error
        response = result.get_response()
        if response.outputs:
            yield {output.name: result.as_numpy(output.name) for output in response.outputs}
        if response.parameters["triton_final_response"].bool_param:
            return


@contextmanager
def running(*repositories: Path, log: Path) -> Iterator[Triton]:
    """Run the server of examples/triton_server.py on free ports until the end of the block."""
    ports = {"http": free_port(), "grpc": free_port(), "metrics": free_port()}
    options = [word for name, port in ports.items() for word in (f"--{name}-port", port)]
    triton = Triton(ports, log)
    with server(example("triton_server.py", *repositories, *options), triton.live, log) as triton.process:
        yield triton
