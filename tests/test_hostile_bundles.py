"""Bundles that are damaged or made to harm: one BundleError each, before anything is parsed further."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.runtime import load
from transom.runtime.bundle import Bundle, manifest_from_json, manifest_sha256
from transom.runtime.errors import BundleError, TransomError

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def bundle(bert_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_bundle, tmp_path / "bundle"))


def rewrite(bundle: Path, change: Change) -> None:
    """Change bundle.json and make its own hash right again, as an attacker would."""
    words = json.loads((bundle / "bundle.json").read_text())
    change(words)
    words["manifest_sha256"] = manifest_sha256(words)
    (bundle / "bundle.json").write_text(json.dumps(words))


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "golden.safetensors"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_one_changed_byte_in_any_file(bundle: Path, name: str, where: float) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[int(where * len(data)) if where >= 0 else -1] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} does not have the SHA-256"):
        load(bundle)


def test_one_changed_byte_in_the_manifest(bundle: Path) -> None:
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text.replace('"vocab_size": ', '"vocab_size": 1'))
    with pytest.raises(BundleError, match="manifest_sha256"):
        load(bundle)


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "tokenizer.json", "golden.safetensors"])
def test_a_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"has no {name}"):
        load(bundle)


def test_a_truncated_file(bundle: Path) -> None:
    os.truncate(bundle / "model.onnx", 100)
    with pytest.raises(BundleError, match=r"model\.onnx has 100 bytes, bundle\.json says"):
        load(bundle)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/hostname", "a/../../secret", "a//b", "./model.onnx", "a\\b", "a\0b"]
)
def test_a_path_that_leaves_the_folder(bundle: Path, path: str) -> None:
    (bundle.parent / "secret").write_bytes((bundle / "model.onnx").read_bytes())

    def redirect(words: dict[str, Any]) -> None:
        words["files"][path] = words["files"].pop("model.onnx")
        words["graphs"][0]["files"]["default"] = path

    rewrite(bundle, redirect)
    with pytest.raises(BundleError, match="expected a plain relative path that stays in the bundle"):
        load(bundle)


def test_a_link_out_of_the_folder(bundle: Path) -> None:
    shutil.move(bundle / "model.onnx", bundle.parent / "outside.onnx")
    (bundle / "model.onnx").symlink_to(bundle.parent / "outside.onnx")
    with pytest.raises(BundleError, match="link that leaves the bundle"):
        load(bundle)


def test_a_link_inside_the_folder_is_fine(bundle: Path) -> None:
    shutil.move(bundle / "model.onnx", bundle / "stored.onnx")
    (bundle / "model.onnx").symlink_to("stored.onnx")
    load(bundle).close()


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx"])
def test_a_pipe_in_place_of_a_file_does_not_hang(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(BundleError, match="no regular file"):
        load(bundle)


@pytest.mark.parametrize("version", [2, 10**6, 0, -1, "1", 1.0, True, None])
def test_other_format_versions(bundle: Path, version: Any) -> None:
    rewrite(bundle, lambda words: words.update(format_version=version))
    with pytest.raises(BundleError, match=r"this Transom reads version 1\. Upgrade"):
        load(bundle)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": NaN}',
        '{"format": Infinity}',
        '{"format": 1e999}',
        '{"format": ' + "9" * 5_000 + "}",
        '{"format": "transom-bundle", "format": "transom-bundle"}',
        "\xff\xfe",
    ],
    ids=["empty", "null", "deep-array", "deep-object", "nan", "infinity", "huge-float", "huge-int", "twice", "utf-16"],
)
def test_hostile_json(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load(bundle)


def test_a_huge_manifest_is_not_read(bundle: Path) -> None:
    with (bundle / "bundle.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: takes no disk, would take a terabyte of memory
    with pytest.raises(BundleError, match="at most 16777216 are read"):
        load(bundle)


def test_all_problems_are_told_at_once(bundle: Path) -> None:
    def spoil(words: dict[str, Any]) -> None:
        del words["family"]
        words["precision"] = "fp8"
        words["axes"]["S"]["max"] = 0
        words["surprise"] = 1

    rewrite(bundle, spoil)
    with pytest.raises(BundleError) as caught:
        load(bundle)
    for part in ("family is missing", "precision is 'fp8'", "axes.S.max is 0", "unknown key 'surprise'"):
        assert part in str(caught.value)


def test_external_data_of_the_graph_cannot_leave_the_bundle(bundle: Path) -> None:
    from hashlib import sha256

    import onnx

    secret = bundle.parent / "secret.bin"
    secret.write_bytes(bytes(160 * 4))
    for location in ("../secret.bin", str(secret), "/proc/self/environ"):
        model = onnx.load(bundle / "model.onnx")
        weight = next(w for w in model.graph.initializer if list(w.dims) == [160])
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        del weight.external_data[:]
        for key, value in (("location", location), ("offset", "0"), ("length", "640")):
            weight.external_data.add(key=key, value=value)
        data = model.SerializeToString()
        (bundle / "evil.onnx").write_bytes(data)

        def redirect(words: dict[str, Any], data: bytes = data) -> None:
            words["files"]["evil.onnx"] = {"size": len(data), "sha256": sha256(data).hexdigest()}
            words["graphs"][0]["files"]["default"] = "evil.onnx"

        rewrite(bundle, redirect)
        with pytest.raises(TransomError, match="xternal"):
            load(bundle)


def test_a_family_of_a_newer_transom(bundle: Path) -> None:
    rewrite(bundle, lambda words: words.update(family="flamingo"))
    with pytest.raises(BundleError, match=r"'flamingo'; this Transom runs bert, gpt, transformer, vit"):
        load(bundle)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no folder"):
        load(tmp_path / "absent")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(path=st.lists(st.integers(0, 20), min_size=1, max_size=5), value=JSON)
def test_any_value_anywhere_is_accepted_or_a_bundle_error(bert_bundle: Path, path: list[int], value: Any) -> None:
    words = json.loads((bert_bundle / "bundle.json").read_text())
    place, key = words, None
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
        manifest_from_json(words)


def test_what_is_read_is_what_was_hashed(bundle: Path) -> None:
    opened = Bundle(bundle)
    (bundle / "tokenizer.json").write_bytes(bytes(opened.manifest.files["tokenizer.json"].size))
    with pytest.raises(BundleError, match="SHA-256"):
        opened.read("tokenizer.json")


def replace_tensor(words: dict[str, Any], side: str, index: int, **change: Any) -> None:
    words["graphs"][0][side][index].update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["axes"].pop("S"), "'S', expected an axis name"),
        (lambda w: w["tokenizer"].update(file="absent.json"), r"does not list 'absent\.json'"),
        (lambda w: replace_tensor(w, "outputs", 0, shape=["T", 3]), "'T', expected an axis name"),
        (lambda w: w["parity"].update(tolerance="wide"), "tolerance is 'wide', expected a number"),
        (lambda w: w["parity"].update(scales=[1]), "scales is no object of numbers"),
        (lambda w: w.update(config=nested(40)), "nested more than 32 deep"),
    ],
)
def test_claims_that_contradict_each_other(bundle: Path, change: Change, message: str) -> None:
    rewrite(bundle, change)
    with pytest.raises(BundleError, match=message):
        load(bundle)


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


def test_an_output_larger_than_memory_is_an_error(bundle: Path) -> None:
    import numpy as np

    rewrite(bundle, lambda words: replace_tensor(words, "outputs", 1, shape=[2**31 - 1, 2**31 - 1]))
    with load(bundle) as bert, pytest.raises(TransomError, match="failed on cpu"):
        bert.run({"input_ids": np.ones((1, 1), np.int64)})


def test_a_tokenizer_that_never_ends_is_an_error(bundle: Path) -> None:
    from hashlib import sha256

    words = json.loads((bundle / "tokenizer.json").read_text())
    words["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    data = json.dumps(words).encode()
    (bundle / "tokenizer.json").write_bytes(data)
    entry = {"size": len(data), "sha256": sha256(data).hexdigest()}
    rewrite(bundle, lambda words: words["files"].update({"tokenizer.json": entry}))
    with load(bundle) as bert, pytest.raises(TransomError, match="cannot be tokenized"):
        bert.embed("a" * 60 + "!")
