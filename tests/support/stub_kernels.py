"""Compile libraries that look like the native one and do something else: another version, instructions that trap."""

from __future__ import annotations

import ctypes
from pathlib import Path

from transom.runtime.native.build import compile_library
from transom.runtime.native.records import ABI, RECORDS

TRAP = "__builtin_trap()"  # SIGILL on x86, as of an instruction that the processor does not have
WRONG_VALUE = "((float **)*(void **)run)[0][0] = 5"  # of the first slot
HANG = "for (;;) sleep(1)"


def compile_stub(
    folder: Path,
    *,
    abi: int = ABI,
    sizes: list[int] | None = None,
    sources: str = "",
    missing: str = "",
    executes: dict[int, str] | None = None,
) -> Path:
    """Return a library whose operators do nothing, or what ``executes`` says in C for an instruction set.

    It says that the processor has all of them. ``sources`` is its hash of the sources, ``missing`` a function that it
    lacks. Raises BuildError without a compiler.
    """
    layout = sizes or [ctypes.sizeof(record) for record in RECORDS]
    cases = "".join(f"if (isa == {isa}) {{ {code}; }}\n" for isa, code in (executes or {}).items())
    functions = {
        "transom_abi": f"int transom_abi(void) {{ return {abi}; }}",
        "transom_layout": "void transom_layout(int *sizes) {"
        + "".join(f"sizes[{index}] = {size};" for index, size in enumerate(layout))
        + "}",
        "transom_compiler": 'const char *transom_compiler(void) { return "a stub"; }',
        "transom_sources": f'const char *transom_sources(void) {{ return "{sources}"; }}',
        "transom_supports": "int transom_supports(int isa) { return isa >= 0; }",
        "transom_execute": f"int transom_execute(int isa, void *all, int count, void *run) {{ {cases} return 0; }}",
        "transom_packed_bytes": "long transom_packed_bytes(int isa, int dtype, int k, int n) { return 64; }",
        "transom_pack": "void transom_pack(void) {}",
        "transom_attention_scratch": "long transom_attention_scratch(int isa, void *all, int keys) { return 64; }",
    }
    functions.pop(missing, None)
    (folder / "stub").mkdir(parents=True)
    source = "#include <unistd.h>\n#pragma GCC visibility push(default)\n" + "\n".join(functions.values())
    (folder / "stub" / "stub.c").write_text(source + "\n")
    compile_library(folder / "stub.so", sources=folder / "stub")
    return folder / "stub.so"
