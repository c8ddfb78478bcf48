"""Parameters, streams that are left, and requests and models with something wrong, at a real Triton."""

from __future__ import annotations

import json
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from paths import KEPT
from serving_engines import REFERENCES, bytes_of, expected, require_same
from time_limits import PATIENCE_S
from transom.runtime import load
from transom.runtime.serving.service import Request
from transom.runtime.serving.tasks import task_operation
from triton_requests import PROTOCOLS, Triton

IDS = np.array([[1, 2, 3]])
GOOD = Request({"text": bytes_of(["the people"])})


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 2},
        {"do_sample": True, "seed": 7, "temperature": "0.7", "top_p": "0.9"},
        {"num_beams": 2, "num_return_sequences": 2},
        {"eos_token_id": "[15, 6]", "bad_words_ids": "[[7], [14, 14]]"},
    ],
)
def test_parameters(triton: Triton, protocol: str, parameters: dict[str, Any]) -> None:
    """The protocol has no lists, and gRPC's client no fractions: those are JSON in a text."""
    request = Request({"input_ids": IDS}, parameters)
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        wanted = expected(task_operation(gpt), request)
        plain = expected(task_operation(gpt), Request({"input_ids": IDS}))
    require_same(triton.ask(protocol, "gpt-fp32", request), wanted, str(parameters))
    assert wanted["generated_ids"].tolist() != plain["generated_ids"].tolist()


def test_streams_over_http(triton: Triton) -> None:
    with load(KEPT / "flamingo-fp32", threads=1) as flamingo:
        operation = task_operation(flamingo)
        (wanted,) = expected(operation, Request(GOOD.inputs, {"max_new_tokens": 4}))["generated_text"][0]
    events = triton.generate_stream("flamingo-fp32_stream", {"text": "the people", "max_new_tokens": 4})
    assert "".join(event["generated_text"] for event in events) == wanted.decode()


WRONG = {
    "a request longer than the graph's bound": (
        "bert-fp32",
        Request({"text": bytes_of(["people " * 200])}),
        "at most 7 fit",
    ),
    "a wrong dtype": ("bert-fp32", Request({"text": np.zeros((1, 1), np.int64)}), "data-type is 'INT64'"),
    "an unknown parameter": ("bert-fp32", Request(GOOD.inputs, {"topk": 1}), "unknown parameter 'topk'; did you mean"),
    "a parameter out of range": ("bert-fp32", Request(GOOD.inputs, {"top_k": 0}), "the parameter top_k is 0"),
    "an unknown input": (
        "bert-fp32",
        Request({**GOOD.inputs, "txt": bytes_of(["a"])}),
        "unexpected inference input 'txt'",
    ),
    "no input": ("gpt-fp32", Request({}), "expected 1 inputs but got 0"),
    "no UTF-8": ("bert-fp32", Request({"text": bytes_of([b"\xff"])}), "text is not UTF-8"),
    "no image": ("vit-fp32", Request({"image": bytes_of([b"GIF89a"])}), "image"),
    "a sampling keyword without sampling": (
        "gpt-fp32",
        Request({"input_ids": IDS}, {"temperature": "0.5"}),
        "temperature",
    ),
    "tensors beyond the bound": ("bert-fp32_model", Request({"input_ids": np.ones((1, 99), np.int64)}), "axis S"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_requests(triton: Triton, protocol: str, what: str) -> None:
    model, request, message = WRONG[what]
    with pytest.raises(InferenceServerException) as caught:
        triton.ask(protocol, model, request)
    assert message in caught.value.message()
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    with load(KEPT / "bert-fp32", threads=1) as bert:
        require_same(triton.ask(protocol, "bert-fp32", GOOD), expected(task_operation(bert), GOOD), "afterwards")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"max_tokens": 3}, "unknown parameter 'max_tokens'"), ({"num_beams": 2}, "beams"), ({}, "the context holds 7")],
)
def test_wrong_streams(triton: Triton, parameters: dict[str, Any], message: str) -> None:
    """Also those whose fault shows only when the first piece is made."""
    ids = IDS if parameters else np.ones((1, 99), np.int64)
    with pytest.raises(InferenceServerException, match=message):
        triton.pieces("gpt-fp32_stream", Request({"input_ids": ids}, parameters))
    assert triton.pieces("gpt-fp32_stream", Request({"input_ids": IDS}, {"max_new_tokens": 2}))


def test_a_wrong_request_fails_alone(triton: Triton) -> None:
    """Rows of one request fail together, those of another that shared their batch do not."""
    from concurrent.futures import ThreadPoolExecutor

    long = Request({"text": bytes_of(["people " * 200])})

    def ask(request: Request) -> Any:
        try:
            return triton.ask("grpc", "bert-fp32", request)
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, [GOOD, long, GOOD, GOOD]))
    assert "at most 7 fit" in str(found[1])
    with load(KEPT / "bert-fp32", threads=1) as bert:
        wanted = expected(task_operation(bert), GOOD)
    for place in (0, 2, 3):
        require_same(found[place], wanted, f"request {place}")


LONG = 200  # tokens
# Sequences that are looked for before each token, so that an answer takes seconds and leaving in its midst does not
FORBIDDEN = [[9, number % 1000, number % 999] for number in range(20_000)]


@pytest.fixture
def long_request() -> Request:
    """A request that the reference GPT answers with LONG tokens, slowly."""
    if not (REFERENCES / "gpt" / "bundle.json").is_file():
        pytest.skip(f"no exported GPT in {REFERENCES}: run make test-serving")
    parameters = {"max_new_tokens": LONG, "min_new_tokens": LONG, "bad_words_ids": json.dumps(FORBIDDEN)}
    return Request({"text": bytes_of(["It is a truth"])}, parameters)


def pieces_when_left(triton: Triton, before: int) -> int:
    """Return how many pieces the latest stream that was left had; there were ``before`` others."""
    until = time.monotonic() + PATIENCE_S
    while len(triton.left("gpt_stream")) == before:
        assert time.monotonic() < until, "the stream did not end"
        time.sleep(0.05)
    return triton.left("gpt_stream")[-1]


def test_a_client_that_leaves_ends_the_generation(triton: Triton, long_request: Request) -> None:
    before = len(triton.left("gpt_stream"))
    with triton.stream("gpt_stream", long_request) as stream:
        assert len(list(islice(stream, 2))) == 2
    assert 2 <= pieces_when_left(triton, before) < LONG / 2
    assert triton.pieces("gpt_stream", Request(long_request.inputs, {"max_new_tokens": 2}))


def test_a_client_that_leaves_http_ends_the_generation(triton: Triton, long_request: Request) -> None:
    before = len(triton.left("gpt_stream"))
    body = {"text": "It is a truth", **long_request.parameters}
    with triton.open_generate_stream("gpt_stream", body) as answer:
        assert json.loads(answer.readline().removeprefix(b"data: "))["generated_text"]
    assert 1 <= pieces_when_left(triton, before) < LONG / 2
    assert triton.generate_stream("gpt_stream", {"text": "It is a truth", "max_new_tokens": 2})


def test_a_client_that_stays_is_none_that_left(triton: Triton, long_request: Request) -> None:
    before = triton.left("gpt_stream")
    assert triton.pieces("gpt_stream", Request(long_request.inputs, {"max_new_tokens": 20}))
    assert triton.left("gpt_stream") == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("changed_file", "model.onnx does not have the SHA-256 that bundle.json says"),
        ("changed_manifest", "bundle.json does not have the SHA-256 that config.pbtxt says"),
        ("newer_runtime", "this model was written by Transom 99.0.0"),
    ],
)
def test_models_that_cannot_be_served(triton: Triton, model: str, message: str) -> None:
    """The server says why, and serves the others."""
    states = triton.states()
    state, reason = states[model]
    assert state == "UNAVAILABLE"
    assert message in reason
    assert states["bert-fp32"] == ("READY", "")
    with pytest.raises(InferenceServerException):
        triton.ask("http", model, GOOD)
