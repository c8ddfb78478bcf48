"""An export that is interrupted goes on where it stopped, and makes the same bundle."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from conftest import export_to
from transom.export.quantization import calibrate, resume
from transom.export.quantization.options import QuantizeOptions
from transom.export.quantization.resume import Kept, Number
from transom.runtime.bundle import Bundle
from transom.runtime.disk_cache import cache_root

TEXTS = [
    f"{who} {verb} {rest}" for who in ("she", "who", "paris") for verb, rest in (("made", "it"), ("would go", "on"))
]
TEXTS += [f"{text} down" for text in TEXTS]


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, that keeps everything, two samples at a time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(resume, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "CHUNK", 2)


def hashes(bundle: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir()}


@pytest.mark.usefixtures("traced_once")
def test_an_interrupted_export_goes_on_where_it_stopped(
    shallow_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine of twelve texts calibrate, three in each part; Ctrl-C comes at the sixth: two chunks of two were whole.

    Layers were ranked on request: none is measured twice either.
    """
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    ran: list[str] = []
    run_batch, stop_at = calibrate.run_batch, [0]

    def counted(loaded: Any, samples: Any, runner: Any) -> None:
        ran.extend(sample.name for sample in samples)
        if 0 < stop_at[0] <= len(ran):
            raise KeyboardInterrupt
        run_batch(loaded, samples, runner)

    monkeypatch.setattr(calibrate, "run_batch", counted)

    def made(name: str, *, resumes: bool) -> tuple[dict[str, str], int]:
        ran.clear()
        options = QuantizeOptions((str(texts),), smooth=False, gate=False, rank=True, resume=resumes)
        export_to(tmp_path / name, shallow_bert, max_sizes={"B": 2}, precision="int8", quantize=options)
        return hashes(tmp_path / name / "bundle"), len(ran)

    stop_at[0] = 6
    with pytest.raises(KeyboardInterrupt):
        made("interrupted", resumes=True)
    stop_at[0] = 0
    resumed, runs = made("resumed", resumes=True)
    assert runs == 9 - 5, "the first part, and two texts of the second"
    again, runs = made("again", resumes=True)
    assert runs == 0
    anew, runs = made("anew", resumes=False)
    assert runs == 9
    assert resumed == again == anew


def test_what_is_kept_is_of_the_same_model_and_inputs(
    vit_bundle: Path, bert_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[float] = []

    def compute() -> float:
        computed.append(float(len(computed)))
        return computed[-1]

    what = {"stage": "a", "data": "b"}
    kept = Kept(Bundle(vit_bundle))
    assert [kept.compute(what, Number(), compute) for _ in range(2)] == [0.0, 0.0]
    assert Kept(Bundle(vit_bundle)).compute(what, Number(), compute) == 0.0, "another process"
    assert kept.compute({**what, "data": "c"}, Number(), compute) == 1.0
    assert Kept(Bundle(bert_bundle)).compute(what, Number(), compute) == 2.0
    monkeypatch.setattr(resume, "code_sha256", lambda: "changed")
    assert Kept(Bundle(vit_bundle)).compute(what, Number(), compute) == 3.0


@pytest.mark.parametrize("damage", [b"", b"{", b'"1.0"', b"NaN", b"[1.0]", b"\xff"])
def test_what_is_damaged_is_computed_anew(vit_bundle: Path, damage: bytes) -> None:
    kept = Kept(Bundle(vit_bundle))
    assert kept.compute({"stage": "a"}, Number(), lambda: 1.0) == 1.0
    root = cache_root()
    assert root is not None
    (entry,) = (root / "exports").iterdir()
    entry.write_bytes(damage)
    assert kept.compute({"stage": "a"}, Number(), lambda: 2.0) == 2.0
    assert kept.compute({"stage": "a"}, Number(), lambda: 3.0) == 2.0


def test_short_work_is_not_kept(vit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 seconds or more."""
    monkeypatch.setattr(resume, "WORTH_SECONDS", 5.0)
    now = [0.0]
    kept = Kept(Bundle(vit_bundle), clock=lambda: now[0])

    def taking(seconds: float, result: float) -> float:
        now[0] += seconds
        return result

    assert kept.compute({"stage": "a"}, Number(), lambda: taking(4.9, 1.0)) == 1.0
    assert kept.compute({"stage": "a"}, Number(), lambda: taking(5.0, 2.0)) == 2.0
    assert kept.compute({"stage": "a"}, Number(), lambda: taking(5.0, 3.0)) == 2.0
