"""Decoders' bundles that are damaged or made to harm: a BundleError before the graph is loaded."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.runtime import load
from transom.runtime.bundle import manifest_from_json, manifest_sha256
from transom.runtime.errors import BundleError, TransomError
from transom.runtime.generate import GenerationSettings

Exported = Callable[..., tuple[Path, Path]]
Change = Callable[[dict[str, Any]], object]


def rewritten(exported: Exported, architecture: str, folder: Path, change: Change) -> Path:
    """A copy with bundle.json changed and its own hash right again, as an attacker would."""
    bundle = Path(shutil.copytree(exported(architecture)[1], folder / "bundle"))
    words = json.loads((bundle / "bundle.json").read_text())
    change(words)
    words["manifest_sha256"] = manifest_sha256(words)
    (bundle / "bundle.json").write_text(json.dumps(words))
    return bundle


def tensor(words: dict[str, Any], name: str) -> dict[str, Any]:
    graph = words["graphs"][-1]
    (found,) = (entry for entry in (*graph["inputs"], *graph["outputs"]) if entry["name"] == name)
    return found  # type: ignore[no-any-return]


def drop(words: dict[str, Any], name: str) -> None:
    graph = words["graphs"][-1]
    graph["inputs"] = [entry for entry in graph["inputs"] if entry["name"] != name]


SHAPED = r"takes bounded tokens \(B, S\) first, write_indices \(B\) and logits_positions \(B, P\)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: drop(w, "write_indices"), SHAPED),
        (lambda w: drop(w, "logits_positions"), SHAPED),
        (lambda w: drop(w, "input_ids"), SHAPED),
        (lambda w: tensor(w, "write_indices").update(shape=["B", "S"]), SHAPED),
        (lambda w: tensor(w, "write_indices").update(dtype="float32"), "write_indices"),
        (lambda w: tensor(w, "logits_positions").update(dtype="float32"), "logits_positions"),
        (lambda w: tensor(w, "input_ids").update(shape=["B", 7]), SHAPED),
        (lambda w: tensor(w, "input_ids").update(dtype="float32"), SHAPED),
        (lambda w: drop(w, "key_cache.0"), r"'key_cache\.0\.written' writes 'key_cache\.0', which is no input"),
        (lambda w: tensor(w, "key_cache.0.written").update(writes="stranger"), "writes 'stranger', which is no input"),
        (lambda w: tensor(w, "key_cache.0.written").update(writes="input_ids"), "writes 'input_ids', which is no"),
        (lambda w: tensor(w, "key_cache.0.written").update(writes=7), "writes is 7, expected a string"),
        (lambda w: tensor(w, "key_cache.0.written").update(writes="key_cache.1"), r"two outputs write 'key_cache\.1'"),
        (lambda w: tensor(w, "key_cache.0").update(shape=["B", 2, "C", 81]), "no input of its shape"),
        (lambda w: tensor(w, "key_cache.0").update(dtype="int64"), "dtype is 'int64', expected one of float32"),
        (lambda w: tensor(w, "key_cache.0").update(dtype="float64"), "dtype is 'float64'"),
        (lambda w: tensor(w, "key_cache.0").update(state="yes"), "state is 'yes', expected true or false"),
        (lambda w: tensor(w, "input_ids").update(default="many"), "default is 'many'"),
        (lambda w: tensor(w, "input_ids").update(below=0), "below is 0"),
        (lambda w: tensor(w, "logits").update(shape=["B", "P"]), r"gives logits \(B, P, vocabulary\)"),
        (lambda w: tensor(w, "logits").update(shape=["B", "P", "C"]), r"gives logits \(B, P, vocabulary\)"),
        (lambda w: tensor(w, "input_ids").pop("below"), SHAPED),
        (lambda w: w["graphs"][-1].update(name="stranger"), "no graph 'decoder'"),
        (lambda w: w["axes"]["C"].update(like="stranger"), "axes.C is like 'stranger', which is no axis"),
        (lambda w: w["axes"]["C"].update(like=3), "like is 3, expected a string"),
        (lambda w: w["axes"].pop("C"), "'C', expected an axis name"),
        (lambda w: w["axes"].pop("B"), "'B', expected an axis name"),
        (lambda w: w.update(generation=[]), r"generation is \[\], expected an object"),
        (lambda w: w.update(generation={"max_new_tokens": "many"}), "max_new_tokens is 'many'"),
        (lambda w: w.update(generation={"max_new_tokens": -1}), "max_new_tokens is -1"),
        (lambda w: w.update(generation={"temperature": "hot"}), "temperature is 'hot'"),
        (lambda w: w.update(generation={"num_beams": 10**9}), "num_beams is 1000000000"),
        (lambda w: w.update(generation={"eos_token_id": [[1]]}), "eos_token_id is"),
        (lambda w: w.update(generation={"bad_words_ids": "none"}), "bad_words_ids is 'none'"),
        (lambda w: w.update(generation={"surprise": 1}), "unknown key 'surprise'"),
        (lambda w: w.update(generation={"seed": 1}), "unknown key 'seed'"),
    ],
)
def test_claims_about_a_decoder_that_cannot_be(
    exported: Exported, tmp_path: Path, change: Change, message: str
) -> None:
    bundle = rewritten(exported, "GPT2LMHeadModel", tmp_path, change)
    with pytest.raises(BundleError, match=message) as caught:
        load(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["generation"].pop("decoder_start_token_id"), "no decoder_start_token_id"),
        (lambda w: w.update(generation={}), "no decoder_start_token_id"),
        (lambda w: w["graphs"][0]["inputs"][0].pop("below"), "takes prompts is not bounded"),
        (lambda w: w["graphs"].pop(0), "no graph 'encoder'"),
        (lambda w: w["graphs"].pop(1), "no graph 'decoder'"),
        (lambda w: w["graphs"].append(w["graphs"][1]), "two graphs are called 'decoder'"),
        (lambda w: w["axes"].pop("T"), "'T', expected an axis name"),
        (lambda w: w.update(target_tokenizer={"kind": "stranger"}), "tokenizer"),
    ],
)
def test_claims_about_an_encoder_decoder_that_cannot_be(
    exported: Exported, tmp_path: Path, change: Change, message: str
) -> None:
    bundle = rewritten(exported, "MarianMTModel", tmp_path, change)
    with pytest.raises(BundleError, match=message):
        load(bundle)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MarianMTModel"])
def test_other_axes_never_get_past_a_check(exported: Exported, tmp_path: Path, architecture: str) -> None:
    """A context that the graph has not: whoever asks for more positions than there are is told so by one of ours."""

    def longer(words: dict[str, Any]) -> None:
        for name in words["axes"]:
            words["axes"][name]["max"] = 10_000
        for graph in words["graphs"]:
            for entry in graph["inputs"]:
                if "below" in entry:
                    entry["below"] = 10**9

    bundle = rewritten(exported, architecture, tmp_path, longer)
    with contextlib.suppress(BundleError), load(bundle, threads=1) as loaded:
        with pytest.raises(TransomError):
            loaded.generate([5], max_new_tokens=200, num_beams=1)
        with pytest.raises(TransomError):
            loaded.generate([[10**6], [5]], max_new_tokens=2, num_beams=1)


@pytest.mark.parametrize("name", ["write_indices", "key_cache.0", "logits"])
def test_a_graph_that_has_other_names_than_the_manifest(exported: Exported, tmp_path: Path, name: str) -> None:
    bundle = Path(shutil.copytree(exported("GPT2LMHeadModel")[1], tmp_path / "bundle"))
    model = onnx.load(bundle / "decoder.onnx")
    for value in (*model.graph.input, *model.graph.output):
        if value.name == name:
            value.name = "stranger"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["stranger" if given == name else given for given in names]
    data = model.SerializeToString()
    (bundle / "decoder.onnx").write_bytes(data)
    words = json.loads((bundle / "bundle.json").read_text())
    words["files"]["decoder.onnx"] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    words["manifest_sha256"] = manifest_sha256(words)
    (bundle / "bundle.json").write_text(json.dumps(words))
    with pytest.raises(BundleError, match=rf"decoder\.onnx and bundle\.json disagree about .*{name}"):
        load(bundle)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(path=st.lists(st.integers(0, 20), min_size=1, max_size=6), value=JSON)
def test_any_value_anywhere_is_accepted_or_a_bundle_error(exported: Exported, path: list[int], value: Any) -> None:
    words = json.loads((exported("MarianMTModel")[1] / "bundle.json").read_text())
    words.pop("parity", None)
    words["parity"] = {"tolerance": 1.0}
    place, parent, key = words, words, "name"
    for step in path:
        keys = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        if not keys:
            break
        parent, key = place, keys[step % len(keys)]
        place = place[key]
    parent[key] = value
    words["manifest_sha256"] = manifest_sha256(words)
    if words.get("format_version") != 1:
        return
    with contextlib.suppress(BundleError):  # any other exception fails the test
        manifest = manifest_from_json(words)
        GenerationSettings.from_json(manifest.generation or {})


@pytest.mark.parametrize("name", ["eos_token_id", "decoder_start_token_id"])
@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MarianMTModel"])
def test_a_token_past_the_vocabulary_in_the_settings(
    exported: Exported, tmp_path: Path, architecture: str, name: str
) -> None:
    bundle = rewritten(exported, architecture, tmp_path, lambda w: w["generation"].update({name: 10**9}))
    with pytest.raises(TransomError, match=name), load(bundle, threads=1) as gpt:
        gpt.generate([5])


def test_caches_larger_than_memory_are_an_error(exported: Exported, tmp_path: Path) -> None:
    def huge(words: dict[str, Any]) -> None:
        for entry in (*words["graphs"][0]["inputs"], *words["graphs"][0]["outputs"]):
            if "_cache." in entry["name"]:
                entry["shape"] = ["B", 2**31 - 1, "C", 2**31 - 1]

    bundle = rewritten(exported, "GPT2LMHeadModel", tmp_path, huge)
    with pytest.raises(TransomError), load(bundle, threads=1) as gpt:
        gpt.generate([5], max_new_tokens=1)
    with pytest.raises(TransomError), load(bundle, threads=1) as gpt:
        gpt.run({"input_ids": np.ones((1, 1), np.int64)})
