"""What the tests of tests/serving share: requests, the runtime's own answers, servers that are started and stopped.

No torch, no onnx: these run in the environments of the engines, which `make serving-env` makes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paths import FP32, REPO
from served_requests import of_bytes, request_for
from served_requests import png as random_png
from transom.runtime.graph_spec import shape_of
from transom.runtime.serving.operation import Operation
from transom.runtime.serving.service import Request, Service
from transom.runtime.session import LoadedBundle

BUNDLES = FP32  # a small one of every family
REFERENCES = Path(os.environ.get("TRANSOM_SERVING_BUNDLES") or REPO / "bundles")  # of `make test-serving`
SERVED = ("minilm", "gpt", "vit", "clip", "transformer", "show_attend_tell", "flamingo")  # the Makefile's
START_S = 120  # for a server that is ready after some seconds, on a machine several times as busy as ours
STOP_S = 30
SIZES = {"B": 2, "S": 3, "T": 1, "C": 4, "P": 1, "I": 1, "G": 2}  # of the axes of raw tensors

Array = NDArray[Any]


def bytes_of(*rows: Sequence[str | bytes]) -> Array:
    """Return a tensor of bytes (rows, values)."""
    return of_bytes([[value.encode() if isinstance(value, str) else value for value in row] for row in rows])


def png(seed: int) -> bytes:
    """Return the file of a random image."""
    return random_png(np.random.default_rng(seed))


def task_requests(bundle: LoadedBundle, operation: Operation) -> list[Request]:
    """Return requests for the operation of a bundle's task: a row, another one, and more than a small bundle's B."""
    rows = min(bundle.max_size("B") + 1, 3)
    return [request_for(operation, 0), request_for(operation, 1), request_for(operation, 2, rows=rows)]


def tensor_request(bundle: LoadedBundle, name: str) -> Request:
    """Return a request of random tensors for a graph, those of its state among them."""
    random = np.random.default_rng(0)
    graph, axes = bundle.backend(name).graph, bundle.axes
    sizes = {axis: min(SIZES.get(axis, 1), axes[axis].max) for axis in axes}
    inputs: dict[str, Array] = {}
    for tensor in graph.inputs:
        if tensor.state:
            inputs[tensor.name] = random.standard_normal(shape_of(tensor, sizes)).astype(tensor.dtype)
        elif tensor.default is None and tensor.dtype == "int64":
            inputs[tensor.name] = random.integers(1, tensor.exclusive_max or 9, shape_of(tensor, sizes))
        elif tensor.default is None:
            inputs[tensor.name] = random.standard_normal(shape_of(tensor, sizes)).astype(np.float32)
    return Request(inputs)


def expected(operation: Operation, request: Request) -> dict[str, Array]:
    """Return the runtime's own answer to a request, in this environment."""
    (answer,) = Service(operation).answer([request])
    if isinstance(answer, Exception):
        raise answer
    return answer


def require_same(found: Mapping[str, Array], wanted: Mapping[str, Array], what: str) -> None:
    """Fail unless the arrays are the same bit for bit."""
    assert sorted(found) == sorted(wanted), what
    for name, array in wanted.items():
        assert found[name].shape == array.shape, f"{what}: {name}"
        if array.dtype == object:
            assert found[name].tolist() == array.tolist(), f"{what}: {name}"
        else:
            assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes()), f"{what}: {name}"


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def example(name: str, *arguments: str | Path | int) -> list[str]:
    """Return the command that runs a file of examples/ in this environment."""
    return [sys.executable, str(REPO / "examples" / name), *map(str, arguments)]


@contextmanager
def server(
    command: Sequence[str], ready: Callable[[], bool], log: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server in a session of its own, wait until it is ready, and stop it and what it started at the end.

    Fails with the end of the log where the server ends by itself or is not ready after START_S.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        await_ready(process, ready, log)
        yield process
    finally:
        stop(process)


def await_ready(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path) -> None:
    until = time.monotonic() + START_S
    while not is_ready(ready):
        ended = process.poll()
        late = time.monotonic() > until
        said = log.read_text("utf-8", "replace")[-4000:]
        assert ended is None, f"{process.args} ended with {ended}:\n{said}"
        assert not late, f"{process.args} is not ready after {START_S} s:\n{said}"
        time.sleep(0.1)


def is_ready(ready: Callable[[], bool]) -> bool:
    """Return what ``ready`` says; False while nothing answers."""
    try:
        return ready()
    except Exception:  # each client has its own for a connection that is refused
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server by SIGTERM, and what is left of its session after STOP_S by SIGKILL."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
