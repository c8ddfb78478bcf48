"""config.pbtxt: its text, and what a strict reader makes of it; Triton's own is in tests/serving/triton."""

from __future__ import annotations

import pytest

from model_config import read_config
from transom.export.triton.config import ModelConfig, TensorConfig, quoted

MODEL = ModelConfig(
    "minilm",
    (TensorConfig("text", "bytes", (1,)), TensorConfig("pair", "bytes", (None,), optional=True, ragged=True)),
    (TensorConfig("embedding", "float32", (None,)), TensorConfig("count", "int64", ())),
    8,
    backend="python",
    queue_delay_us=200,
    decoupled=True,
    instances=(2, "KIND_CPU"),
    parameters={"bundle": "bundle", "kind": "task"},
)
TEXT = """name: "minilm"
backend: "python"
max_batch_size: 8
input [
  { name: "text" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "pair" data_type: TYPE_STRING dims: [ -1 ] allow_ragged_batch: true optional: true }
]
output [
  { name: "embedding" data_type: TYPE_FP32 dims: [ -1 ] },
  { name: "count" data_type: TYPE_INT64 dims: [ 1 ] reshape { shape: [ ] } }
]
dynamic_batching { max_queue_delay_microseconds: 200 }
model_transaction_policy { decoupled: true }
instance_group [ { count: 2 kind: KIND_CPU } ]
parameters { key: "bundle" value { string_value: "bundle" } }
parameters { key: "kind" value { string_value: "task" } }
"""


def test_the_text_of_a_configuration() -> None:
    assert MODEL.text() == TEXT
    found = read_config(TEXT)
    assert found["input"][1] == {
        "name": "pair",
        "data_type": "TYPE_STRING",
        "dims": [-1],
        "allow_ragged_batch": True,
        "optional": True,
    }
    assert found["output"][1]["reshape"] == {"shape": []}
    assert found["parameters"] == {"bundle": "bundle", "kind": "task"}


def test_what_is_not_set_is_left_out() -> None:
    text = ModelConfig("m", (TensorConfig("x", "bool", (2, None)),), (), 0, platform="tensorrt_plan").text()
    assert text == (
        'name: "m"\nplatform: "tensorrt_plan"\nmax_batch_size: 0\n'
        'input [\n  { name: "x" data_type: TYPE_BOOL dims: [ 2, -1 ] }\n]\noutput [\n\n]\n'
    )


@pytest.mark.parametrize("text", ['a "quoted" name', "back\\slash", "line\nbreak", "Zürich 東京", "\x00\x7f", "\\012"])
def test_strings_are_escaped(text: str) -> None:
    written = quoted(text)
    assert written.isascii()
    assert written.isprintable()
    assert read_config(f"name: {written}") == {"name": text}


@pytest.mark.parametrize(
    "text",
    [
        'nam: "x"',
        'name: "x" name: "y"',
        "name: x",
        'max_batch_size: "8"',
        "input [ { dims: [ 1, ] } ]",
        "input [ { data_type: TYPE_FLOAT } ]",
        "input [ { optional: 1 } ]",
        "input [ { reshape { shape: [ ] } } ",
        "output [ { optional: true } ]",
        'name: "x',
    ],
)
def test_the_reader_is_strict(text: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        read_config(text)
