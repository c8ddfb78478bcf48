"""Send examples/kserve_predictor.py what it cannot use, and start it with bundles that cannot be served."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest

from kserve_requests import GRPC, REST, Running, refusal
from paths import KEPT
from serving_engines import BUNDLES, bytes_of, example, expected, server
from time_limits import PATIENCE_S
from transom.runtime import load
from transom.runtime.errors import InputError
from transom.runtime.serving.service import Request
from transom.runtime.serving.tasks import task_operation

TORN, TEXTS, TOKENS = "torn", "bert-fp32", "gpt-fp32"
THE = bytes_of(["the"])


@pytest.mark.parametrize("protocol", [REST, GRPC])
def test_a_bundle_that_fails_its_hashes_is_not_ready_and_the_others_are(running: Running, protocol: str) -> None:
    assert (running.ready(protocol, TORN), running.ready(protocol, TEXTS)) == (False, True)
    status, message = refusal(lambda: running.infer(protocol, TORN, Request({"text": THE})))
    assert status in (503, grpc.StatusCode.UNAVAILABLE)
    assert message.startswith(f"Model with name {TORN} is not ready.")
    assert not running.ready(protocol, TORN)  # nor after a request
    (line,) = [line for line in running.log.read_text("utf-8").splitlines() if f"{TORN} is not served" in line]
    assert ".onnx" in line
    assert str(running.log.parent) not in message


@pytest.mark.parametrize("protocol", [REST, GRPC])
def test_a_model_that_is_not_there_is_not_found(running: Running, protocol: str) -> None:
    status, message = refusal(lambda: running.infer(protocol, "absent", Request({"text": THE})))
    assert status in (404, grpc.StatusCode.NOT_FOUND)
    assert "absent does not exist" in message


WRONG = {
    "a dtype": (TEXTS, Request({"text": np.array([[1]])}), "text has dtype int64; expected bytes."),
    "an integer's dtype": (
        TOKENS,
        Request({"input_ids": np.array([[1.0]], np.float32)}),
        "input_ids has dtype float32",
    ),
    "a shape": (TEXTS, Request({"text": bytes_of(["the", "city"])}), "text has shape (1, 2); expected (rows, 1)"),
    "a length": (TOKENS, Request({"input_ids": np.ones((1, 99), np.int64)}), "99"),
    "a text's length": (TEXTS, Request({"text": bytes_of(["the " * 999])}), "truncate"),
    "a parameter": (TEXTS, Request({"text": THE}, {"topk": 1}), "unknown parameter 'topk'; did you mean"),
    "a parameter's value": (TEXTS, Request({"text": THE}, {"top_k": 0}), "the parameter top_k is 0"),
    "an input": (TEXTS, Request({"texts": bytes_of(["the"])}), "unknown input 'texts'"),
    "an image": ("vit-fp32", Request({"image": bytes_of([b"\x89PNG no more"])}), "image"),
    "no UTF-8": (TEXTS, Request({"text": bytes_of([b"\xff"])}), "text is not UTF-8 (byte 0)"),
}


@pytest.mark.parametrize("protocol", [REST, GRPC])
@pytest.mark.parametrize("what", WRONG)
def test_what_a_caller_got_wrong_is_answered_with_the_runtimes_message(
    running: Running, protocol: str, what: str
) -> None:
    model, request, part = WRONG[what]
    with load(KEPT / model, threads=1) as bundle, pytest.raises(InputError) as wanted:
        expected(task_operation(bundle), request)
    status, message = refusal(lambda: running.infer(protocol, model, request))
    assert (status, message) == (400 if protocol == REST else grpc.StatusCode.INVALID_ARGUMENT, str(wanted.value))
    assert part in message


def tensor(data: object, datatype: str = "INT64", shape: tuple[int, ...] = (1, 2), **more: object) -> dict[str, object]:
    return {"inputs": [{"name": "input_ids", "datatype": datatype, "shape": shape, "data": data, **more}]}


BODIES: dict[str, tuple[object, str]] = {
    "a fraction": (tensor([1.5, 2]), "the data of 'input_ids' are not INT64 values of the shape [1, 2]."),
    "a text": (tensor(["1", "2"]), "the data of 'input_ids' are not INT64"),
    "too few values": (tensor([1]), "the data of 'input_ids' are not INT64 values of the shape [1, 2]."),
    "a null": (tensor([None, 1]), "the data of 'input_ids' are not INT64"),
    "ragged data": (tensor([[1], [2, 3]]), "the data of 'input_ids' are not INT64"),
    "no datatype": (tensor([1, 2], "INT63"), "'input_ids' has the datatype 'INT63', which is none."),
    "many rows": (tensor([1] * 600, shape=(300, 2)), "'input_ids' has 300 rows; send at most 256 in a request."),
    "an input twice": ({"inputs": tensor([1, 2])["inputs"] * 2}, "the input 'input_ids' is there twice"),  # type: ignore[operator]
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_whose_data_do_not_fit_is_refused(running: Running, what: str) -> None:
    body, part = BODIES[what]
    status, message = running.post(f"/v2/models/{TOKENS}/infer", body)
    assert (status, part in message) == (400, True), message


def test_binary_tensors_that_do_not_fit_are_refused(running: Running) -> None:
    path, binary = f"/v2/models/{TOKENS}/infer", "application/octet-stream"
    entry = {"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "parameters": {"binary_data_size": 16}}
    head = json.dumps({"inputs": [entry]}).encode()
    length = {"content_type": binary, "inference_header_content_length": str(len(head))}
    assert running.post(path, head + bytes(15), **length) == (
        400,
        "'input_ids' has 16 bytes behind the JSON; 15 are left.",
    )
    text = json.dumps({"inputs": [{**entry, "datatype": "BYTES"}]}).encode()
    length["inference_header_content_length"] = str(len(text))
    status, message = running.post(path, text + b"\xff" * 16, **length)
    assert (status, message.startswith("this is no request of the v2 protocol: ")) == (400, True), message
    status, message = running.post(path, b"no JSON", content_type=binary)
    assert (status, message.startswith("this is no request of the v2 protocol: ")) == (400, True), message


def test_bodies_are_bounded(running: Running) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"{}"

    url = f"{running.http}/v2/models/{TOKENS}/infer"
    large = httpx.post(url, content=bytes((16 << 20) + 1))
    assert (large.status_code, large.json()["error"]) == (413, "the body has 16777217 bytes; send at most 16777216.")
    assert httpx.post(url, content=chunks()).status_code == 411
    ids = np.zeros((1, 1 << 22), np.int64)
    status, _ = refusal(lambda: running.infer(GRPC, TOKENS, Request({"input_ids": ids})))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_no_request_unloads_a_model_and_v1_is_not_spoken(running: Running) -> None:
    for path in (f"/v2/repository/models/{TEXTS}/unload", f"/v2/repository/models/{TEXTS}/load"):
        assert running.post(path, {}) == (400, "the models of this server are those of its command line.")
    assert running.ready(REST, TEXTS)
    status, message = running.post(f"/v1/models/{TEXTS}:predict", {"instances": ["the"]})
    assert (status, message) == (400, f"this server speaks the v2 protocol; POST to /v2/models/{TEXTS}/infer.")


def run(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    command = example("kserve_predictor.py", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def test_bundles_that_cannot_be_served_are_named_at_the_start(tmp_path: Path) -> None:
    for place in ("a", "b"):
        shutil.copytree(BUNDLES[0], tmp_path / place / "same")
    done = run(tmp_path / "a", tmp_path / "b" / "same")
    assert (done.returncode, "two bundles are called same: " in done.stderr) == (1, True), done.stderr
    done = run(tmp_path)
    assert (done.returncode, f"{tmp_path} holds no bundle.json; expected" in done.stderr) == (1, True), done.stderr
    done = run(*BUNDLES, "--model_name", "one")
    assert (done.returncode, "--model_name names one bundle, and there are" in done.stderr) == (1, True), done.stderr
    next((tmp_path / "a" / "same").glob("*.onnx")).write_bytes(b"")
    done = run(tmp_path / "a")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "kserve_predictor: no bundle could be loaded."


def test_a_server_of_one_bundle_that_is_called_otherwise_listens_here_alone_and_ends_when_told(tmp_path: Path) -> None:
    found, command = Running.command(tmp_path / "log", KEPT / TEXTS, "--model_name", "words")
    with server(command, lambda: found.ready(GRPC, "words"), found.log) as process:
        answer = found.infer(REST, "words", Request({"text": THE}, {"top_k": 1}))
        assert answer["label"].shape == (1, 1)
        connections = psutil.Process(process.pid).connections()  # kserve brings psutil
        addresses = [found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN]
        listening = {address.removeprefix("::ffff:") for address in addresses}
        assert listening == {"127.0.0.1"}  # KServe itself listens on every address
        process.terminate()
        assert process.wait(PATIENCE_S) in (0, -15)
