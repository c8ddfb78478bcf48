"""Each check of bundle.json by itself: one wrong field in a sound bundle, and the error.

The bundles are those kept in tests/bundles: neither torch nor an export is needed, and all of this takes seconds.
tests/guards/manifest.toml takes the guards away one by one, and expects a row here to fail.
"""
# ruff: noqa: E501 - a row is a line

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from bad_bundles import Words, drop, nested, refused, rewritten, tensor
from paths import KEPT
from transom.runtime.bundle import Bundle

SHA256 = "0" * 64
DECODER = "takes bounded tokens (B, S) first"
LOGITS = "gives logits (B, P, vocabulary) first"
PLAN = {"library": "TensorRT-RTX", "version": "1.7", "plans": {"model": "golden.safetensors"}}

Change = Callable[[Words], object]


def listed(name: str, **fields: Any) -> Change:
    """A further file in bundle.json's list, by any name."""
    return lambda w: w["files"].update({name: {"size": 1, "sha256": SHA256, **fields}})


def axis(**fields: Any) -> Change:
    return lambda w: w["axes"]["S"].update(fields)


def source(**fields: Any) -> Change:
    return lambda words: words["source"].update(fields)


def graph(**fields: Any) -> Change:
    return lambda w: w["graphs"][0].update(fields)


def tensors(name: str, **fields: Any) -> Change:
    """Fields of an input or output of the last graph."""
    return lambda w: tensor(w, name).update(fields)


def without(name: str, field: str) -> Change:
    return lambda w: tensor(w, name).pop(field)


def quantization(**fields: Any) -> Change:
    return lambda w: w["quantization"].update(fields)


def engine(**fields: Any) -> Change:
    return lambda w: w.update(engines={"rtx-sm89": {**PLAN, **fields}})


def caches(*shape: Any) -> Change:
    """Every cache and what writes it, of another shape."""

    def change(words: Words) -> None:
        for entry in (*words["graphs"][0]["inputs"], *words["graphs"][0]["outputs"]):
            if "_cache." in entry["name"]:
                entry["shape"] = list(shape)

    return change


def repeated(side: str) -> Change:
    """The first input or output once more, and bounds or sizes of its own."""
    return lambda w: w["graphs"][0][side].append(dict(w["graphs"][0][side][0]))


def both_sides(words: Words) -> None:
    words["graphs"][0]["outputs"].append({"name": "input_ids", "dtype": "int64", "shape": ["B", "S"]})


def stranger_axis(words: Words) -> None:
    words["axes"]["T"] = {"min": 1, "opt": 1, "max": 9}
    tensor(words, "logits")["shape"] = ["T", 3]


# (what, bundle, change to bundle.json, which signs itself again, what is said)
CLAIMS: tuple[tuple[str, str, Change, str], ...] = (
    # fields
    ("no family", "bert-fp32", lambda w: w.pop("family"), "bundle.json.family is missing"),
    ("a family that is a number", "bert-fp32", lambda w: w.update(family=7), "family is 7, expected a string"),
    ("a name that is a list", "bert-fp32", lambda w: w.update(name=[]), "name is [], expected a string"),
    ("a task of nothing", "bert-fp32", lambda w: w.update(task=None), "task is None, expected a string"),
    ("another precision", "bert-fp32", lambda w: w.update(precision="fp8"), "precision is 'fp8', expected one of fp32"),
    ("a config that is a list", "bert-fp32", lambda w: w.update(config=[]), "config is [], expected an object"),
    ("graphs by name", "bert-fp32", lambda w: w.update(graphs={}), "graphs is {}, expected an array"),
    ("labels that are numbers", "bert-fp32", lambda w: w.update(labels=[1]), "labels is [1], expected an array of str"),
    ("an unknown key", "bert-fp32", lambda w: w.update(surprise=1), "bundle.json has the unknown key 'surprise'"),
    ("a list for an object", "bert-fp32", lambda w: w["axes"].update(S=[]), "axes.S is a list, expected an object"),
    # axes
    ("an unknown key of an axis", "bert-fp32", axis(step=1), "axes.S has the unknown key 'step'"),
    ("an axis from 0", "bert-fp32", axis(min=0), "axes.S.min is 0, expected 1.."),
    ("an axis without end", "bert-fp32", axis(max=2**31), "axes.S.max is 2147483648, expected 1.."),
    ("an axis of true", "bert-fp32", axis(min=True), "axes.S.min is True, expected 1.."),
    ("an axis of 1.0", "bert-fp32", axis(min=1.0), "axes.S.min is 1.0, expected 1.."),
    ("an axis whose least is above", "bert-fp32", axis(min=3, opt=2), "has min 3, opt 2, max 7, expected them in this"),
    ("an axis whose most is below", "bert-fp32", axis(opt=7, max=5), "has min 1, opt 7, max 5, expected them in this"),
    ("an axis like a stranger", "bert-fp32", axis(like="x"), "axes.S is like 'x', which is no axis"),
    ("an axis like a number", "bert-fp32", axis(like=3), "axes.S.like is 3, expected a string"),
    # files
    ("an absolute path", "bert-fp32", listed("/etc/hostname"), "files has the path '/etc/hostname', expected a plain"),
    ("a path upwards", "bert-fp32", listed("../secret"), "files has the path '../secret', expected a plain"),
    ("a path down and up", "bert-fp32", listed("a/../../secret"), "the path 'a/../../secret', expected a plain"),
    ("a path with a dot", "bert-fp32", listed("./model.onnx"), "files has the path './model.onnx', expected a plain"),
    ("a path with two slashes", "bert-fp32", listed("a//b"), "files has the path 'a//b', expected a plain"),
    ("an empty path", "bert-fp32", listed(""), "files has the path '', expected a plain"),
    ("a path of Windows", "bert-fp32", listed("..\\secret"), "files has the path '..\\\\secret', expected a plain"),
    ("a path with a zero byte", "bert-fp32", listed("a\0b"), "files has the path 'a\\x00b', expected a plain"),
    ("a path with a line break", "bert-fp32", listed("a\nb"), "files has the path 'a\\nb', expected a plain"),
    ("a wrong size behind a line break", "bert-fp32", listed("a\nb", size=-1), "files.a\\nb.size is -1, expected 0.."),
    ("a size below zero", "bert-fp32", listed("x", size=-1), "files.x.size is -1, expected 0.."),
    ("a size of true", "bert-fp32", listed("x", size=True), "files.x.size is True, expected 0.."),
    ("a size beyond every disk", "bert-fp32", listed("x", size=2**54), "files.x.size is 18014398509481984, expected 0.."),
    ("a short hash", "bert-fp32", listed("x", sha256="0" * 63), "expected 64 hexadecimal digits"),
    ("a hash in capitals", "bert-fp32", listed("x", sha256="A" * 64), "expected 64 hexadecimal digits"),
    ("a hash that is a list", "bert-fp32", listed("x", sha256=["0"] * 64), "expected 64 hexadecimal digits"),
    ("an unknown key of a file", "bert-fp32", listed("x", mode=7), "files.x has the unknown key 'mode'"),
    # source
    ("a licence of escapes", "bert-fp32", source(licence={"id": "m\x1bit"}), "source.licence is {'id': 'm\\x1bit'}"),
    ("a licence without end", "bert-fp32", source(licence={"link": "x" * 501}), "printable texts of at most 500"),
    ("a licence of other keys", "bert-fp32", source(licence={"text": "x"}), "expected id, name, link, file"),
    ("a licence in a word", "bert-fp32", source(licence="mit"), "source.licence is 'mit', expected id, name"),
    ("a revision by number", "bert-fp32", source(revision=7), "source.revision is 7, expected a text of printable"),
    # graphs
    ("no graphs", "bert-fp32", lambda w: w.update(graphs=[]), "graphs is empty"),
    ("two graphs of one name", "bert-fp32", lambda w: w["graphs"].append(w["graphs"][0]), "two graphs are called 'model'"),
    ("an unknown key of a graph", "bert-fp32", graph(extra=1), "graphs[] has the unknown key 'extra'"),
    ("a graph without a file", "bert-fp32", graph(files={}), 'expected an object of file names, one of them "default"'),
    ("a graph's files in a list", "bert-fp32", graph(files=["default"]), "expected an object of file names"),
    ("a graph's file by number", "bert-fp32", graph(files={"default": 7}), "expected an object of file names"),
    ("a file that is not listed", "bert-fp32", graph(files={"default": "x.onnx"}), "the file 'x.onnx', which files does not"),
    ("a variant that is not listed", "bert-fp32", graph(files={"default": "model.onnx", "cpu": "/x"}), "names the file '/x'"),
    ("weights that are not listed", "bert-fp32", graph(weights="x"), "names the file 'x', which files does not list"),
    ("weights by number", "bert-fp32", graph(weights=7), "graphs[].weights is 7, expected a string"),
    ("an axis that no input has", "bert-fp32", stranger_axis, "has outputs with the axes ['T'], which no input has"),
    ("an input twice", "bert-fp32", repeated("inputs"), "two tensors are called 'input_ids'"),
    ("an output twice", "bert-fp32", repeated("outputs"), "two tensors are called 'logits'"),
    ("an input as output", "bert-fp32", both_sides, "two tensors are called 'input_ids'"),
    # tensors
    ("an unknown key of a tensor", "bert-fp32", tensors("logits", order="C"), "tensor has the unknown key 'order'"),
    ("a tensor of doubles", "bert-fp32", tensors("logits", dtype="float64"), "dtype is 'float64', expected one of"),
    ("a tensor in half", "bert-fp32", tensors("logits", dtype="float16"), "dtype is 'float16', expected one of int64"),
    ("a state of integers", "gpt-fp32", tensors("key_cache.0", dtype="int64"), "dtype is 'int64', expected one of flo"),
    ("a state in words", "gpt-fp32", tensors("key_cache.0", state="yes"), "state is 'yes', expected true or false"),
    ("an axis that is not there", "bert-fp32", tensors("logits", shape=["Z", 3]), "has 'Z', expected an axis name or a"),
    ("a size of 0", "bert-fp32", tensors("logits", shape=["B", 0]), "has 0, expected an axis name or a size"),
    ("a size of true", "bert-fp32", tensors("logits", shape=["B", True]), "has True, expected an axis name or a size"),
    ("a size of 3.0", "bert-fp32", tensors("logits", shape=["B", 3.0]), "has 3.0, expected an axis name or a size"),
    ("a size without end", "bert-fp32", tensors("logits", shape=["B", 2**31]), "has 2147483648, expected an axis name"),
    ("a default in words", "bert-fp32", tensors("attention_mask", default="many"), "default is 'many', expected an int"),
    ("a default of true", "bert-fp32", tensors("attention_mask", default=True), "default is True, expected an integer"),
    ("a default beyond 32 bits", "bert-fp32", tensors("attention_mask", default=2**32), "default is 4294967296, expected"),
    ("a bound of 0", "bert-fp32", tensors("input_ids", below=0), "below is 0, expected 1.."),
    ("writes a number", "gpt-fp32", tensors("key_cache.0.written", writes=7), "writes is 7, expected a string"),
    # decoders
    ("writes a stranger", "gpt-fp32", tensors("key_cache.0.written", writes="x"), "writes 'x', which is no input"),
    ("a cache of another size", "gpt-fp32", tensors("key_cache.0", shape=["B", 2, "C", 9]), "is no input of its shape"),
    ("caches of rank 3", "gpt-fp32", caches("B", 2, "C"), "is no input of its shape: (B, H, C, D), or"),
    ("caches along another axis", "gpt-fp32", caches("B", 2, "S", 8), "is no input of its shape: (B, H, C, D), or"),
    ("caches along the first axis", "gpt-fp32", caches("C", 2, 9, 8), "is no input of its shape: (B, H, C, D), or"),
    ("two write one", "gpt-fp32", tensors("key_cache.0.written", writes="value_cache.0"), "two outputs write 'value_c"),
    ("logits of rank 2", "gpt-fp32", tensors("logits", shape=["B", "P"]), LOGITS),
    ("logits along another axis", "gpt-fp32", tensors("logits", shape=["B", "S", 32]), LOGITS),
    ("logits of any size", "gpt-fp32", tensors("logits", shape=["B", "P", "C"]), LOGITS),
    ("no write_indices", "gpt-fp32", lambda w: drop(w, "write_indices"), DECODER),
    ("no logits_positions", "gpt-fp32", lambda w: drop(w, "logits_positions"), DECODER),
    ("tokens of rank 1", "gpt-fp32", tensors("input_ids", shape=["B"]), DECODER),
    ("tokens of one length", "gpt-fp32", tensors("input_ids", shape=["B", 7]), DECODER),
    ("tokens of floats", "gpt-fp32", tensors("input_ids", dtype="float32"), DECODER),
    ("tokens without bound", "gpt-fp32", without("input_ids", "below"), DECODER),
    # what is recorded
    ("a tolerance in words", "bert-fp32", lambda w: w["parity"].update(tolerance="wide"), "parity.tolerance is 'wide'"),
    ("no tolerance", "bert-fp32", lambda w: w["parity"].pop("tolerance"), "parity.tolerance is None, expected a number"),
    ("scales in a list", "bert-fp32", lambda w: w["parity"].update(scales=[1]), "parity.scales is no object of numbers"),
    ("scales in words", "bert-fp32", lambda w: w["parity"].update(scales={"x": "1"}), "parity.scales is no object of num"),
    ("INT8 that says not how", "bert-int8", lambda w: w.pop("quantization"), "quantization is missing, and precision is"),
    ("FP32 that was quantised", "bert-int8", lambda w: w.update(precision="fp32"), "quantization is there, and precision"),
    ("modes in words", "bert-int8", quantization(activations="static"), "activations is 'static', expected one of"),
    ("modes of another graph", "bert-int8", quantization(activations={"x": "static"}), "expected one of static, dynamic"),
    ("an unknown mode", "bert-int8", quantization(activations={"model": "fast"}), "expected one of static, dynamic"),
    ("weights of 3 bits", "bert-int8", quantization(weight_bits=3), "weight_bits is 3, expected 7 or 8 of int8"),
    ("weights of 8.0 bits", "bert-int8", quantization(weight_bits=8.0), "weight_bits is 8.0, expected 7 or 8 of int8"),
    ("sums of another kind", "bert-int8", quantization(integer_sums="some"), "integer_sums is 'some', expected one of"),
    ("an engine in words", "bert-fp32", lambda w: w.update(engines={"rtx-sm89": "x"}), "plans is None, expected a listed"),
    ("plans in a list", "bert-fp32", engine(plans=["golden.safetensors"]), "expected a listed file for each of model"),
    ("a plan of another graph", "bert-fp32", engine(plans={"x": "golden.safetensors"}), "expected a listed file for each"),
    ("a plan that is not listed", "bert-fp32", engine(plans={"model": "../x"}), "expected a listed file for each of mod"),
    ("a library by number", "bert-fp32", engine(library=7), "engines.rtx-sm89.library is 7, expected a string"),
    ("an engine of no version", "bert-fp32", engine(version=None), "engines.rtx-sm89.version is None, expected a string"),
    ("a GPU by number", "bert-fp32", engine(sm=89), "engines.rtx-sm89.sm is 89, expected a string"),
    # JSON
    ("nested too deeply", "bert-fp32", lambda w: w.update(config=nested(40)), "nested more than 32 deep"),
    ("NaN", "bert-fp32", lambda w: w["config"].update(x=nan), "NaN is not a JSON number"),
    ("infinity", "bert-fp32", lambda w: w["config"].update(x=-inf), "-Infinity is not a JSON number"),
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.name for path in KEPT.iterdir()))
def test_a_sound_bundle_is_read(name: str) -> None:
    assert Bundle(KEPT / name).manifest.files


@pytest.mark.parametrize(("name", "change", "said"), [row[1:] for row in CLAIMS], ids=[row[0] for row in CLAIMS])
def test_what_bundle_json_claims(kept: Callable[[str], Path], name: str, change: Change, said: str) -> None:
    folder = kept(name)
    rewritten(lambda words: words)(folder)
    assert Bundle(folder).manifest  # sound until then, signed as the damage will be
    rewritten(change)(folder)
    refused(folder, said)


def test_all_problems_are_told_at_once(kept: Callable[[str], Path]) -> None:
    folder = kept("bert-fp32")

    def spoil(words: Words) -> None:
        del words["family"]
        words["precision"] = "fp8"
        words["axes"]["S"]["max"] = 0

    rewritten(spoil)(folder)
    message = refused(folder, "bundle.json.family is missing")
    assert "precision is 'fp8'" in message
    assert "axes.S.max is 0" in message


def test_a_message_is_no_longer_than_a_reader_takes(kept: Callable[[str], Path]) -> None:
    """Keys of a megabyte, with line breaks, a hundred of them."""
    folder = kept("bert-fp32")
    rewritten(lambda w: w.update({f"{number}\n" + "x" * 10_000: 1 for number in range(100)}))(folder)
    message = refused(folder, "has the unknown key")
    assert "(and 92 more)" in message
    assert len(message) < 4_000
