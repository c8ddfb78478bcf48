"""Load the native library and choose the instruction set that its kernels use, once in a process.

The library is trusted with an instruction set only after a child process made a dry call of every kernel with it
(``dry_call.py``): a processor, or what emulates it, may claim instructions that it does not execute. Results are kept
in the user's cache folder, by the library and the processor. ``import transom.runtime`` imports nothing of this.

    TRANSOM_NATIVE_ISA=none             load nothing: ONNX Runtime runs every graph
    TRANSOM_NATIVE_ISA=avx2             use no more than this: one of ISA_NAMES; "plain" has kernels for any processor,
                                        which are chosen in no other way, since ONNX Runtime's are faster
    TRANSOM_NATIVE_LIBRARY=FILE         load another file: a build with sanitizers
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transom.runtime.errors import BackendError
from transom.runtime.native.build import FOLDER, LIBRARY, hash_of_sources
from transom.runtime.native.records import ISA_NAMES, PLAIN, Attention, Operator, Run, declare, mismatch

NATIVE_ISA, NATIVE_LIBRARY = "TRANSOM_NATIVE_ISA", "TRANSOM_NATIVE_LIBRARY"
NO_KERNELS = "none"  # a value of NATIVE_ISA
ABSENT = "the processor does not have it"
BUILD_IT = "Run `make native`, or install the package again where a C compiler is"


class NativeLibrary:
    """The library with the kernels of one instruction set. It may be shared by threads: calls release the GIL."""

    def __init__(self, path: Path, library: ctypes.CDLL, isa: int) -> None:
        self.path, self.isa, self.name = path, isa, ISA_NAMES[isa]
        self.compiler: str = library.transom_compiler().decode(errors="replace")
        self.sources: str = library.transom_sources().decode(errors="replace")  # their hash; empty where it has none
        self._library = library
        self._execute = library.transom_execute

    def with_isa(self, isa: int) -> NativeLibrary:
        """Return the same library with the kernels of another instruction set, trusted or not."""
        return NativeLibrary(self.path, self._library, isa)

    def supports(self, isa: int) -> bool:
        """Return whether the library has kernels of an instruction set that this processor says it executes."""
        return bool(self._library.transom_supports(isa))

    def execute(self, operators: ctypes.Array[Operator], run: Run) -> None:
        """Execute operators in order. Nothing is checked: records and buffers must be as transom.h says.

        Raises BackendError where an operator is of a kind that the library does not know.
        """
        stopped = self._execute(self.isa, operators, len(operators), ctypes.byref(run))
        if stopped:
            kind = operators[stopped - 1].kind
            raise BackendError(f"{self.path} has no operator of kind {kind}. {BUILD_IT}.")

    def packed_bytes(self, dtype: int, k: int, n: int) -> int:
        """Return how many bytes a packed weight (k, n) takes; it must start at a multiple of 64."""
        return int(self._library.transom_packed_bytes(self.isa, dtype, k, n))

    def pack(
        self,
        dtype: int,
        k: int,
        n: int,
        *,
        source: int,
        source_dtype: int,
        stride: int,
        transposed: bool,
        panels: int,
        column_sum: int | None = None,
        column: int = 0,
        columns: int | None = None,
    ) -> None:
        """Pack rows of a weight at the address ``source`` into columns [column, column + columns) of ``panels``.

        ``source`` is (k, columns), or (columns, k) where transposed, with ``stride`` elements from row to row.
        """
        part = n - column if columns is None else columns
        self._library.transom_pack(
            self.isa, dtype, k, n, column, part, source, source_dtype, stride, int(transposed), panels, column_sum
        )

    def attention_scratch(self, attention: Attention, keys: int) -> int:
        """Return how many bytes of working memory each thread needs for up to ``keys`` keys."""
        return int(self._library.transom_attention_scratch(self.isa, ctypes.byref(attention), keys))


@dataclass(frozen=True)
class NativeStatus:
    """The library that runs, or None, and why; ``passed_over`` has better instruction sets that do not run, and why."""

    library: NativeLibrary | None
    reason: str
    passed_over: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what ``transom doctor`` reports: ``instruction_set`` is None where no kernels run."""
        found = self.library
        return {
            "instruction_set": found and found.name,
            "compiler": found and found.compiler,
            "reason": self.reason,
            "passed_over": dict(self.passed_over),
        }


def library_path() -> Path:
    """Return where the library is looked for: beside this module, or where TRANSOM_NATIVE_LIBRARY says."""
    named = os.environ.get(NATIVE_LIBRARY)
    return Path(named) if named else FOLDER / LIBRARY


def open_library(path: Path) -> NativeLibrary:
    """Load the library with its plain kernels, without trying any.

    Raises BackendError where there is none, it cannot be loaded, or it belongs to another version of this package.
    """
    if not path.is_file():
        raise BackendError(f"the native library is not there: {path}. {BUILD_IT}.")
    try:
        library = ctypes.CDLL(str(path))
        declare(library)
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} cannot be loaded: {error}. {BUILD_IT}.") from error
    wrong = mismatch(library)
    built_from = library.transom_sources().decode(errors="replace")
    if wrong is None and built_from and built_from != (hash_of_sources() or built_from):
        wrong = f"it was compiled from other sources than those in {FOLDER / 'src'}"
    if wrong is not None:
        raise BackendError(f"{path} does not belong to this version of the package: {wrong}. {BUILD_IT}.")
    return NativeLibrary(path, library, PLAIN)


_lock = threading.Lock()
_status: NativeStatus | None = None


def native_library() -> NativeLibrary | None:
    """Return the library with the best kernels that this processor executes; None where there are none."""
    return status().library


def status() -> NativeStatus:
    """Return which kernels run in this process and why, found once."""
    global _status
    with _lock:
        if _status is None:
            _status = find()
        return _status


def forget() -> None:
    """Forget what was found, so that the next call looks again: for tests that change the environment."""
    global _status
    with _lock:
        _status = None


def find() -> NativeStatus:
    """Load the library and try its instruction sets, best first."""
    cap = os.environ.get(NATIVE_ISA, ISA_NAMES[-1])
    if cap == NO_KERNELS:
        return NativeStatus(None, f"{NATIVE_ISA}={NO_KERNELS} turns them off")
    if cap not in ISA_NAMES:
        return NativeStatus(None, f"{NATIVE_ISA} is {cap!r}; it takes one of {', '.join((NO_KERNELS, *ISA_NAMES))}")
    try:
        library = open_library(library_path())
    except BackendError as error:
        return NativeStatus(None, str(error))
    from transom.runtime.native.trust import why_not_trusted  # needs hashlib and subprocess, which this far do not

    lowest = PLAIN if cap == ISA_NAMES[PLAIN] else PLAIN + 1
    passed_over: dict[str, str] = {}
    for isa in range(ISA_NAMES.index(cap), lowest - 1, -1):
        name = ISA_NAMES[isa]
        why = ABSENT if not library.supports(isa) else why_not_trusted(library.path, isa)
        if why is None:
            capped = f", the most that {NATIVE_ISA} allows" if NATIVE_ISA in os.environ else ""
            return NativeStatus(library.with_isa(isa), f"kernels for {name}{capped}", passed_over)
        passed_over[name] = why
    return NativeStatus(None, "no kernels here that would be faster than ONNX Runtime's", passed_over)
