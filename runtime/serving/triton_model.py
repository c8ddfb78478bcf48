"""Serve a bundle as a model of Triton Inference Server: the Python backend around a service.

`transom repository` writes the model's folder, whose model.py imports TritonPythonModel. Triton starts a process for
each instance of a model; its library, triton_python_backend_utils, exists only there.
"""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from transom.runtime.bundle import regular_file
from transom.runtime.disk_cache import our_version
from transom.runtime.errors import BundleError, InputError, TransomError
from transom.runtime.host import usable_cores
from transom.runtime.loading import load
from transom.runtime.manifest import MANIFEST
from transom.runtime.serving.ports import Array
from transom.runtime.serving.service import Request, Service
from transom.runtime.serving.tasks import task_operation
from transom.runtime.serving.tensors import graph_operation

STREAM, TENSORS = "stream", "tensors"
KINDS = ("task", STREAM, TENSORS)
OF_THE_PROTOCOL = "triton_"  # prefix of parameters that clients' libraries add: triton_enable_empty_final_response
UNKNOWN = "unknown"  # version of a Transom that is no installed package
FAILED = "the model failed at this request, which is not the request's fault; the server's log has the reason."


@dataclass(frozen=True)
class Settings:
    """The parameters of a model in its config.pbtxt, by their names there."""

    bundle: Path
    bundle_sha256: str  # of its bundle.json, which has the hashes of the other files
    runtime_version: str  # of the Transom that wrote the model; "" where that had none
    kind: str
    graph: str  # of kind "tensors"
    device: str
    threads: int
    streams: int  # answers that an instance of kind "stream" generates at once


class TritonPythonModel:
    """One instance of a model. Triton calls it from one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle; TritonModelException, with the runtime's message, where it cannot be served."""
        self.library: Any = import_module("triton_python_backend_utils")
        self.name = args["model_name"]
        self.pool: ThreadPoolExecutor | None = None
        try:
            settings = settings_of(args)
            self.bundle = opened(settings)
            self.service = service_of(self.bundle, settings)
        except TransomError as error:
            raise self.library.TritonModelException(str(error)) from None
        if settings.kind == STREAM:
            self.pool = ThreadPoolExecutor(settings.streams)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Return a response to each request; None of a model that streams, whose threads send them."""
        if self.pool is None:
            return [self.response(answer) for answer in self.answers(requests)]
        for request in requests:
            self.pool.submit(self.send, request_of(request, copies=True), request.get_response_sender())
        return None

    def answers(self, requests: Sequence[Any]) -> list[dict[str, Array] | Exception]:
        """Return the arrays of each request's answer, or its error."""
        try:
            return [*self.service.answer([request_of(request) for request in requests])]
        except Exception as error:
            return [error] * len(requests)

    def send(self, request: Request, sender: Any) -> None:
        """Send an answer in pieces, until its end or until the client is gone, then the flag of the last response."""
        sent, final = 0, self.library.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            with closing(self.service.stream(request)) as pieces:  # frees its cache
                for piece in until(sender.is_cancelled, pieces):
                    sender.send(self.response(piece))
                    sent += 1
            if sender.is_cancelled():
                self.library.Logger.log_info(f"{self.name}: the client left after {sent} pieces")
            sender.send(flags=final)
        except Exception as error:
            sender.send(self.response(error), flags=final)

    def response(self, answer: Mapping[str, Array] | Exception) -> Any:
        """Return arrays as a response of Triton; an error too, with its message where it is the request's."""
        if not isinstance(answer, Exception):
            tensors = [self.library.Tensor(name, array) for name, array in answer.items()]
            return self.library.InferenceResponse(output_tensors=tensors)
        errors = self.library.TritonError
        if isinstance(answer, InputError):
            return self.library.InferenceResponse(error=errors(str(answer), errors.INVALID_ARG))
        self.library.Logger.log_error("".join(traceback.format_exception(answer)))
        return self.library.InferenceResponse(error=errors(FAILED, errors.INTERNAL))

    def finalize(self) -> None:
        """Wait for answers that are being sent, and close the bundle."""
        if self.pool is not None:
            self.pool.shutdown()
        self.bundle.close()


def settings_of(args: Mapping[str, str]) -> Settings:
    """Return the settings of a model from the arguments of ``initialize``; BundleError where config.pbtxt lacks one."""
    parameters = json.loads(args["model_config"]).get("parameters", {})
    values = {name: value["string_value"] for name, value in parameters.items()}
    folder = Path(args["model_repository"])  # of this model alone, whatever the key says
    try:
        kind = values["kind"]
        instances = int(values["instances"])
        threads = int(values["threads"]) if "threads" in values else max(1, usable_cores() // instances)
        streams = int(values["streams"]) if kind == STREAM else 1
        if kind not in KINDS or threads < 1 or streams < 1:
            raise ValueError
        return Settings(
            folder / args["model_version"] / values["bundle"],
            values["bundle_sha256"],
            values.get("runtime_version", ""),
            kind,
            values["graph"] if kind == TENSORS else "",
            values["device"],
            threads,
            streams,
        )
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise BundleError(
            f"the parameters of {folder / 'config.pbtxt'} are not those that this Transom reads ({error!r:.60}); "
            "write the model again with `transom repository`."
        ) from None


def opened(settings: Settings) -> Any:
    """Load the bundle of a model; BundleError for another than was put there, and for one of a newer Transom."""
    here = our_version()
    if here != UNKNOWN and release(here) < release(settings.runtime_version):
        raise BundleError(
            f"this model was written by Transom {settings.runtime_version}, and here is {here}. "
            "Upgrade with `pip install --upgrade transom`, or write the model again with `transom repository`."
        )
    found = hashlib.sha256(regular_file(settings.bundle, MANIFEST).read_bytes()).hexdigest()
    if found != settings.bundle_sha256:
        raise BundleError(
            f"{settings.bundle / MANIFEST} does not have the SHA-256 that config.pbtxt says; "
            "write the model again with `transom repository`."
        )
    return load(settings.bundle, settings.device, settings.threads)


def release(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: (1, 2, 0) of 1.2.0rc1."""
    return tuple(int(number) for number in re.findall(r"(?:^|(?<=\.))\d+", version.split("+")[0]))


def service_of(bundle: Any, settings: Settings) -> Service:
    """Return the service of a model's kind: of the bundle's task, in one piece or several, or of a graph's tensors."""
    return Service(graph_operation(bundle, settings.graph) if settings.kind == TENSORS else task_operation(bundle))


def request_of(request: Any, *, copies: bool = False) -> Request:
    """Return a request of Triton's as the service takes it.

    Its arrays are views of memory that Triton uses again after ``execute``, so ``copies`` for what is read later.
    """
    arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    return Request(
        {name: np.array(array) for name, array in arrays.items()} if copies else arrays,
        parameters_of(request.parameters()),
    )


def parameters_of(text: str) -> dict[str, Any]:
    """Return the parameters of a request from Triton's JSON, without those of the protocol itself."""
    return {name: value for name, value in json.loads(text or "{}").items() if not name.startswith(OF_THE_PROTOCOL)}


def until(gone: Any, pieces: Iterator[Any]) -> Iterator[Any]:
    """Yield pieces until there are no more or ``gone()`` says so, which is asked before each is made."""
    while not gone():
        try:
            yield next(pieces)
        except StopIteration:
            return
