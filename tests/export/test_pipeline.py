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
from transom.export.variants import WEIGHTS
from transom.models.checkpoint import Checkpoint
from transom.runtime import bundle as bundle_reader
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CheckpointError
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
    others = [name for name in files if name != WEIGHTS]  # which are written and hashed as they come
    assert sorted(written[:-1]) == sorted(others)
    assert {name: hashed[files[name].sha256] for name in others} == dict.fromkeys(others, 1)


def test_a_checkpoint_that_changes_during_its_export_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("BertModel", num_hidden_layers=1)
    compare = pipeline.compare_with_pytorch

    def compare_and_replace(*arguments: Any) -> Any:
        parity = compare(*arguments)
        weights = folder / "model.safetensors"
        (folder / "other").write_bytes(weights.read_bytes())
        (folder / "other").replace(weights)
        return parity

    monkeypatch.setattr(pipeline, "compare_with_pytorch", compare_and_replace)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was exported"):
        pipeline.export(str(folder), tmp_path / "out", max_sizes={"B": 1, "S": 4})
    assert not (tmp_path / "out").exists()


def test_the_package_offers_its_commands() -> None:
    assert {name for name in transom.export.__all__ if callable(getattr(transom.export, name))} == {
        "build",
        "export",
        "verify",
        "write_report",
    }
    with pytest.raises(AttributeError, match="has no attribute 'run'"):
        _ = transom.export.run
