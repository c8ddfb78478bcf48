"""What is hashed when a bundle is loaded, and files that change while it is."""

from __future__ import annotations

import gc
import hashlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bad_bundles import rewritten
from leases import can_lease, leases
from transom.runtime import bundle as reading
from transom.runtime import load
from transom.runtime.backends import mapped_model, ort
from transom.runtime.bundle import Bundle
from transom.runtime.compare import Comparison
from transom.runtime.errors import BundleError
from transom.runtime.loading import choice_for
from transom.runtime.selftest import SelftestReport, selftest

Kept = Callable[[str], Path]
PLAN = b"an engine of another device"
FEEDS = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.ones((1, 3), np.int64)}


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count by SHA-256 how often whole files were hashed."""
    counts: Counter[str] = Counter()
    sha256 = hashlib.sha256

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self._digest = sha256(data)
            self.update = self._digest.update

        def hexdigest(self) -> str:
            counts[self._digest.hexdigest()] += 1
            return self._digest.hexdigest()

    monkeypatch.setattr(reading.hashlib, "sha256", Counting)
    return counts


def times(counts: Counter[str], folder: Path) -> dict[str, int]:
    """How often each file was hashed; all of them have different contents."""
    files = Bundle(folder, verify=False).manifest.files
    assert len({file.sha256 for file in files.values()}) == len(files)
    return {name: counts[file.sha256] for name, file in files.items()}


def with_plan(folder: Path) -> Path:
    """Add an engine that nothing here can run."""
    (folder / "engines").mkdir()
    (folder / "engines/rtx-sm86.plan").write_bytes(PLAN)
    entry = {"size": len(PLAN), "sha256": hashlib.sha256(PLAN).hexdigest()}
    plans = {"library": "TensorRT-RTX", "version": "1.7.1", "plans": {"model": "engines/rtx-sm86.plan"}}
    rewritten(lambda words: words["files"].update({"engines/rtx-sm86.plan": entry}))(folder)
    rewritten(lambda words: words.update(engines={"rtx-sm86": plans}))(folder)
    return folder


# one graph; weights that two graphs share; no variant for the CPU; weights, tokenizer and ranges
@pytest.mark.parametrize("name", ["bert-bf16", "clip-bf16", "transformer-bf16", "gpt-fp32", "bert-fp32"])
@pytest.mark.parametrize(("opened", "leases"), [(load, True), (load, False), (selftest, True)])
def test_each_file_is_hashed_once(
    kept: Kept, name: str, opened: Any, leases: bool, hashed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kept(name)
    if not leases:
        monkeypatch.setattr(reading, "take_lease", lambda descriptor: False)
    opened(folder)
    assert times(hashed, folder) == dict.fromkeys(Bundle(folder, verify=False).manifest.files, 1)


def test_engines_of_other_devices_are_not_read_to_load(kept: Kept, hashed: Counter[str]) -> None:
    folder = with_plan(kept("bert-fp32"))
    hashed.clear()
    load(folder)
    found = times(hashed, folder)
    assert found.pop("engines/rtx-sm86.plan") == 0
    assert {*found.values()} == {1}
    hashed.clear()
    selftest(folder)
    assert {*times(hashed, folder).values()} == {1}


def test_a_damaged_engine_is_found_by_selftest_and_by_a_whole_reading(kept: Kept) -> None:
    folder = with_plan(kept("bert-fp32"))
    (folder / "engines/rtx-sm86.plan").write_bytes(PLAN.swapcase())
    load(folder)
    assert choice_for(folder).device == "cpu"
    for opened in (selftest, Bundle):
        with pytest.raises(BundleError, match=r"rtx-sm86\.plan does not have the SHA-256"):
            opened(folder)
    (folder / "engines/rtx-sm86.plan").write_bytes(PLAN[:-1])
    with pytest.raises(BundleError, match=r"rtx-sm86\.plan has 26 bytes, bundle\.json says 27"):
        load(folder)


@pytest.mark.parametrize("name", ["model.cpu.onnx", "model.onnx", "model.weights", "golden.safetensors"])
def test_a_changed_file_does_not_load(kept: Kept, name: str) -> None:
    """Those that no session here reads, too: the default file and the golden values."""
    folder = kept("bert-bf16")
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} does not have the SHA-256".replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize("change", ["bytes", "shorter", "longer"])
def test_weights_that_change_while_they_are_read_are_refused(
    kept: Kept, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the file changes, in place, when its beginning is with the library."""
    folder = kept("bert-bf16")
    weights = folder / "model.weights"
    whole = weights.read_bytes()
    pieces, sessions = Bundle.pieces, []
    made = ort.session_from_parts
    monkeypatch.setattr(reading, "take_lease", lambda descriptor: False)

    def changing(self: Bundle, name: str) -> Iterator[memoryview]:
        for index, piece in enumerate(pieces(self, name)):
            yield piece
            if name == weights.name and index == 0:
                with weights.open("r+b") as file:
                    if change == "shorter":
                        file.truncate(len(whole) - 1)
                    else:
                        file.seek(-1 if change == "bytes" else 0, 2)
                        file.write(b"\x7f")

    def noted(parts: Any, make: Any) -> Any:
        sessions.append(made(parts, make))
        return sessions[-1]

    monkeypatch.setattr(reading, "PIECE", 64)
    monkeypatch.setattr(Bundle, "pieces", changing)
    monkeypatch.setattr(ort, "session_from_parts", noted)
    with pytest.raises(BundleError, match=r"model\.weights does not have the SHA-256"):
        load(folder)
    assert sessions == []


@leases
@pytest.mark.parametrize("name", ["bert-bf16", "clip-bf16"])
def test_who_writes_weights_while_they_are_mapped_waits(kept: Kept, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not wait ends the lease: the weights pass through a pipe, as they are then."""
    folder = kept(name)
    before = found_by(selftest(folder))
    mapped, sessions = ort.session_from_mapping, []

    def changing(*given: Any) -> Any:
        with pytest.raises(BlockingIOError):
            reading.os.open(folder / "model.weights", reading.os.O_WRONLY | reading.os.O_NONBLOCK)
        sessions.append(mapped(*given))
        return sessions[-1]

    monkeypatch.setattr(ort, "session_from_mapping", changing)
    assert found_by(selftest(folder)) == before
    assert {*sessions} == {None}
    with (folder / "model.weights").open("r+b") as file:  # no lease is left
        file.write(b"\x7f")
    with pytest.raises(BundleError, match=r"model\.weights does not have the SHA-256"):
        load(folder)


@leases
def test_what_a_session_reads_lives_as_long_as_it(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    made, arrays = ort.session_from_mapping, []

    def noted(model: Any, file: Any, make: Any) -> Any:
        def make_noted(data: bytes, kept: Any) -> Any:
            arrays.extend(weakref.ref(array) for array, _ in kept.values())
            return make(data, kept)

        return made(model, file, make_noted)

    monkeypatch.setattr(ort, "session_from_mapping", noted)
    with load(kept("bert-bf16")) as model:
        gc.collect()
        assert arrays
        assert all(array() is not None for array in arrays)
    del model
    gc.collect()
    assert all(array() is None for array in arrays)


@leases
def test_a_lease_ends_with_the_last_graph_or_with_an_error(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kept("clip-bf16")
    weights = folder / "model.weights"

    with load(folder):
        weights.open("r+b").close()
    for failing in ("image.cpu.onnx", "text.cpu.onnx"):
        with monkeypatch.context() as patch:
            patch.setattr(ort, "require_own_weights", failing_for(failing))
            with pytest.raises(BundleError, match="refused"):
                load(folder)
        reading.os.close(reading.os.open(weights, reading.os.O_WRONLY | reading.os.O_NONBLOCK))


def failing_for(name: str) -> Callable[..., None]:
    def require(graph: Any, device: str, *_: Any) -> None:
        if graph.file_for(device) == name:
            raise BundleError("refused")

    return require


def test_a_graph_that_changes_before_it_is_read_is_refused(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kept("bert-bf16")
    opened = reading.opened

    def changing(folder: Path, name: str) -> Any:
        if name == "model.cpu.onnx":
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return opened(folder, name)

    monkeypatch.setattr(reading, "opened", changing)
    with pytest.raises(BundleError, match=r"model\.cpu\.onnx does not have the SHA-256"):
        load(folder)


@pytest.mark.skipif(not hasattr(reading.os, "mkfifo"), reason="this system has no named pipes")
def test_a_file_that_becomes_a_pipe_is_refused_at_once(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kept("bert-bf16")
    found = reading.regular_file

    def changing(folder: Path, name: str) -> Path:
        path = found(folder, name)
        if name == "model.weights" and path.stat().st_size and armed:
            path.unlink()
            reading.os.mkfifo(path)
        return path

    armed = False
    monkeypatch.setattr(reading, "regular_file", changing)
    bundle = Bundle(folder, verify=False)
    armed = True
    with pytest.raises(BundleError, match=r"model\.weights is no regular file"):
        bundle.read("model.weights")


def test_a_loaded_bundle_does_not_use_its_files(kept: Kept) -> None:
    """Neither new bytes in place nor a cut file reach a session: nothing of it is mapped."""
    folder = kept("bert-bf16")
    with load(folder) as model:
        before = model.run(FEEDS)
        for name in ("model.weights", "model.cpu.onnx"):
            size = (folder / name).stat().st_size
            (folder / name).write_bytes(b"\xff" * (size // 2))
        after = model.run(FEEDS)
        if sys.platform == "linux":
            assert str(folder) not in Path("/proc/self/maps").read_text()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize("name", ["bert-bf16", "clip-bf16", "electra-fp16"])
def test_a_mapping_a_pipe_and_bytes_give_the_same_session(
    kept: Kept, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def note(way: str) -> None:
        made = getattr(ort, way)

        def noted(*given: Any) -> Any:
            used.append(way)
            return made(*given)

        monkeypatch.setattr(ort, way, noted)

    for way in ("session_from_mapping", "session_from_parts"):
        note(way)
    monkeypatch.setattr(mapped_model, "SMALL", 0)
    folder = kept(name)
    pipes = ort.can_pipe() and ort.version_of(ort.onnxruntime()) >= ort.READS_PIPES
    report = found_by(selftest(folder))
    assert {*used} == (
        {"session_from_mapping"} if can_lease() and pipes else {"session_from_parts"} if pipes else set()
    )
    used.clear()
    monkeypatch.setattr(reading, "take_lease", lambda descriptor: False)
    assert found_by(selftest(folder)) == report
    assert {*used} == ({"session_from_parts"} if pipes else set())
    used.clear()
    monkeypatch.setattr(ort, "can_pipe", lambda: False)
    assert found_by(selftest(folder)) == report
    assert used == []


def found_by(report: SelftestReport) -> dict[tuple[str, str, str], Comparison]:
    sides = [(case.name, *side) for case in report.cases for side in case.comparisons.items()]
    return {(name, side, each.tensor): each for name, side, compared in sides for each in compared}
