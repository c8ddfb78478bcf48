"""Each check of a bundle's folder by itself: one damage to a sound bundle, and the error.

The bundles are those kept in tests/bundles: neither torch nor an export is needed, and all of this takes seconds.
"""
# ruff: noqa: E501 - a row is a line

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest

from bad_bundles import Damage, manifest_bytes, refused, rewritten
from transom.runtime.bundle import MAX_MANIFEST_BYTES, Bundle
from transom.runtime.errors import BundleError
from transom.runtime.manifest import MANIFEST, manifest_sha256


def text(change: Callable[[str], str]) -> Damage:
    """bundle.json's text changed, its hash left as it is: of equal values it is the same."""
    return lambda folder: (folder / MANIFEST).write_text(change((folder / MANIFEST).read_text()))


def infinite(folder: Path) -> None:
    """A number that no float holds, under a hash that is right."""
    words = json.loads((folder / MANIFEST).read_text())
    words["config"]["x"] = inf
    words["manifest_sha256"] = manifest_sha256(words)
    (folder / MANIFEST).write_text(json.dumps(words).replace("Infinity", "1e999"))


def elsewhere(name: str) -> Damage:
    """A file moved out of the bundle, and a link to it in its place."""

    def damage(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return damage


def as_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def large(folder: Path) -> None:
    os.truncate(folder / MANIFEST, MAX_MANIFEST_BYTES + 1)


def linked_folder(folder: Path) -> None:
    """A file below a folder that is a link out of the bundle."""
    (folder.parent / "outside").mkdir()
    shutil.copy(folder / "golden.safetensors", folder.parent / "outside/x.plan")
    (folder / "engines").symlink_to(folder.parent / "outside")
    rewritten(lambda w: w["files"].update({"engines/x.plan": w["files"]["golden.safetensors"]}))(folder)


def version(value: Any) -> Damage:
    return rewritten(lambda w: w.update(format_version=value))


DAMAGES: tuple[tuple[str, Damage, str], ...] = (
    ("no folder", shutil.rmtree, "is no folder; expected a bundle"),
    ("no bundle.json", lambda f: (f / MANIFEST).unlink(), "has no bundle.json; it is no bundle, or an incomplete one"),
    ("a folder for bundle.json", as_folder(MANIFEST), "bundle.json is no regular file"),
    ("bundle.json elsewhere", elsewhere(MANIFEST), "bundle.json is a link that leaves the bundle"),
    ("a large bundle.json", large, f"at most {MAX_MANIFEST_BYTES} are read"),
    ("an unsigned change", rewritten(lambda w: w["config"].update(x=1), sign=False), "does not match its own manifest_sha"),
    ("a hash that is a number", rewritten(lambda w: w.update(manifest_sha256=7), sign=False), "manifest_sha256 is 7, expected a"),
    ("another format", rewritten(lambda w: w.update(format="zip")), 'does not say "format": "transom-bundle"'),
    ("a list", manifest_bytes(b"[]"), 'does not say "format": "transom-bundle"'),
    ("a newer version", version(2), "has format version 2, this Transom reads version 1"),
    ("version true", version(True), "has format version True, this Transom reads version 1"),
    ("version 1.0", version(1.0), "has format version 1.0, this Transom reads version 1"),
    ("no JSON", manifest_bytes(b"{"), "is not usable JSON"),
    ("no UTF-8", manifest_bytes(b'"\xff"'), "is not usable JSON"),
    ("an endless array", manifest_bytes(b"[" * 100_000), "is not usable JSON (nested too deeply)"),
    ("a key twice", text(lambda t: t.replace('"format":', '"format": "transom-bundle", "format":', 1)), "a key is given twice"),
    ("a number that is too large", infinite, "1e999 is out of range"),
    ("a file that is missing", lambda f: (f / "model.onnx").unlink(), "has no model.onnx; the bundle is incomplete"),
    ("a folder for a file", as_folder("model.onnx"), "model.onnx is no regular file"),
    ("a file elsewhere", elsewhere("model.onnx"), "model.onnx is a link that leaves the bundle"),
    ("a file in a folder elsewhere", linked_folder, "x.plan is a link that leaves the bundle"),
)  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_what_lies_in_the_folder(kept: Callable[[str], Path], damage: Damage, said: str) -> None:
    folder = kept("bert-fp32")
    damage(folder)
    refused(folder, said)


@pytest.mark.parametrize(
    "name", ["ranges.json", "model.onnx", "model.cpu.onnx", "tokenizer.json", "golden.safetensors"]
)
@pytest.mark.parametrize(
    ("kind", "said"), [("bit", "does not have the SHA-256"), ("end", "it is truncated or changed")]
)
def test_every_listed_file_is_compared_before_anything_reads_it(
    kept: Callable[[str], Path], name: str, kind: str, said: str
) -> None:
    folder = kept("bert-int8")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data if kind == "bit" else data[:-1])
    message = refused(folder, said)
    assert name in message


def test_what_is_read_is_what_was_compared(kept: Callable[[str], Path]) -> None:
    """A file that changes between the two is refused, whatever it became."""
    folder = kept("bert-fp32")
    bundle = Bundle(folder)
    whole = bundle.read("tokenizer.json")
    (folder / "tokenizer.json").write_bytes(whole[:-1] + b" ")
    with pytest.raises(BundleError, match=r"tokenizer\.json does not have the SHA-256"):
        bundle.read("tokenizer.json")
    (folder / "tokenizer.json").write_bytes(whole)
    assert bundle.read("tokenizer.json") == whole
    elsewhere("tokenizer.json")(folder)
    with pytest.raises(BundleError, match=r"tokenizer\.json is a link that leaves the bundle"):
        bundle.read("tokenizer.json")


@pytest.mark.parametrize("name", ["absent", "../bert-fp32/model.onnx", MANIFEST])
def test_only_listed_files_are_read(kept: Callable[[str], Path], name: str) -> None:
    bundle = Bundle(kept("bert-fp32"))
    with pytest.raises(BundleError, match="does not list"):
        bundle.read(name)


def test_a_link_inside_the_bundle_may_stay(kept: Callable[[str], Path]) -> None:
    folder = kept("bert-fp32")
    (folder / "model.onnx").rename(folder / "other")
    (folder / "model.onnx").symlink_to("other")
    assert Bundle(folder).read("model.onnx")


def test_a_file_that_cannot_be_read_is_an_error_of_ours(
    kept: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kept("bert-fp32")
    opened = os.open

    def refuse(path: Any, flags: int, *mode: int, **options: Any) -> int:
        if Path(path).name == "model.onnx":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refuse)
    refused(folder, "model.onnx cannot be read: Permission denied")
