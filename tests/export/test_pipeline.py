"""The stages of an export: each piece of work is done once, and the package offers its commands lazily."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import transom.export
from transom.export import bundle_writer, pipeline
from transom.models.checkpoint import Checkpoint
from transom.runtime import bundle as bundle_reader
from transom.runtime.bundle import Bundle
from transom.runtime.manifest import MANIFEST
from transom.runtime.text import tokenizer as text_tokenizer

MakeCheckpoint = Callable[..., Path]


def counted(monkeypatch: pytest.MonkeyPatch, calls: Counter[str], owner: Any, name: str) -> None:
    """Count calls of ``owner.name``, which works as before."""
    function = getattr(owner, name)

    def count(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, count)


def test_an_export_does_each_piece_of_work_once(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bundle.json is written once; each file and the checkpoint are hashed once; the tokenizer is parsed once.

    FP16 has three sides and a run that measures ranges, each of which opens the bundle.
    """
    calls: Counter[str] = Counter()
    hashed: Counter[str] = Counter()
    written: list[str] = []
    sha256, write = hashlib.sha256, bundle_writer.write_bytes

    def hash_and_count(data: Any = b"") -> Any:
        digest = sha256(data)
        hashed[digest.hexdigest()] += 1
        return digest

    def write_and_note(path: Path, data: bytes) -> None:
        written.append(path.name)
        write(path, data)

    folder = make_checkpoint("BertForMaskedLM", num_hidden_layers=1)
    monkeypatch.setattr(hashlib, "sha256", hash_and_count)
    monkeypatch.setattr(bundle_writer, "write_bytes", write_and_note)
    counted(monkeypatch, calls, bundle_reader, "opened")
    counted(monkeypatch, calls, Checkpoint, "sha256")
    counted(monkeypatch, calls, text_tokenizer, "parse_tokenizer")
    pipeline.export(str(folder), tmp_path / "out", precision="fp16", max_sizes={"B": 3})
    monkeypatch.undo()
    assert calls == {"sha256": 1, "parse_tokenizer": 1}
    assert written.count(MANIFEST) == 1
    assert written[-1] == MANIFEST
    files = Bundle(tmp_path / "out").manifest.files
    assert sorted(written[:-1]) == sorted(files)
    assert {name: hashed[file.sha256] for name, file in files.items()} == dict.fromkeys(files, 1)


def test_the_package_offers_its_commands() -> None:
    assert {name for name in transom.export.__all__ if callable(getattr(transom.export, name))} == {
        "build",
        "export",
        "verify",
        "write_report",
    }
    with pytest.raises(AttributeError, match="has no attribute 'run'"):
        _ = transom.export.run
