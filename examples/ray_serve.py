"""Serve bundles with Ray Serve: replicas by the number of requests, batches of several callers, streams over HTTP.

    python examples/ray_serve.py bundles/minilm bundles/gpt --port 8000 --max-replicas 2
    curl localhost:8000/minilm                                             what it takes and answers
    curl localhost:8000/minilm -d '{"inputs": {"text": ["A man is eating.", "Someone has lunch."]}}'
    curl localhost:8000/gpt -d '{"inputs": {"text": ["It is a truth"]}, "parameters": {"max_new_tokens": 30}}'
    curl -N localhost:8000/gpt/stream -d '{"inputs": {"text": ["It is a truth"]}}'

Every bundle is a deployment called as its folder. An input has a value for each row of the request: a text; for images
the file in base64; a list where a row has several. Rows of requests that wait together are answered in one call, up to
--max-batch requests. A stream is server-sent events: data: {"generated_text": ...}, then event: done, or event: error;
a caller that leaves ends its generation.

What a caller got wrong is answered with status 422 and the runtime's message (400 for what is no JSON, 413 for too
much of it, 404 for another path), what is wrong on this side with 500 and no detail, and a full queue with 503.
Ray itself stays on the loopback address, for as long as this runs, and sends nothing. It needs
`pip install 'transom[ray]'`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

# Before Ray is imported: no usage data, and a secret for this run where Ray would keep one in the home folder
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # elsewhere too: this keeps Ray on the loopback address

import ray
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from transom.runtime import load
from transom.runtime.errors import InputError, TransomError, one_line
from transom.runtime.serving.ports import BYTES, Array, Port
from transom.runtime.serving.service import Request, Service
from transom.runtime.serving.tasks import task_operation

LOOPBACK = "127.0.0.1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_BODY_BYTES = 16 << 20
MAX_QUEUED = 1000  # requests that wait for a replica; more are answered with 503
OBJECT_STORE_BYTES = 256 << 20

log = logging.getLogger("ray.serve")


class Malformed(Exception):
    """A body that is no request at all, and its status."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def request_of(ports: Sequence[Port], body: bytes) -> Request:
    """Return the request that a body of JSON is; Malformed, or InputError for values that are no arrays."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise Malformed(400, 'the body is no JSON; send {"inputs": {...}}.') from None
    if not isinstance(found, dict) or not isinstance(found.get("inputs"), dict):
        raise Malformed(422, 'the body has no object "inputs"; send {"inputs": {...}}.')
    unknown = [name for name in found if name not in ("inputs", "parameters")]
    parameters = found.get("parameters", {})
    if unknown or not isinstance(parameters, dict):
        what = f"an unknown {unknown[0]!r:.60}" if unknown else 'a "parameters" that is no object'
        raise Malformed(422, f'the body has {what}; send {{"inputs": {{...}}, "parameters": {{...}}}}.')
    known = {port.name: port for port in ports}
    inputs = {
        name: array_of(known[name], values) if name in known else np.empty(0)  # the service says which there are
        for name, values in found["inputs"].items()
    }
    return Request(inputs, parameters)


def array_of(port: Port, values: Any) -> Array:
    """Return the array of an input from its JSON, a list with a value for each row; InputError where it is none."""
    if not isinstance(values, list) or not values:
        raise InputError(f"{port.name} is no list; expected one value for each row.")
    if port.dtype == BYTES:
        rows = [row if isinstance(row, list) else [row] for row in values]
        if len({len(row) for row in rows}) > 1:
            raise InputError(f"rows of {port.name} have different numbers of values; send a request for each.")
        array = np.empty((len(rows), len(rows[0])), object)
        for place, row in enumerate(rows):
            array[place] = row if port.text else [from_base64(port, value) for value in row]
        return array
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"rows of {port.name} have different numbers of values; send a request for each.") from None
    if array.dtype.kind in "iu" and np.dtype(port.dtype).kind in "iuf":
        return array.astype(port.dtype)
    return array.astype(port.dtype) if array.dtype.kind == "f" == np.dtype(port.dtype).kind else array


def from_base64(port: Port, value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise InputError(f"{port.name} holds what is no base64; send the bytes of the file in base64.") from None


def json_of(ports: Sequence[Port], arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Return the arrays of an answer as JSON: a value for each row, a list where it has several."""
    found: dict[str, Any] = {}
    for port in ports:
        rows = arrays[port.name].tolist()
        if port.dtype == BYTES:
            rows = [[text.decode() for text in row] for row in rows]
        found[port.name] = [row[0] for row in rows] if port.shape == (1,) else rows
    return found


def signature(port: Port) -> dict[str, Any]:
    kind = port.dtype if port.dtype != BYTES else "text" if port.text else "base64"
    return {"name": port.name, "type": kind, "shape": list(port.shape), "optional": port.optional}


@serve.deployment(max_queued_requests=MAX_QUEUED)
class Served:
    """A replica: a loaded bundle. It is asked over HTTP."""

    def __init__(self, bundle: str, device: str, threads: int, max_batch: int, wait_s: float) -> None:
        keep_inside()
        self.bundle = load(bundle, device=device, threads=threads)
        self.service = Service(task_operation(self.bundle))
        self.streams = 0  # that are generating
        self.answered.set_max_batch_size(max_batch)
        self.answered.set_batch_wait_timeout_s(wait_s)

    @serve.batch
    async def answered(self, requests: list[Request]) -> list[dict[str, Array] | InputError]:
        """Answer requests that wait together; others gather meanwhile, since it runs in a thread."""
        return await asyncio.to_thread(self.service.answer, requests)

    async def __call__(self, http: HttpRequest) -> Response:
        operation = self.service.operation
        path = http.url.path.removeprefix(http.scope.get("root_path", "")).strip("/")
        if path not in ("", "stream"):
            return problem(404, "there is no such path here; GET or POST the bundle, or POST its /stream.")
        if http.method == "GET" and path == "":
            return JSONResponse(self.described())
        if http.method != "POST":
            return problem(405, "send a POST.")
        try:
            request = request_of(operation.inputs, await body_of(http))
            if path == "stream":
                pieces = await asyncio.to_thread(self.service.stream, request)  # checks everything
                return StreamingResponse(
                    self.events(pieces), media_type="text/event-stream", headers={"cache-control": "no-store"}
                )
            answer = await self.answered(request)
            if isinstance(answer, InputError):
                raise answer
            return JSONResponse({"outputs": json_of(operation.outputs, answer)})
        except InputError as error:
            return problem(422, str(error))
        except Malformed as error:
            return problem(error.status, str(error))
        except TransomError as error:  # names files and devices of this machine
            log.error("%s: %s", type(error).__name__, error)
            return problem(500, "the server cannot answer this; its log says why.")

    def described(self) -> dict[str, Any]:
        operation, manifest = self.service.operation, self.bundle.manifest
        return {
            "family": manifest.family,
            "task": manifest.task,
            "precision": manifest.precision,
            "inputs": [signature(port) for port in operation.inputs],
            "outputs": [signature(port) for port in operation.outputs],
            "parameters": sorted(operation.parameters),
            "streams": operation.stream is not None,
            "replica": {"pid": os.getpid(), "streaming": self.streams},
        }

    async def events(self, pieces: Iterator[dict[str, Array]]) -> AsyncIterator[str]:
        """Yield pieces as events; when the caller leaves, no more are made and the generation's cache is freed."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()
        gone = threading.Event()

        def put(kind: str, data: Any) -> None:
            with suppress(RuntimeError):  # of a loop that is closed: the replica stops
                loop.call_soon_threadsafe(queue.put_nowait, (kind, data))

        def generate() -> None:
            try:
                for piece in pieces:
                    if gone.is_set():
                        return
                    put("message", {name: rows[0] for name, rows in json_of(outputs, piece).items()})
                put("done", {})
            except InputError as error:
                put("error", {"detail": str(error)})
            except Exception as error:
                log.error("%s: %s", type(error).__name__, error)
                put("error", {"detail": "the generation failed; the server's log says why."})
            finally:
                pieces.close()  # type: ignore[attr-defined]  # a generator
                loop.call_soon_threadsafe(self.ended)

        outputs = self.service.operation.outputs
        self.streams += 1
        threading.Thread(target=generate, daemon=True).start()
        try:
            kind = "message"
            while kind == "message":
                kind, data = await queue.get()
                yield f"event: {kind}\ndata: {json.dumps(data)}\n\n"
        finally:
            gone.set()

    def ended(self) -> None:
        self.streams -= 1


def keep_inside() -> None:
    """Have the server by which Ray Serve reaches this replica listen on the loopback address: it has no setting."""
    from ray.serve._private import replica

    add: Any = getattr(replica, "add_port_to_grpc_server", None)
    if add is not None:
        replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", LOOPBACK))


async def body_of(http: HttpRequest) -> bytes:
    """Return the body; Malformed for one that is too long, before all of it is read."""
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise Malformed(413, f"the body is longer than {MAX_BODY_BYTES} bytes.")
    return bytes(body)


def problem(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status)


def checked(bundles: Sequence[Path]) -> dict[str, Path]:
    """Return the bundles by name, each tried; TransomError for one that cannot be served, or two of one name."""
    found: dict[str, Path] = {}
    for path in bundles:
        name = path.resolve().name
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r} cannot be part of a URL; rename the folder: letters, digits, '.', '_', '-'.")
        if name in found:
            raise InputError(f"{found[name]} and {path} are both called {name}; rename one of the folders.")
        with load(path, threads=1) as bundle:
            task_operation(bundle)
        found[name] = path
    return found


def check_port(host: str, port: int) -> None:
    """Raise InputError for an address that cannot be had, which Ray would try again and again."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"{host}:{port} cannot be used: {one_line(error)}. Give another --port.") from None


def start(bundles: Mapping[str, Path], options: argparse.Namespace, folder: str) -> None:
    """Start Ray and Serve, and deploy the bundles; returns when they answer."""
    cpus = len(bundles) * options.max_replicas * options.threads
    ray.init(
        "local", num_cpus=cpus + 1, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
        logging_level=logging.WARNING, _node_ip_address=LOOPBACK, _temp_dir=folder,
    )  # fmt: skip
    serve.start(http_options={"host": options.host, "port": options.port})
    for name, path in bundles.items():
        deployment = Served.options(
            ray_actor_options={"num_cpus": options.threads, "num_gpus": options.gpus_per_replica},
            max_ongoing_requests=options.max_ongoing,
            autoscaling_config={
                "min_replicas": options.min_replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.target_ongoing,
                "upscale_delay_s": options.upscale_delay,
                "downscale_delay_s": options.downscale_delay,
            },
        )
        device = options.device or ("cuda" if options.gpus_per_replica else "cpu")
        bound = deployment.bind(
            str(path.resolve()), device, options.threads, options.max_batch, options.batch_wait / 1000
        )
        serve.run(bound, name=name, route_prefix=f"/{name}")


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive integer")
    return int(word)


def not_negative(word: str) -> float:
    try:
        found = float(word)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e6:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number from 0 on")
    return found


def stop(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--host", default=LOOPBACK, help="there is no authentication: think before you open it")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--min-replicas", type=positive, default=1, metavar="N", help="of each bundle")
    parser.add_argument("--max-replicas", type=positive, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--target-ongoing", type=positive, default=16, metavar="N", help="requests of a replica")
    parser.add_argument("--max-ongoing", type=positive, default=64, metavar="N", help="requests sent to a replica")
    parser.add_argument("--upscale-delay", type=not_negative, default=10, metavar="SECONDS")
    parser.add_argument("--downscale-delay", type=not_negative, default=300, metavar="SECONDS")
    parser.add_argument("--max-batch", type=positive, default=16, metavar="N", help="requests a call")
    parser.add_argument("--batch-wait", type=not_negative, default=2, metavar="MS", help="for a batch to fill")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of each replica")
    parser.add_argument("--gpus-per-replica", type=not_negative, default=0.0, metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda", "tensorrt", "auto"), help="cuda where replicas have GPUs")
    options = parser.parse_args()
    if options.min_replicas > options.max_replicas:
        parser.error("--min-replicas is more than --max-replicas")
    signal.signal(signal.SIGTERM, stop)
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        try:
            bundles = checked(options.bundles)
            check_port(options.host, options.port)
            start(bundles, options, folder)
            signal.signal(signal.SIGTERM, stop)  # Ray has put its own in the place of it
            print(f"serving {', '.join(bundles)} at http://{options.host}:{options.port}", flush=True)
            threading.Event().wait()
        except TransomError as error:
            print(f"ray_serve: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        finally:
            if ray.is_initialized():
                serve.shutdown()
                ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
