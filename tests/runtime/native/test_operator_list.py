"""What the native library relies on is checked when a list of operators is read: it checks nothing itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from damaged_lists import run_damaged
from native_graphs import libraries
from operator_lists import DECODER, ENCODER, VISION, decoder_list, encoder_list, vision_list
from transom.runtime.errors import BundleError
from transom.runtime.json_reader import parse_json
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.operator_list import list_from_json, list_to_json, registers_of

LISTS = {"encoder": (encoder_list, ENCODER), "decoder": (decoder_list, DECODER), "vision": (vision_list, VISION)}


def encoder(change: Callable[[Any], None]) -> str:
    """The error for the encoder's list after ``change``."""
    operators, weights = encoder_list()
    value = list_to_json(operators)
    change(value)
    with pytest.raises(BundleError) as raised:
        list_from_json(value, ENCODER, len(weights))
    assert "export it again" in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_passes_through_json_unchanged(name: str) -> None:
    made, graph = LISTS[name]
    operators, weights = made()
    value = parse_json(json.dumps(list_to_json(operators)).encode(), "list")
    assert list_from_json(value, graph, len(weights)) == operators


def test_registers_have_rows_columns_and_dtype() -> None:
    operators, weights = encoder_list()
    found = registers_of(operators, ENCODER, len(weights))
    assert (found["hidden"].rows, found["hidden"].columns, found["hidden"].row_bytes) == ("tokens", 8, 32)
    assert (found["hidden.u8"].dtype, found["hidden.u8"].row_bytes) == ("uint8", 8)
    assert (found["pooled"].rows, found["pooled"].columns) == ("sequences", 8)


def setter(path: str, new: Any) -> Callable[[Any], None]:
    """Set the value at a path such as "operators.1.source"; ... removes it."""

    def change(value: Any) -> None:
        *parents, last = path.split(".")
        for key in parents:
            value = value[int(key)] if isinstance(value, list) else value[key]
        key: Any = int(last) if isinstance(value, list) else last
        if new is ...:
            del value[key]
        else:
            value[key] = new

    return change


WRONG = {
    "an unknown operator": ("operators.1.operator", "softmax", "is 'softmax', expected one of the operators linear"),
    "no operator": ("operators.1.operator", ..., "is None, expected one of"),
    "an unknown key": ("operators.1.colour", 1, "unknown key 'colour'"),
    "another version": ("version", 2, "version is 2, expected 1..1"),
    "another graph": ("graph", "decoder", "for the graph 'decoder', not 'model'"),
    "no such input": ("ids", "tokens", "'tokens', which is no input"),
    "ids that are no ids": ("ids", "write_indices", "which is no input"),
    "a mask of no such shape": ("mask", "pixels", "takes 'pixels' as the mask"),
    "a register before it is written": ("operators.1.source", "ffn.u8", "'ffn.u8', which nothing wrote before"),
    "a register of another dtype": ("operators.2.query", "hidden.u8", "uint8, expected float32"),
    "rows of another kind": ("operators.1.rows", "sequences", "rows of tokens, expected sequences"),
    "a register written twice": ("operators.1.then.out", "hidden", "writes the register 'hidden' once more"),
    "an operator without a result": ("operators.1.then", {}, "writes no register"),
    "columns beyond a register": ("operators.2.value_column", 17, "8 columns from 17 on as its value, 'qkv' has 24"),
    "a column before a register": ("operators.2.key_column", -1, "reads 8 columns from -1 on"),
    "a size of zero": ("tensors.wq.shape", [8, 0], "expected an array of at most 64 sizes, each 1.."),
    "a head of no size": ("operators.2.head_dim", 0, "2 heads of 0"),
    "heads that do not divide": ("operators.2.key_heads", 3, "2 heads of 4 and 3 key heads"),
    "heads that overflow": ("operators.2.heads", 2**31 - 1, "has 2147483647 heads of 4"),
    "a shape that disagrees": ("tensors.wq.shape", [4, 16], "multiplies 8 columns by 'wq' (4, 16)"),
    "a norm of another size": ("tensors.norm.shape", [4], "'norm', float32 (4,), expected float32 or float16 (8,)"),
    "a residual of another size": ("operators.1.then.residual", "hidden", "adds 'hidden' of 8 columns to 24"),
    "a bias of another size": ("tensors.bq.shape", [4], "has 20 elements of bias, expected 24"),
    "a dtype that disagrees": ("tensors.wq.dtype", "float32", "reads 'wq', float32 (8, 8), expected int8 of 2 axes"),
    "a dtype that is unknown": ("tensors.wq.dtype", "float64", "is 'float64', expected float32, float16 or int8"),
    "an offset beyond the weights": ("tensors.wq.offset", 2**31 - 1, "beyond the"),
    "an offset before the weights": ("tensors.wq.offset", -64, "has 64 bytes at -64"),
    "an offset that is misaligned": ("tensors.norm.offset", 2, "lies at 2, expected a multiple of 4"),
    "a shape that overflows": ("tensors.wq.shape", [2**31 - 1, 2**31 - 1], "beyond the"),
    "a tensor that is not there": ("operators.1.weights.0", "ghost", "'ghost', which the list does not have"),
    "no scales of int8": ("operators.1.scales", [], "has 0 scales of 3 weights"),
    "an epsilon that is infinite": ("operators.0.then.norm.epsilon", float("inf"), "expected a number that float32"),
    "an epsilon beyond float32": ("operators.0.then.norm.epsilon", 1e39, "expected a number that float32 holds"),
    "a scale of zero": ("operators.3.then.quantized.scale", 0.0, "has the scale 0.0"),
    "a zero point beyond uint8": ("operators.3.then.quantized.zero_point", 256, "has the zero point 256"),
    "a dynamic zero point": ("operators.3.then.quantized.scale", None, "zero point 7 without a scale, expected 128"),
    "an unknown activation": ("operators.3.then.activation", "swish", "has the activation 'swish'"),
    "an unknown norm": ("operators.0.then.norm.kind", "batch", "has the norm 'batch'"),
    "an unknown rule": ("operators.6.rule", "last", "has the rule 'last'"),
    "a rule without its input": ("operators.6.rule", "largest", "has the input None by the rule largest"),
    "ids beyond a table": ("tensors.words.shape", [16, 8], "whose values are below 32"),
    "a table too many": ("operators.0.tables", [{"table": "words", "ids": "input_ids"}] * 5, "has 5 tables"),
    "a tensor in too many places": ("operators.1.weights", ["wq"] * 5, "packs 'wq' a 5th time"),
    "an output that is not the graph's": ("operators.5.output", "logits", "gives 'logits', no output of the graph"),
    "an output of another shape": ("operators.5.columns", 4, "('B', 'S', 4), the graph has float32 (B, S, 8)"),
    "an output that nothing gives": ("outputs", {}, "gives the output 'pooler_output' 0 times"),
    "an output of token rows": ("outputs", {"hidden": "pooler_output"}, "from 8 columns of tokens"),
    "a cache that the graph has not": ("operators.2.key_cache", "key_cache.0", "has one of key and value alone"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_thing_is_named(name: str) -> None:
    path, new, expected = WRONG[name]
    assert expected in encoder(setter(path, new))


@pytest.mark.parametrize(
    ("path", "new", "expected"),
    [
        ("operators.2.value_cache", "key_cache.0", "'key_cache.0' once more, expected one of its own"),
        ("operators.2.key_cache", "hidden_in", "'hidden_in', which is no cache (B, 2, C, 4)"),
        ("operators.4.rows", "tokens", "makes rows of 'tokens', expected positions"),
        ("operators.4.input", "write_indices", "'write_indices', expected one input int64 (B, P)"),
    ],
)
def test_caches_and_positions_are_the_graphs(path: str, new: Any, expected: str) -> None:
    operators, weights = decoder_list()
    value = list_to_json(operators)
    setter(path, new)(value)
    with pytest.raises(BundleError) as raised:
        list_from_json(value, DECODER, len(weights))
    assert expected in str(raised.value)


def test_all_problems_are_in_one_error() -> None:
    def change(value: Any) -> None:
        setter("tensors.norm.offset", 2)(value)
        setter("operators.1.source", "ghost")(value)

    message = encoder(change)
    assert "lies at 2" in message
    assert "'ghost'" in message


@pytest.mark.parametrize("library", libraries())
def test_damaged_lists(library: NativeLibrary) -> None:
    """What is not refused is executed: it reads and writes nothing that is not its own. ``make sweep`` runs more."""
    results = [run_damaged(Random(seed), library) for seed in range(400)]
    assert 10 < results.count(None) < 200
    assert not any("\n" in error for error in results if error is not None)
