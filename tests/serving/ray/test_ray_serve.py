"""examples/ray_serve.py over HTTP: answers, streams, batches, replicas, and what callers get wrong."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import changed_bundle
from paths import KEPT
from processes import descendants, listening_addresses
from served_requests import request_for
from serving_engines import example, expected, free_port, server
from time_limits import PATIENCE_S
from transom.runtime import load
from transom.runtime.serving.operation import Operation
from transom.runtime.serving.ports import BYTES, Array, Port
from transom.runtime.serving.service import Request
from transom.runtime.serving.tasks import task_operation

NAMES = (
    "bert-fp32", "electra-fp32", "vit-fp32", "clip-fp32", "perceiver-fp32-bytes", "gpt-fp32", "seq2seq-fp32",
    "show_attend_tell-fp32", "flamingo-fp32",
)  # fmt: skip
ENDLESS = 900_000  # new tokens: four streams at once take ten minutes
LEFT_S = 120  # for the server to notice that callers left
TEXTS = ("the man", "a city is red", "paris", "water is blue")


@dataclass(frozen=True)
class Server:
    port: int
    pid: int

    def ask(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        """Return the status of an answer, and its JSON."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as connection:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method or ("GET" if data is None else "POST"), path, data)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def stream(self, path: str, body: Any) -> Iterator[tuple[str, Any]]:
        """Yield server-sent events, as they come; closing the iterator closes the connection."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as connection:
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            assert (response.status, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            for line in response:
                if line.startswith(b"event: "):
                    kind = line[7:].decode().strip()
                elif line.startswith(b"data: "):
                    yield kind, json.loads(line[6:])

    def streaming(self, name: str) -> int:
        found: int = self.ask(f"/{name}")[1]["replica"]["streaming"]
        return found


def started(bundles: list[Path], log: Path, *options: str | int) -> Any:
    """Start the example; the value of the block is the process, and its port."""
    port = free_port()

    def ready() -> bool:
        return f"at http://127.0.0.1:{port}\n" in log.read_text("utf-8", "replace")

    return port, server(example("ray_serve.py", *bundles, "--port", port, *options), ready, log)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small seq2seq that has no cache to fill, and so may go on for as long as it is asked to; called ``changed``."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["options"]["max_target_positions"] = ENDLESS + 1

    return changed_bundle(KEPT / "seq2seq-fp32", tmp_path_factory.mktemp("endless"), change)


@pytest.fixture(scope="module")
def served(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("served") / "log"
    bundles = [*(KEPT / name for name in NAMES), endless]
    port, running = started(bundles, log, "--max-replicas", 1, "--batch-wait", 20)
    with running as process:
        yield Server(port, process.pid)


def json_of(operation: Operation, request: Request) -> dict[str, Any]:
    """Return a request as the body of a POST."""
    ports = {port.name: port for port in operation.inputs}
    inputs = {name: [row_of(ports[name], row) for row in array] for name, array in request.inputs.items()}
    return {"inputs": inputs, "parameters": dict(request.parameters)}


def row_of(port: Port, row: Array) -> Any:
    if port.dtype != BYTES:
        return row.tolist()
    values = [value.decode() if port.text else base64.b64encode(value).decode() for value in row]
    return values[0] if port.shape == (1,) else values


def require_equal(operation: Operation, found: dict[str, Any], wanted: dict[str, Array]) -> None:
    """Fail unless the JSON of an answer has the arrays bit for bit."""
    assert list(found) == [port.name for port in operation.outputs]
    for port in operation.outputs:
        array = wanted[port.name]
        if port.dtype == BYTES:
            texts = [[text.decode() for text in row] for row in array]
            assert found[port.name] == ([row[0] for row in texts] if port.shape == (1,) else texts)
        else:
            again = np.array(found[port.name], port.dtype).reshape(array.shape)
            np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_answers_as_the_runtime(served: Server, name: str) -> None:
    with load(KEPT / name, threads=1) as bundle:
        operation = task_operation(bundle)
        for seed, rows in ((0, 1), (1, 2)):
            request = request_for(operation, seed, rows=rows)
            status, found = served.ask(f"/{name}", json_of(operation, request))
            assert status == 200, found
            require_equal(operation, found["outputs"], expected(operation, request))


@pytest.mark.parametrize("name", ["gpt-fp32", "seq2seq-fp32", "show_attend_tell-fp32", "flamingo-fp32"])
def test_streams_are_what_is_generated(served: Server, name: str) -> None:
    with load(KEPT / name, threads=1) as bundle:
        operation = task_operation(bundle)
        request = request_for(operation, 3)
        (output,) = operation.outputs
        whole = expected(operation, request)[output.name][0, 0]
    *pieces, end = served.stream(f"/{name}/stream", json_of(operation, request))
    assert end == ("done", {})
    assert {kind for kind, _ in pieces} == {"message"}
    if output.dtype == BYTES:
        assert "".join(data[output.name][0] for _, data in pieces) == whole.decode()
    else:
        assert [token for _, data in pieces for token in data[output.name][0]] == whole.tolist()


def test_callers_at_the_same_time_get_their_own_answers(served: Server) -> None:
    texts = [" ".join(TEXTS[number % 4].split()[: 1 + number % 3]) for number in range(48)]
    texts[5] = "the man eats the red city in paris"  # too long
    bodies = [{"inputs": {"text": [text]}, "parameters": {"top_k": 1 + place % 3}} for place, text in enumerate(texts)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: served.ask("/bert-fp32", body), bodies))
    with load(KEPT / "bert-fp32", threads=1) as bert:
        for place, (status, found) in enumerate(answers):
            if place == 5:
                assert (status, "at most 7 fit." in found["detail"]) == (422, True)
                continue
            outputs = found["outputs"]
            ranked = list(zip(outputs["label"][0], outputs["score"][0], strict=True))
            assert ranked == bert.classify(texts[place], top_k=1 + place % 3)


def test_a_bundle_says_what_it_takes(served: Server) -> None:
    status, found = served.ask("/clip-fp32")
    assert status == 200
    assert (found["task"], found["streams"]) == ("zero-shot-image-classification", False)
    assert found["inputs"][:2] == [
        {"name": "image", "type": "base64", "shape": [1], "optional": False},
        {"name": "candidate_label", "type": "text", "shape": [None], "optional": False},
    ]
    assert found["parameters"] == ["top_k", "truncate"]


TEXT = {"text": ["the man"]}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/bert-fp32", b"{", 400, "the body is no JSON"),
        ("/bert-fp32", b"\xff", 400, "the body is no JSON"),
        ("/bert-fp32", [], 422, 'the body has no object "inputs"'),
        ("/bert-fp32", {"inputs": TEXT, "parametres": {}}, 422, "an unknown 'parametres'"),
        ("/bert-fp32", {"inputs": TEXT, "parameters": [1]}, 422, '"parameters" that is no object'),
        ("/bert-fp32", {"inputs": {"texts": ["x"]}}, 422, "unknown input 'texts'; this bundle takes text, pair."),
        ("/bert-fp32", {"inputs": {}}, 422, "the input text is missing"),
        ("/bert-fp32", {"inputs": {"text": "the man"}}, 422, "text is no list; expected one value for each row."),
        ("/bert-fp32", {"inputs": {"text": [5]}}, 422, "text holds a int; expected bytes."),
        ("/bert-fp32", {"inputs": {"text": [["a", "b"]]}}, 422, "text has shape (1, 2)"),
        ("/bert-fp32", {"inputs": TEXT | {"pair": ["a", "b"]}}, 422, "different numbers of rows"),
        ("/bert-fp32", {"inputs": {"text": ["the man eats the red city"]}}, 422, "at most 7 fit."),
        ("/bert-fp32", {"inputs": TEXT, "parameters": {"topk": 1}}, 422, "unknown parameter 'topk'; did you mean"),
        ("/bert-fp32", {"inputs": TEXT, "parameters": {"top_k": 0}}, 422, "the parameter top_k is 0; expected"),
        ("/bert-fp32/stream", {"inputs": TEXT}, 422, "answers of this bundle come at once"),
        ("/bert-fp32/more", {"inputs": TEXT}, 404, "there is no such path here"),
        ("/gpt-fp32", {"inputs": {"input_ids": [[1.5]]}}, 422, "input_ids has dtype float64; expected int64."),
        ("/gpt-fp32", {"inputs": {"input_ids": [[1], [2, 3]]}}, 422, "different numbers of values"),
        ("/gpt-fp32", {"inputs": {"input_ids": [[99]]}}, 422, "99"),
        ("/gpt-fp32/stream", {"inputs": {"input_ids": [[1], [2]]}}, 422, "a stream answers one row, received 2"),
        ("/gpt-fp32", {"inputs": {"input_ids": [[1]]}, "parameters": {"top_p": 0.5}}, 422, "top_p"),
        ("/vit-fp32", {"inputs": {"image": ["%"]}}, 422, "image holds what is no base64"),
        ("/vit-fp32", {"inputs": {"image": ["AAAA"]}}, 422, "image"),
        ("/bert-fp32", b" " * (16 << 20) + b"{}", 413, "the body is longer than 16777216 bytes."),
    ],
)  # fmt: skip
def test_what_callers_get_wrong(served: Server, path: str, body: Any, status: int, message: str) -> None:
    found = served.ask(path, body)
    assert (found[0], list(found[1])) == (status, ["detail"])
    assert message in found[1]["detail"]
    assert str(KEPT) not in found[1]["detail"]


def test_other_methods_are_refused(served: Server) -> None:
    assert served.ask("/bert-fp32", {"inputs": TEXT}, "PUT") == (405, {"detail": "send a POST."})
    assert served.ask("/gpt-fp32/stream")[0] == 405


def test_a_caller_that_leaves_ends_its_generation(served: Server) -> None:
    prompt = {"inputs": {"input_ids": [[3, 5, 7]]}}
    asked = prompt | {"parameters": {"max_new_tokens": ENDLESS, "min_new_tokens": ENDLESS}}
    streams = [served.stream("/changed/stream", asked) for _ in range(4)]
    for events in streams:
        assert next(events)[0] == "message"
    assert served.streaming("changed") == 4
    for events in streams:
        events.close()  # type: ignore[attr-defined]  # a generator
    wait_until(lambda: served.streaming("changed") == 0, LEFT_S)
    assert served.ask("/changed", prompt | {"parameters": {"max_new_tokens": 3}})[0] == 200


def test_it_listens_on_the_loopback_address_alone(served: Server) -> None:
    assert listening_addresses({served.pid, *descendants(served.pid)}) == {"127.0.0.1"}


def test_more_replicas_start_while_requests_wait_and_nothing_is_left_at_the_end(endless: Path, tmp_path: Path) -> None:
    options = ("--max-replicas", 2, "--target-ongoing", 1, "--upscale-delay", 0)
    port, running = started([endless], tmp_path / "log", *options)
    asked = {"inputs": {"input_ids": [[3, 5, 7]]}, "parameters": {"max_new_tokens": ENDLESS, "min_new_tokens": ENDLESS}}
    with running as process:
        one = Server(port, process.pid)
        streams = [one.stream("/changed/stream", asked) for _ in range(4)]
        for events in streams:
            assert next(events)[0] == "message"
        seen = {one.ask("/changed")[1]["replica"]["pid"]}

        def another() -> bool:
            seen.add(one.ask("/changed")[1]["replica"]["pid"])
            return len(seen) == 2

        wait_until(another)
        for events in streams:
            events.close()  # type: ignore[attr-defined]
        below = descendants(process.pid)
        process.terminate()
        assert process.wait(PATIENCE_S) == 143, (tmp_path / "log").read_text()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


def wait_until(happened: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    def error(*bundles: Path, port: int = 0) -> str:
        command = example("ray_serve.py", *bundles, "--port", port or free_port())
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert (done.returncode, done.stdout) == (1, ""), done
        (line,) = done.stderr.splitlines()
        return line

    bert = KEPT / "bert-fp32"
    shutil.copytree(bert, tmp_path / "bert-fp32")
    shutil.copytree(bert, tmp_path / "a bundle")
    assert "are both called bert-fp32; rename one of the folders." in error(bert, tmp_path / "bert-fp32")
    assert "'a bundle' cannot be part of a URL" in error(tmp_path / "a bundle")
    with (tmp_path / "bert-fp32" / "model.onnx").open("r+b") as file:
        file.write(b"\0\0\0\0")
    assert "does not have the SHA-256 that bundle.json says" in error(tmp_path / "bert-fp32")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be used: " in error(bert, port=port)
