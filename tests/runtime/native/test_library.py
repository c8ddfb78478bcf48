"""Test what is loaded and trusted: libraries that are missing, damaged, of another version; processors that lie."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from native_kernels import Once, native_file
from stub_kernels import HANG, TRAP, WRONG_VALUE, compile_stub
from time_limits import PATIENCE_S
from transom.runtime import disk_cache
from transom.runtime.errors import BackendError
from transom.runtime.native import build, library, trust
from transom.runtime.native.library import NativeStatus, open_library
from transom.runtime.native.records import AVX2, AVX512_BF16, AVX512_VNNI, ISA_NAMES, PLAIN, RECORDS, operators_of
from transom.runtime.native.records import Run as RunRecord


def no_compiler() -> str:
    """Why stubs cannot be built here; empty where they can."""
    try:
        build.compiler()
    except build.BuildError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that has not looked for a library yet, and a cache of its own."""
    for name in (library.NATIVE_ISA, library.NATIVE_LIBRARY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(disk_cache, "_logged", set())
    library.forget()
    yield
    library.forget()


def found(monkeypatch: pytest.MonkeyPatch, path: Path) -> NativeStatus:
    """Return the status of a process that starts with this library."""
    monkeypatch.setenv(library.NATIVE_LIBRARY, str(path))
    library.forget()
    return library.status()


def test_importing_the_runtime_loads_nothing_of_it() -> None:
    code = "import transom.runtime, sys; print([name for name in sys.modules if 'native' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = found(monkeypatch, tmp_path / "absent.so")
    assert status.library is None
    assert status.reason == (
        f"the native library is not there: {tmp_path}/absent.so. "
        "Run `make native`, or install the package again where a C compiler is."
    )
    assert library.native_library() is None


def test_a_damaged_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "damaged.so").write_bytes(b"\x7fELF and nothing else")
    status = found(monkeypatch, tmp_path / "damaged.so")
    assert status.library is None
    assert f"{tmp_path}/damaged.so cannot be loaded: " in status.reason


@needs_compiler
@pytest.mark.parametrize(
    ("stub", "why"),
    [
        ({"abi": 7}, "its interface is version 7, this package needs version 1"),
        ({"sizes": [8] * len(RECORDS)}, "its records take [8, 8, 8, 8, 8, 8, 8, 8, 8, 8] bytes, those of this package"),
        ({"sources": "0123"}, "it was compiled from other sources than those in"),
        ({"missing": "transom_execute"}, "undefined symbol: transom_execute"),
    ],
)
def test_a_library_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stub: dict[str, Any], why: str
) -> None:
    path = compile_stub(tmp_path, **stub)
    status = found(monkeypatch, path)
    assert status.library is None
    assert why in status.reason
    assert "Run `make native`" in status.reason
    with pytest.raises(BackendError):
        open_library(path)


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.NATIVE_ISA, "none")
    assert library.status() == NativeStatus(None, "TRANSOM_NATIVE_ISA=none turns them off")


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.NATIVE_ISA, "avx9")
    status = library.status()
    assert status.library is None
    assert status.reason == "TRANSOM_NATIVE_ISA is 'avx9'; it takes one of none, plain, avx2, avx512_vnni, avx512_bf16"


@needs_compiler
def test_a_processor_that_lies_gets_the_next_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says that it has BF16, whose calls die of SIGILL, and VNNI, whose products are wrong; AVX2 is right."""
    path = compile_stub(tmp_path, executes={AVX512_BF16: TRAP, AVX512_VNNI: WRONG_VALUE})
    status = found(monkeypatch, path)
    assert status.library is not None
    assert (status.library.isa, status.library.name, status.library.compiler) == (AVX2, "avx2", "a stub")
    assert status.reason == "kernels for avx2"
    assert status.passed_over == {
        "avx512_bf16": "the dry call died of SIGILL: this processor does not execute what it claims to have",
        "avx512_vnni": "the dry call failed: slot 0 has 5.0 at 0, the plain kernels 0.0",
    }


@needs_compiler
def test_without_any_right_set_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plain kernels are right, and slower than ONNX Runtime: they are taken where they are asked for alone."""
    path = compile_stub(tmp_path, executes=dict.fromkeys((AVX2, AVX512_VNNI, AVX512_BF16), TRAP))
    status = found(monkeypatch, path)
    assert status.library is None
    assert status.reason == "no kernels here that would be faster than ONNX Runtime's"
    assert list(status.passed_over) == ["avx512_bf16", "avx512_vnni", "avx2"]
    monkeypatch.setenv(library.NATIVE_ISA, "plain")
    status = found(monkeypatch, path)
    assert status.library is not None
    assert status.library.isa == PLAIN


@needs_compiler
def test_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another process starts no child; another library does."""
    path = compile_stub(tmp_path, executes={AVX512_BF16: TRAP})
    first = found(monkeypatch, path)

    def started(*arguments: object, **options: object) -> NoReturn:
        raise OSError("a child was started")

    monkeypatch.setattr(subprocess, "run", started)
    again = found(monkeypatch, path)
    assert (again.reason, again.passed_over) == (first.reason, first.passed_over)
    (tmp_path / "other.so").write_bytes(path.read_bytes() + b"\0")
    other = found(monkeypatch, tmp_path / "other.so")
    assert other.library is None
    assert set(other.passed_over.values()) == {"they could not be tried: a child was started"}


@needs_compiler
def test_a_child_that_could_not_run_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Too slow, or without an interpreter: what one process met is not kept for the next one."""
    path = compile_stub(tmp_path, executes={AVX2: HANG})
    monkeypatch.setenv(library.NATIVE_ISA, "avx2")
    monkeypatch.setattr(trust, "TIMEOUT_S", 0.5)
    assert "timed out after 0.5 seconds" in found(monkeypatch, path).passed_over["avx2"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "")
        assert "sys.executable is not one" in found(monkeypatch, path).passed_over["avx2"]
    assert list((tmp_path / "cache").rglob("avx2-*")) == []


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_time_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in its place")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = compile_stub(tmp_path)
    with caplog.at_level(logging.WARNING, "transom"):
        for _ in range(2):
            assert found(monkeypatch, path).reason == "kernels for avx512_bf16"
    (record,) = caplog.records
    assert "Each process that loads a bundle tries the native kernels anew" in record.message


@needs_compiler
def test_a_damaged_entry_of_the_cache_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = compile_stub(tmp_path)
    found(monkeypatch, path)
    (entry,) = (tmp_path / "cache").rglob("avx512_bf16-*")
    entry.write_text('{"resu')
    assert found(monkeypatch, path).reason == "kernels for avx512_bf16"


def test_every_set_that_this_processor_has_is_right(once: Once) -> None:
    """The real library's dry call, in a child process."""
    path = native_file(once)
    opened = open_library(path)
    supported = [isa for isa in range(len(ISA_NAMES)) if opened.supports(isa)]
    assert supported[0] == PLAIN
    assert {ISA_NAMES[isa]: trust.dry_call(path, isa) for isa in supported} == {
        ISA_NAMES[isa]: (trust.RIGHT, True) for isa in supported
    }


def test_a_cap_is_kept_to(monkeypatch: pytest.MonkeyPatch, once: Once) -> None:
    monkeypatch.setenv(library.NATIVE_ISA, "plain")
    status = found(monkeypatch, native_file(once))
    assert status.library is not None
    assert (status.library.name, status.reason) == (
        "plain",
        "kernels for plain, the most that TRANSOM_NATIVE_ISA allows",
    )


def test_an_unknown_kind_of_operator_is_an_error(once: Once) -> None:
    from transom.runtime.native.records import Operator

    opened = open_library(native_file(once))
    with pytest.raises(BackendError, match=r"has no operator of kind 99\. Run `make native`"):
        opened.execute((Operator * 1)(Operator(kind=99)), RunRecord(threads=1))
    opened.execute(operators_of([]), RunRecord(threads=1))


def test_the_build_names_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O9")
    with pytest.raises(build.BuildError, match=r"CC names 'no-such-compiler', which is not there\. Install one"):
        build.compile_library(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_failed_build_leaves_the_old_library(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.c").write_text("int f( {")
    (tmp_path / "library.so").write_text("the old one")
    with pytest.raises(build.BuildError, match=r"the C compiler failed: .*broken\.c"):
        build.compile_library(tmp_path / "library.so", sources=tmp_path / "broken")
    assert (tmp_path / "library.so").read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "library.so"]
