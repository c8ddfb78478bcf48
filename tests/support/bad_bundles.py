"""The part of the sweep's table that is about bundles: what is done to one, and what its reader is told."""
# ruff: noqa: E501 - a row is a line

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import as_quantized
from transom.runtime.backends.kernels import AUTO, ONNXRUNTIME
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError, BundleError, InputError, TransomError
from transom.runtime.manifest import MANIFEST, manifest_sha256

Words = dict[str, Any]
Damage = Callable[[Path], object]  # what is done to a copy


@dataclass(frozen=True)
class Row:
    """One bad input.

    on         a bundle or checkpoint of ``test_sweep.MAKERS``; the damage is done to a copy of it
    said       what the message matches
    call       what is asked of the loaded bundle, where loading it is not yet the mistake
    arguments  of the same request at the command line, behind the command and the bundle; None: it has none
    kernels    what is to execute the bundle: ONNX Runtime, where the damage is to the file that it alone reads
    """

    what: str
    on: str
    damage: Damage
    error: type[TransomError]
    said: str
    call: Callable[[Any], object] | None = None
    arguments: tuple[str, ...] | None = ("5",)
    kernels: str = AUTO


def refused(folder: Path, said: str) -> str:
    """Require a BundleError with ``said`` on one printable line, whatever the file holds; return the message."""
    with pytest.raises(BundleError, match=re.escape(said)) as caught:
        Bundle(folder)
    message = str(caught.value)
    assert message.isprintable()
    return message


def nothing(bundle: Path) -> None:
    """The bundle is as it should be, the request is not."""


def rewritten(change: Callable[[Words], object], *, sign: bool = True) -> Damage:
    """bundle.json changed, and its own hash made right again, as an attacker would."""

    def damage(bundle: Path) -> None:
        words = json.loads((bundle / MANIFEST).read_text())
        change(words)
        if sign:
            words["manifest_sha256"] = manifest_sha256(words)
        (bundle / MANIFEST).write_text(json.dumps(words))

    return damage


def replaced(name: str, data: Callable[[bytes], bytes]) -> Damage:
    """A file with other bytes, for which bundle.json vouches."""

    def damage(bundle: Path) -> None:
        made = data((bundle / name).read_bytes())
        (bundle / name).write_bytes(made)
        entry = {"size": len(made), "sha256": sha256(made).hexdigest()}
        rewritten(lambda words: words["files"].update({name: entry}))(bundle)

    return damage


def tokenizer(change: Callable[[Words], object]) -> Damage:
    def data(before: bytes) -> bytes:
        words = json.loads(before)
        change(words)
        return json.dumps(words).encode()

    return replaced("tokenizer.json", data)


def manifest_bytes(data: bytes) -> Damage:
    return lambda bundle: (bundle / MANIFEST).write_bytes(data)


def flipped(name: str, where: float) -> Damage:
    """One changed bit."""

    def damage(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[min(int(where * len(data)), len(data) - 1)] ^= 1
        (bundle / name).write_bytes(data)

    return damage


def redirected(path: str) -> Damage:
    """The graph's file by another path, which may lead to a file outside."""

    def change(words: Words) -> None:
        words["files"][path] = words["files"].pop("model.onnx")
        words["graphs"][0]["files"]["default"] = path

    def damage(bundle: Path) -> None:
        shutil.copy(bundle / "model.onnx", bundle.parent / "secret")
        rewritten(change)(bundle)

    return damage


def linked_out(bundle: Path) -> None:
    shutil.move(bundle / "model.onnx", bundle.parent / "outside.onnx")
    (bundle / "model.onnx").symlink_to(bundle.parent / "outside.onnx")


def piped(name: str) -> Damage:
    def damage(bundle: Path) -> None:
        (bundle / name).unlink()
        os.mkfifo(bundle / name)

    return damage


def huge(bundle: Path) -> None:
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: takes no disk, would take a terabyte of memory


def external(location: str) -> Damage:
    """A weight of the graph in a file of its own, wherever that is."""

    def data(before: bytes) -> bytes:
        import onnx

        model = onnx.load_from_string(before)
        weight = next(w for w in model.graph.initializer if list(w.dims) == [160])
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "640")):
            weight.external_data.add(key=key, value=value)
        return bytes(model.SerializeToString())

    def damage(bundle: Path) -> None:
        (bundle.parent / "secret.bin").write_bytes(bytes(640))
        replaced("model.onnx", data)(bundle)

    return damage


def renamed(name: str) -> Damage:
    """A graph that calls one of its tensors otherwise than bundle.json does."""

    def data(before: bytes) -> bytes:
        import onnx

        model = onnx.load_from_string(before)
        for value in (*model.graph.input, *model.graph.output):
            value.name = "stranger" if value.name == name else value.name
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["stranger" if given == name else given for given in names]
        return bytes(model.SerializeToString())

    return replaced("decoder.onnx", data)


def tensor(words: Words, name: str) -> Words:
    graph = words["graphs"][-1]
    found: Words = next(entry for entry in (*graph["inputs"], *graph["outputs"]) if entry["name"] == name)
    return found


def drop(words: Words, name: str) -> None:
    graph = words["graphs"][-1]
    graph["inputs"] = [entry for entry in graph["inputs"] if entry["name"] != name]


def nested(depth: int) -> Words:
    return {"a": nested(depth - 1)} if depth else {}


def spoilt(words: Words) -> None:
    del words["family"]
    words["precision"] = "fp8"
    words["axes"]["S"]["max"] = 0
    words["surprise"] = 1


def quantized(precision: str = "int8", **fields: Any) -> Callable[[Words], object]:
    def change(words: Words) -> None:
        as_quantized(words)
        words["precision"] = precision
        words["quantization"].update(fields)

    return change


def vast_caches(words: Words) -> None:
    for entry in (*words["graphs"][0]["inputs"], *words["graphs"][0]["outputs"]):
        if "_cache." in entry["name"]:
            entry["shape"] = ["B", 2**31 - 1, "C", 2**31 - 1]


def longer(words: Words) -> None:
    """Axes and vocabularies that the graph has not."""
    for axis in words["axes"].values():
        axis["max"] = 10_000
    for graph in words["graphs"]:
        for entry in graph["inputs"]:
            if "below" in entry:
                entry["below"] = 10**9


SHAPED = r"takes bounded tokens \(B, S\) first, write_indices \(B\) and logits_positions \(B, P\)"
GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
TWICE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}
ENDLESS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
ONE = {"input_ids": np.ones((1, 1), np.int64)}


def bundle(what: str, on: str, damage: Damage, said: str, kernels: str = AUTO) -> Row:
    return Row(what, on, damage, BundleError, said, kernels=kernels)


# what is done to bundle.json, which then signs itself again
CLAIMS: tuple[tuple[str, str, Callable[[Words], object], str], ...] = (
    ("several at once", "bert", spoilt, "family is missing; .*precision is 'fp8'.*axes.S.max is 0|axes.S.max is 0"),
    ("an unknown key", "bert", lambda w: w.update(surprise=1), "unknown key 'surprise'"),
    ("a family of a newer Transom", "bert", lambda w: w.update(family="mamba"), "'mamba'; this Transom runs bert,"),
    ("no axis S", "bert", lambda w: w["axes"].pop("S"), "'S', expected an axis name"),
    ("a tokenizer that is not there", "bert", lambda w: w["tokenizer"].update(file="absent.json"), "does not list 'absent"),
    ("a tokenizer outside", "bert", lambda w: w["tokenizer"].update(file="../x"), r"file is '\.\./x', expected the name"),
    ("a tokenizer of another kind", "bert", lambda w: w["tokenizer"].update(kind="marian"), "kind is 'marian', expected"),
    ("an axis nobody has", "bert", lambda w: tensor(w, "pooler_output").update(shape=["T", 3]), "'T', expected an axis"),
    ("a tolerance in words", "bert", lambda w: w["parity"].update(tolerance="wide"), "tolerance is 'wide', expected a"),
    ("scales as a list", "bert", lambda w: w["parity"].update(scales=[1]), "scales is no object of numbers"),
    ("a deep config", "bert", lambda w: w.update(config=nested(40)), "nested more than 32 deep"),
    ("no graphs", "bert", lambda w: w.update(graphs=[]), "graphs is empty"),
    ("labels that are numbers", "vit", lambda w: w.update(labels=[1, 2]), "labels is .*expected an array of strings"),
    ("a resize to nothing", "vit", lambda w: w["preprocess"].update(height=0), "height is 0"),
    ("a std of zero", "vit", lambda w: w["preprocess"].update(std=[0, 0, 0]), "std is 0"),
    ("no logit scale", "clip", lambda w: w["options"].clear(), "logit_scale is None, expected a positive number"),
    # quantisation
    ("INT8 that says not how", "bert", lambda w: w.update(precision="int8"), "quantization is missing, and precision is 'int8'"),
    ("FP32 that was quantised", "bert", quantized(precision="fp32"), "quantization is there, and precision is 'fp32'"),
    ("a quantisation in words", "bert", lambda w: w.update(precision="int4", quantization="w8a8"), "quantization is 'w8a8', expected an"),
    ("activations in words", "bert", quantized(activations="static"), "activations is 'static', expected one of static, dynamic, none for"),
    ("an unknown mode", "bert", quantized(activations={"model": "fast"}), "'fast'.*, expected one of static, dynamic, none for each of model"),
    ("a mode that is a list", "bert", quantized(activations={"model": []}), "activations is .*expected one of"),
    ("the modes of another graph", "bert", quantized(activations={"decoder": "static"}), "activations is .*for each of model"),
    ("weights of 3 bits", "bert", quantized(weight_bits=3), "weight_bits is 3, expected 7 or 8 of int8"),
    ("weights of 8.0 bits", "bert", quantized(weight_bits=8.0), r"weight_bits is 8\.0, expected 7 or 8 of int8"),
    ("weights of no bits", "bert", quantized(weight_bits=None), "weight_bits is None, expected 7 or 8 of int8"),
    ("INT4 of 8 bits", "bert", quantized(precision="int4", weight_bits=8), "weight_bits is 8, expected 4 of int4"),
    ("INT8 of 4 bits", "bert", quantized(weight_bits=4), "weight_bits is 4, expected 7 or 8 of int8"),
    # families whose methods run other graphs
    ("ViT as BERT", "vit", lambda w: w.update(family="bert"), "family bert.*takes pixel_values"),
    ("BERT as ViT", "bert", lambda w: w.update(family="vit"), "family vit.*'pixel_values' does not fit"),
    ("CLIP as ViT", "clip", lambda w: w.update(family="vit"), "no graph 'model', which vit runs"),
    ("GPT as Transformer", "gpt", lambda w: w.update(family="transformer"), "no graph 'encoder'|no decoder_start"),
    ("Transformer as GPT", "marian", lambda w: w.update(family="gpt"), "family gpt.*'input_ids' does not fit"),
    # a decoder's graph
    ("no write_indices", "gpt", lambda w: drop(w, "write_indices"), SHAPED),
    ("no logits_positions", "gpt", lambda w: drop(w, "logits_positions"), SHAPED),
    ("no input_ids", "gpt", lambda w: drop(w, "input_ids"), SHAPED),
    ("write_indices of rank 2", "gpt", lambda w: tensor(w, "write_indices").update(shape=["B", "S"]), SHAPED),
    ("write_indices of floats", "gpt", lambda w: tensor(w, "write_indices").update(dtype="float32"), "write_indices"),
    ("positions of floats", "gpt", lambda w: tensor(w, "logits_positions").update(dtype="float32"), "logits_positions"),
    ("tokens of one length", "gpt", lambda w: tensor(w, "input_ids").update(shape=["B", 7]), SHAPED),
    ("tokens of floats", "gpt", lambda w: tensor(w, "input_ids").update(dtype="float32"), SHAPED),
    ("tokens without bound", "gpt", lambda w: tensor(w, "input_ids").pop("below"), SHAPED),
    ("a bound of 0", "gpt", lambda w: tensor(w, "input_ids").update(below=0), "below is 0"),
    ("a default in words", "gpt", lambda w: tensor(w, "input_ids").update(default="many"), "default is 'many'"),
    ("a cache nobody takes", "gpt", lambda w: drop(w, "key_cache.0"), r"'key_cache\.0\.written' writes 'key_cache\.0', which"),
    ("writes a stranger", "gpt", lambda w: tensor(w, "key_cache.0.written").update(writes="x"), "writes 'x', which is no"),
    ("writes the tokens", "gpt", lambda w: tensor(w, "key_cache.0.written").update(writes="input_ids"), "'input_ids', which"),
    ("writes a number", "gpt", lambda w: tensor(w, "key_cache.0.written").update(writes=7), "writes is 7, expected a string"),
    ("two write one", "gpt", lambda w: tensor(w, "key_cache.0.written").update(writes="key_cache.1"), "two outputs write"),
    ("a cache of another size", "gpt", lambda w: tensor(w, "key_cache.0").update(shape=["B", 2, "C", 81]), "of its shape"),
    ("a cache of integers", "gpt", lambda w: tensor(w, "key_cache.0").update(dtype="int64"), "dtype is 'int64', expected"),
    ("a cache of doubles", "gpt", lambda w: tensor(w, "key_cache.0").update(dtype="float64"), "dtype is 'float64'"),
    ("state in words", "gpt", lambda w: tensor(w, "key_cache.0").update(state="yes"), "state is 'yes', expected true or"),
    ("logits of rank 2", "gpt", lambda w: tensor(w, "logits").update(shape=["B", "P"]), r"gives logits \(B, P, vocab"),
    ("logits of any size", "gpt", lambda w: tensor(w, "logits").update(shape=["B", "P", "C"]), r"gives logits \(B, P,"),
    ("a graph of another name", "gpt", lambda w: w["graphs"][-1].update(name="stranger"), "no graph 'decoder'"),
    ("an axis like a stranger", "gpt", lambda w: w["axes"]["C"].update(like="x"), "axes.C is like 'x', which is no axis"),
    ("an axis like a number", "gpt", lambda w: w["axes"]["C"].update(like=3), "like is 3, expected a string"),
    ("no axis C", "gpt", lambda w: w["axes"].pop("C"), "'C', expected an axis name"),
    ("no axis B", "gpt", lambda w: w["axes"].pop("B"), "'B', expected an axis name"),
    # generation
    ("settings as a list", "gpt", lambda w: w.update(generation=[]), r"generation is \[\], expected an object"),
    ("tokens in words", "gpt", lambda w: w.update(generation={"max_new_tokens": "many"}), "max_new_tokens is 'many'"),
    ("fewer than no tokens", "gpt", lambda w: w.update(generation={"max_new_tokens": -1}), "max_new_tokens is -1"),
    ("a hot temperature", "gpt", lambda w: w.update(generation={"temperature": "hot"}), "temperature is 'hot'"),
    ("a billion beams", "gpt", lambda w: w.update(generation={"num_beams": 10**9}), "num_beams is 1000000000"),
    ("nested EOS", "gpt", lambda w: w.update(generation={"eos_token_id": [[1]]}), "eos_token_id is"),
    ("bad words in words", "gpt", lambda w: w.update(generation={"bad_words_ids": "none"}), "bad_words_ids is 'none'"),
    ("an unknown setting", "gpt", lambda w: w.update(generation={"surprise": 1}), "unknown key 'surprise'"),
    ("a stored seed", "gpt", lambda w: w.update(generation={"seed": 1}), "unknown key 'seed'"),
    ("no start token", "marian", lambda w: w["generation"].pop("decoder_start_token_id"), "no decoder_start_token_id"),
    ("no settings", "marian", lambda w: w.update(generation={}), "no decoder_start_token_id"),
    ("sources without bound", "marian", lambda w: w["graphs"][0]["inputs"][0].pop("below"), "takes prompts is not bound|whose values are below None"),
    ("no encoder", "marian", lambda w: w["graphs"].pop(0), "no graph 'encoder'"),
    ("no decoder", "marian", lambda w: w["graphs"].pop(1), "no graph 'decoder'"),
    ("two decoders", "marian", lambda w: w["graphs"].append(w["graphs"][1]), "two graphs are called 'decoder'"),
    ("no axis T", "marian", lambda w: w["axes"].pop("T"), "'T', expected an axis name"),
    ("a strange target", "marian", lambda w: w.update(target_tokenizer={"kind": "stranger"}), "tokenizer"),
)  # fmt: skip

JSON: tuple[tuple[str, bytes, str], ...] = (
    ("empty", b"", "not usable JSON"),
    ("null", b"null", "does not say"),
    ("a deep array", b"[" * 100_000, "not usable JSON"),
    ("a deep object", b'{"a":' * 100_000, "not usable JSON"),
    ("NaN", b'{"format": NaN}', "NaN is not a JSON number"),
    ("Infinity", b'{"format": Infinity}', "Infinity is not a JSON number"),
    ("a huge float", b'{"format": 1e999}', "1e999 is out of range"),
    ("a huge integer", b'{"format": ' + b"9" * 5_000 + b"}", "not usable JSON"),
    ("a key twice", b'{"format": "transom-bundle", "format": "transom-bundle"}', "a key is given twice"),
    ("UTF-16", b"\xff\xfe", "not usable JSON"),
    ("another format", b'{"format": "zip"}', "the folder is no bundle of Transom"),
)

BUNDLES = (
    *(
        bundle(f"a changed bit of {name} at {where}", "bert", flipped(name, where), f"{name} does not have the SHA-256")
        for name in ("model.onnx", "tokenizer.json", "golden.safetensors")
        for where in (0, 0.5, 1)
    ),
    *(
        bundle(f"no {name}", "bert", lambda b, name=name: (b / name).unlink(), f"has no {name}")  # type: ignore[misc]
        for name in (MANIFEST, "model.onnx", "tokenizer.json", "golden.safetensors")
    ),
    *(
        bundle(f"a graph at {path!r}", "bert", redirected(path), "expected a plain relative path that stays")
        for path in ("../secret", "/etc/hostname", "a/../../secret", "a//b", "./model.onnx", "a\\b", "a\0b")
    ),
    *(
        bundle(f"version {v!r}", "bert", rewritten(lambda w, v=v: w.update(format_version=v)), r"reads version 1\. Upgr")  # type: ignore[misc]
        for v in (2, 10**6, 0, -1, "1", 1.0, True, None)
    ),
    *(bundle(f"bundle.json: {what}", "bert", manifest_bytes(data), said) for what, data, said in JSON),
    *(bundle(what, on, rewritten(change), said) for what, on, change, said in CLAIMS),
    *(bundle(f"another name of {n}", "gpt", renamed(n), rf"decoder\.onnx and bundle\.json disagree about .*{n}",
             ONNXRUNTIME)
      for n in ("write_indices", "key_cache.0", "logits")),
    bundle("unsigned", "bert", rewritten(lambda w: w["config"].update(vocab_size=1), sign=False), "manifest_sha256"),
    bundle("a truncated graph", "bert", lambda b: os.truncate(b / "model.onnx", 100), r"has 100 bytes, bundle\.json says"),
    bundle("a link out", "bert", linked_out, "link that leaves the bundle"),
    bundle("a pipe as bundle.json", "bert", piped(MANIFEST), "no regular file"),
    bundle("a pipe as a graph", "bert", piped("model.onnx"), "no regular file"),
    bundle("a terabyte of bundle.json", "bert", huge, "at most 16777216 are read"),
    bundle("no folder", "bert", shutil.rmtree, "is no folder"),
    # tokenizers that bundle.json vouches for
    bundle("no tokenizer at all", "bert", replaced("tokenizer.json", lambda data: b"{}"), "the tokenizer cannot be used"),
    bundle("half a tokenizer", "bert", replaced("tokenizer.json", lambda data: data[:999]), "the tokenizer cannot be used"),
    bundle(
        "a normaliser that panics", "bert", tokenizer(lambda t: t.update(normalizer={"type": "Precompiled"})), "cannot be used"
    ),
    bundle(
        "a text a billion times as long", "bert",
        tokenizer(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [GROW] * 9})), r"1e\+09 times as long",
    ),
    bundle(
        "bytes of bytes of bytes", "bert",
        tokenizer(lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTES] * 40})), "times as long",
    ),
    bundle(
        "a template of templates", "bert",
        tokenizer(lambda t: t.update(post_processor={"type": "Sequence", "processors": [TWICE] * 30})), "times as long",
    ),
    Row(
        "a pattern that never ends", "bert", tokenizer(lambda t: t.update(pre_tokenizer=ENDLESS)), InputError,
        "cannot be tokenized", lambda bert: bert.embed("a" * 60 + "!"), ("a" * 60 + "!",),
    ),
    # graphs that bundle.json vouches for
    *(
        Row(f"a weight at {where}", "bert", external(where), TransomError, "reads weights from", kernels=ONNXRUNTIME)
        for where in ("../secret.bin", "/etc/hostname", "/proc/self/environ")
    ),
    Row("a graph that is none", "bert", replaced("model.onnx", lambda data: b"onnx"), BackendError, "cannot load model", kernels=ONNXRUNTIME),
    Row("half a graph", "bert", replaced("model.onnx", lambda data: data[: len(data) // 2]), BundleError, "is no ONNX model", kernels=ONNXRUNTIME),
    Row(
        "an output larger than memory", "bert",
        rewritten(lambda w: tensor(w, "last_hidden_state").update(shape=[2**31 - 1, 2**31 - 1])), TransomError,
        "failed on cpu", lambda bert: bert.run(ONE), None, ONNXRUNTIME,
    ),
    Row(
        "caches larger than memory", "gpt", rewritten(vast_caches), TransomError, "",
        lambda gpt: gpt.generate([5], max_new_tokens=1), ("5", "--max-new-tokens", "1"),
    ),
    Row(
        "caches larger than memory, raw", "gpt", rewritten(vast_caches), TransomError, "", lambda gpt: gpt.run(ONE), None
    ),
    *(
        Row(
            f"more positions than there are, {on}", on, rewritten(longer), TransomError, "",
            lambda model: model.generate([5], max_new_tokens=200, num_beams=1), None,  # where it streams until then
        )
        for on in ("gpt", "marian")
    ),
    *(
        Row(f"a token past the vocabulary, {on}", on, rewritten(longer), TransomError, "",
            lambda model: model.generate([[10**6], [5]], max_new_tokens=2, num_beams=1), None)
        for on in ("gpt", "marian")
    ),
    *(
        Row(f"{n} past the vocabulary, {on}", on, rewritten(lambda w, n=n: w["generation"].update({n: 10**9})),  # type: ignore[misc]
            TransomError, n, lambda model: model.generate([5]))
        for on in ("gpt", "marian") for n in ("eos_token_id", "decoder_start_token_id")
    ),
)  # fmt: skip
