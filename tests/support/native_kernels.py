"""Run kernels of the native library on numpy arrays: of each instruction set, with guard pages around every operand.

    case = Case(kernels, place="end")
    x, y = case.slot(rows), case.out((5, 72))
    case.run(Linear(rows=TOKENS, input=x, row_scale=NONE, matrix=case.matrix(weight), then=case.then(out=y)), tokens=5)
    case[y]  # what the kernel wrote

An operand ends (place "end") or begins ("begin") at a page that cannot be read or written: a kernel that goes past it
ends the process with SIGSEGV. What kernels may only read cannot be written. Outputs hold NaN or 0xA5 before a run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from transom.runtime.errors import BackendError
from transom.runtime.native.build import BuildError, compile_library, hash_of_sources
from transom.runtime.native.library import NativeLibrary, library_path, open_library
from transom.runtime.native.records import (
    F32,
    ISA_NAMES,
    PLAIN,
    S8,
    Attention,
    Epilogue,
    Matrix,
    Run,
    no_epilogue,
    operators_of,
)

PLACES = ("end", "begin")
POISON = 0xA5
SIMDE = Path("/usr/include/simde/x86/avx512.h")
EMULATED = os.environ.get("TRANSOM_TEST_EMULATED") == "1"  # SIMDe for every set, whatever the processor has
SIMDE_FLAGS = ("-DTRANSOM_SIMDE", "-O1")  # -O3 takes a minute and tells nothing more
DTYPES = {np.dtype(np.float32): F32, np.dtype(np.float16): 1, np.dtype(np.uint8): 2, np.dtype(np.int8): S8}

Once = Callable[[str, Callable[[Path], object]], Path]


def protect(address: int, size: int, protection: int) -> None:
    """Change what may be done with whole pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(protection)):
        raise OSError(ctypes.get_errno(), "mprotect")


class GuardedMemory:
    """Arrays that lie against inaccessible pages, kept as long as this is."""

    def __init__(self, place: str) -> None:
        assert place in PLACES
        self._at_end = place == "end"
        self._regions: list[mmap.mmap] = []

    def put(self, array: NDArray[Any], *, align: int = 1, writable: bool = False) -> NDArray[Any]:
        """Return a copy of an array beside a guard page; ``align`` bytes may leave a gap where it should end there."""
        array = np.ascontiguousarray(array)
        page = mmap.PAGESIZE
        room = -(-max(array.nbytes, 1) // page) * page
        region = mmap.mmap(-1, room + 2 * page)
        self._regions.append(region)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        offset = page + ((room - array.nbytes) // align * align if self._at_end else 0)
        copy = np.frombuffer(region, array.dtype, array.size, offset).reshape(array.shape)
        copy[...] = array
        protect(start, page, 0)  # PROT_NONE
        protect(start + page + room, page, 0)
        if not writable:
            protect(start + page, room, mmap.PROT_READ)
        return copy


def address_of(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


class Case:
    """One run of some records over arrays, with the kernels of one instruction set."""

    def __init__(self, kernels: NativeLibrary, place: str = "end", threads: int = 1) -> None:
        self.kernels, self.threads = kernels, threads
        self.memory = GuardedMemory(place)
        self.slots: list[NDArray[Any]] = []

    def __getitem__(self, slot: int) -> NDArray[Any]:
        """Return a copy of what a slot holds."""
        return self.slots[slot].copy()

    def constant(self, array: NDArray[Any] | Sequence[float], dtype: DTypeLike = np.float32, align: int = 1) -> int:
        """Return the address of a copy that cannot be written."""
        return address_of(self.memory.put(np.asarray(array, dtype), align=align))

    def slot(self, array: NDArray[Any], writable: bool = False) -> int:
        """Return the slot of an input of the run, float32, uint8 or int32 as it is."""
        self.slots.append(self.memory.put(array, writable=writable))
        return len(self.slots) - 1

    def out(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> int:
        """Return the slot of an output that holds NaN or POISON."""
        array = np.empty(shape, dtype)
        array.fill(np.nan if array.dtype.kind == "f" else POISON)
        return self.slot(array, writable=True)

    def matrix(
        self,
        weight: NDArray[Any],
        scale: NDArray[Any] | None = None,
        *,
        dtype: int | None = None,
        transposed: bool = False,
    ) -> Matrix:
        """Return a packed weight (k, n), or (n, k) where transposed: int8, float32, or float16 packed as float32."""
        k, n = weight.shape[::-1] if transposed else weight.shape
        source_dtype = DTYPES[weight.dtype]
        packed_dtype = dtype if dtype is not None else S8 if source_dtype == S8 else F32
        room = np.full(self.kernels.packed_bytes(packed_dtype, k, n), POISON, np.uint8)
        panels = self.memory.put(room, align=64, writable=True)
        sums = self.memory.put(np.zeros(n, np.int32), writable=True)
        self.kernels.pack(
            packed_dtype, k, n, source=address_of(self.memory.put(weight)), source_dtype=source_dtype,
            stride=weight.shape[1], transposed=transposed, panels=address_of(panels), column_sum=address_of(sums),
        )  # fmt: skip
        return Matrix(
            k=k, n=n, dtype=packed_dtype, panels=address_of(panels), column_sum=address_of(sums),
            scale=None if scale is None else self.constant(scale),
        )  # fmt: skip

    def then(self, **fields: Any) -> Epilogue:
        """Return an epilogue: numpy arrays become addresses of constants, everything else is as it is."""
        epilogue = no_epilogue()
        for name, value in fields.items():
            setattr(epilogue, name, self.constant(value) if isinstance(value, np.ndarray) else value)
        return epilogue

    def scores(self, attention: Attention, keys: int) -> None:
        """Give an attention its working memory, for up to so many keys on each thread of the run."""
        size = self.kernels.attention_scratch(attention, keys) * self.threads
        array = self.memory.put(np.full(max(size, 1), POISON, np.uint8), align=64, writable=True)
        self.slots.append(array)
        attention.scores = len(self.slots) - 1

    def run(
        self,
        *records: ctypes.Structure,
        tokens: int = 0,
        sequences: int = 0,
        positions: int = 0,
        patches: int = 0,
        lengths: Sequence[int] | None = None,
        column: Sequence[int] | None = None,
        key_valid: Sequence[int] | None = None,
        past: Sequence[int] | None = None,
        cross_valid: NDArray[Any] | None = None,
        capacity: int = 0,
        cross_length: int = 0,
        padded_length: int = 0,
    ) -> None:
        """Execute records. ``lengths`` has the token rows of each sequence, and says how many there are of both."""
        first_row = None
        if lengths is not None:
            tokens, sequences = sum(lengths), len(lengths)
            first_row = self.constant(np.cumsum([0, *lengths]), np.int32)
        table = self.memory.put(np.array([address_of(slot) for slot in self.slots], np.uint64))
        run = Run(
            slots=address_of(table), first_row=first_row,
            column=None if column is None else self.constant(column, np.int32),
            key_valid=None if key_valid is None else self.constant(key_valid, np.uint8),
            past=None if past is None else self.constant(past, np.int32),
            cross_valid=None if cross_valid is None else self.constant(cross_valid, np.uint8),
            capacity=capacity, cross_length=cross_length, padded_length=padded_length, threads=self.threads,
        )  # fmt: skip
        run.rows[:] = (tokens, sequences, positions, patches)
        self.kernels.execute(operators_of(list(records)), run)


def native_file(once: Once) -> Path:
    """Return a library of the sources at hand: the one in place, else one compiled for this session of tests.

    Skips where there is no compiler.
    """
    try:
        return open_library(library_path()).path
    except BackendError:
        return compiled(once, "native")


def compiled(once: Once, name: str, flags: Sequence[str] = ()) -> Path:
    """Compile the library with flags once in a session; skips where there is no compiler."""

    def make(folder: Path) -> None:
        try:
            compile_library(folder / "library.so", flags=flags)
        except BuildError as error:
            (folder / "why").write_text(str(error))

    folder = once(f"{name}-{(hash_of_sources() or '')[:16]}", make)
    if (folder / "why").is_file():
        why = (folder / "why").read_text()
        if "no C compiler" not in why and "this is" not in why:
            pytest.fail(why)
        pytest.skip(why)
    return folder / "library.so"


def kernels_of(isa: str, once: Once) -> NativeLibrary:
    """Return the kernels of an instruction set: its own where the processor has it, else by SIMDe; skips without."""
    number = ISA_NAMES.index(isa)
    library = open_library(native_file(once))
    if library.supports(number) and not (EMULATED and number):
        return library.with_isa(number)
    if not SIMDE.is_file():
        pytest.skip(f"{isa} has to be emulated, and SIMDe is not installed (Debian: libsimde-dev)")
    return open_library(compiled(once, "simde", SIMDE_FLAGS)).with_isa(number)


@pytest.fixture(params=ISA_NAMES)
def kernels(request: pytest.FixtureRequest, once: Once) -> NativeLibrary:
    """Kernels of each instruction set in turn."""
    return kernels_of(request.param, once)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    """Operands that end at, or begin after, a page that cannot be read."""
    return str(request.param)


@pytest.fixture
def plain_kernels(once: Once) -> NativeLibrary:
    """Kernels for any processor."""
    return open_library(native_file(once)).with_isa(PLAIN)
