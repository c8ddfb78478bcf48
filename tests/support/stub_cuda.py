"""Run bundles with device="cuda" where there is no GPU, over CUDA libraries that do nothing: ``make test-cuda-stubs``.

    PYTHONPATH=tests/support python -m stub_cuda

ONNX Runtime's CUDA provider is the real one, from PyPI's onnxruntime-gpu. The libraries below it are stubs that a C
compiler makes here: they report one GPU of SM90, its memory is the host's, and kernels and products leave it as it is.
So sessions open, nodes are assigned to providers, values are bound, copied and kept as on a GPU; the numbers mean
nothing. Every bundle of ``tests/bundles`` must open, must have only arithmetic on sizes on the CPU, and must run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import subprocess
import sys
import venv
from collections import defaultdict
from pathlib import Path
from typing import Any

from paths import REPO, TESTS

BUNDLES = TESTS / "bundles"
NEEDED = ("numpy", "tokenizers", "pillow", "safetensors", "typer", "rich")  # Transom's dependencies without onnxruntime
WANTED = "onnxruntime-gpu>=1.31"  # 256 MB, for CUDA 13
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
SYMBOL = re.compile(r"^ +U (\w+)@{1,2}(lib(?:cudart|cublas|cublasLt|curand)\.so\.\d+)$", re.MULTILINE)
DRIVER = re.compile(r"^ +U (cu[A-Z]\w+)$", re.MULTILINE)
CUDNN, CUDNN_NAME = "libcudnn.so.9", re.compile(rb"\x00(cudnn[A-Z]\w+)(?=\x00)")  # loaded with the provider
CREATED = r"cudnnCreate\w*|cublas(?:Lt)?Create\w*|cublasLt\w+Create|cuda(?:Stream|Event|MemPool)Create\w*"
HEAD = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct {  /* cudaDeviceProp of CUDA 13, as far as it is read, then padding */
    char name[256]; char uuid[16]; char luid[8]; unsigned mask; size_t memory, shared; int registers, warp;
    size_t pitch; int threads, block[3], grid[3]; size_t constant; int major, minor; size_t alignment, texture;
    int processors; char middle[284]; size_t shared_optin; char rest[328];
} Properties;
extern long copied[4];
"""
COPIED, RUNTIME = "long copied[4];  /* bytes: host to host, to the GPU, back, on the GPU */", "libcudart.so.13"
STEP = 64  # bytes per row that a step may copy to the GPU: token, position, and which logits are requested
CODE = {
    "cudaGetDeviceCount": "int F(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "int F(int *n) { *n = 0; return 0; }",
    "cudaGetDeviceProperties": """int F(Properties *p, int device) {
    memset(p, 0, sizeof *p); strcpy(p->name, "stub"); p->memory = 1ull << 36; p->shared = 49152; p->registers = 65536;
    p->warp = 32; p->threads = 1024; p->block[0] = p->block[1] = 1024; p->block[2] = 64; p->grid[0] = 2147483647;
    p->grid[1] = p->grid[2] = 65535; p->major = 9; p->processors = 132; p->shared_optin = 232448; return 0; }""",
    "cudaDeviceGetAttribute": """int F(int *v, int attribute, int device) {
    *v = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 97 ? 232448 : 1;
    return 0; }""",
    "cudaDriverGetVersion": "int F(int *v) { *v = 13000; return 0; }",
    "cudaRuntimeGetVersion": "int F(int *v) { *v = 13000; return 0; }",
    "cudaMalloc": """int F(void **p, size_t n) {
    *p = aligned_alloc(256, (n + 511) / 256 * 256); memset(*p, 0, n); return 0; }""",
    "cudaFree": "int F(void *p) { free(p); return 0; }",
    "cudaMemGetInfo": "int F(size_t *left, size_t *all) { *left = *all = 1ull << 36; return 0; }",
    "cudaMemcpy": """int F(void *to, const void *from, size_t n, int kind) {
    __atomic_fetch_add(&copied[kind & 3], n, __ATOMIC_RELAXED); memmove(to, from, n); return 0; }""",
    "cudaMemcpy2DAsync": """int F(char *to, size_t a, const char *from, size_t b, size_t n, size_t rows) {
    for (size_t i = 0; i < rows; i++) memmove(to + i * a, from + i * b, n); return 0; }""",
    "cudaMemset": "int F(void *p, int v, size_t n) { memset(p, v, n); return 0; }",
    "cudaStreamIsCapturing": "int F(void *s, int *v) { *v = 0; return 0; }",
    "cudaPointerGetAttributes": "int F(int *a, const void *p) { memset(a, 0, 88); *a = 2; return 0; }",
    "cudaFuncGetAttributes": "int F(char *a, const void *f) { memset(a, 0, 144); *(int *)(a + 24) = 1024; return 0; }",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags": "int F(int *n) { *n = 1; return 0; }",
    "__cudaGetKernel": "int F(void **k, void *f) { *k = f; return 0; }",
    "__cudaRegisterFatBinary": "void **F(void *f) { static void *handle[4]; return handle; }",
    "cublasGetMathMode": "int F(void *h, int *mode) { *mode = 0; return 0; }",
    "cublasLtMatmulAlgoGetHeuristic": """int F(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int n,
    void *r, int *found) { *found = 1; return 0; }""",
    "cudnnGetVersion": "size_t F(void) { return 91400; }",
    "cudnnBackendCreateDescriptor": "int F(int kind, void **d) { *d = calloc(1, 256); return 0; }",
    "cudnnBackendGetAttribute": """int F(void *d, int name, int type, int64_t room, int64_t *count, int64_t *found) {
    if (count) *count = type == 15 || type == 3; if (found && room > 0 && type != 15) *found = 0; return 0; }""",
}
SAME = {"cudaMallocHost": "cudaMalloc", "cudaHostAlloc": "cudaMalloc", "cudaMallocFromPoolAsync": "cudaMalloc"}
SAME |= {"cudaFreeHost": "cudaFree", "cudaFreeAsync": "cudaFree", "cudaMemcpyAsync": "cudaMemcpy"}
SAME |= {"cudaMemsetAsync": "cudaMemset"}


def function(name: str) -> str:
    """Return one function in C: the code above, or one that returns a new handle, a string, or success."""
    known = CODE.get(SAME.get(name, name))
    if known is None and re.fullmatch(CREATED, name):
        known = "int F(void **handle) { *handle = calloc(1, 256); return 0; }"
    if known is None and re.search(r"ErrorName|ErrorString|StatusName|StatusString", name):
        known = 'const char *F() { return "stub"; }'
    return (known or "int F() { return 0; }").replace("F(", f"{name}(", 1)


def compile_stubs(provider: Path, folder: Path) -> None:
    """Compile a library of each name that ``provider`` links, with the functions that it imports."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", provider], check=True, capture_output=True, text=True
    ).stdout
    wanted: dict[str, list[str]] = defaultdict(list)
    for name, library in SYMBOL.findall(symbols):
        wanted[library].append(name)
    wanted["libcuda.so.1"] = DRIVER.findall(symbols)
    wanted[CUDNN] = sorted({name.decode() for name in CUDNN_NAME.findall(provider.read_bytes())})
    needed = subprocess.run(["readelf", "-d", provider], check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"NEEDED.*\[(lib(?:cu|nv)\w+\.so\.\d+)\]", needed):
        wanted.setdefault(library, [])  # linked, but without a function that is called
    folder.mkdir(parents=True, exist_ok=True)
    for library, names in wanted.items():
        source, versions = folder / f"{library}.c", folder / f"{library}.map"
        counted = COPIED if library == RUNTIME else ""
        source.write_text("\n".join([HEAD, counted, *map(function, names), ""]))
        versions.write_text(f"{library} {{ global: *; }};\n")
        command: list[str | Path] = [
            "cc",
            "-shared",
            "-fPIC",
            "-w",
            "-o",
            folder / library,
            source,
            f"-Wl,-soname,{library}",
        ]
        versioned = library not in ("libcuda.so.1", CUDNN)
        subprocess.run([*command, *([f"-Wl,--version-script={versions}"] if versioned else [])], check=True)


def copies_of(loaded: Any, tokens: int) -> list[int]:
    """Return the bytes that a generation of ``tokens`` by one row copies: to the GPU, back, and on it."""
    counts = (ctypes.c_long * 4).in_dll(ctypes.CDLL(RUNTIME), "copied")
    before = list(counts)
    loaded.generate([[1, 2]], max_new_tokens=tokens, min_new_tokens=tokens)
    return [after - start for after, start in zip(counts, before, strict=True)][1:]


def check(bundles: list[Path]) -> int:
    """Open and run each bundle on "cuda", print which operators stay on the CPU, return the number of failures."""
    from transom.runtime import load
    from transom.runtime.errors import ParityError, TransomError
    from transom.runtime.selftest import selftest

    failed = 0
    for path in bundles:
        try:
            with load(path, device="cuda", threads=1) as loaded:
                kept = set[str]()
                for file in loaded.manifest.graphs:
                    session: Any = loaded.backend(file.graph.name)._session
                    assert session.get_provider_options()["CUDAExecutionProvider"]["use_tf32"] == "0"
                    parts = session.get_provider_graph_assignment_info()
                    kept |= {node.op_type for part in parts if part.ep_name[:3] == "CPU" for node in part.get_nodes()}
                about = ""
                if hasattr(loaded, "generate"):
                    loaded.generate([[1, 2], [3]], max_new_tokens=3, num_beams=2)
                    to_gpu, back, on_gpu = (
                        (b - a) // 2 for a, b in zip(copies_of(loaded, 2), copies_of(loaded, 4), strict=True)
                    )
                    about = f"; a step copies {to_gpu} bytes to the GPU, {back} back, {on_gpu} there"
                    assert to_gpu <= STEP or loaded.manifest.precision == "bf16", f"caches go to the GPU{about}"
            with contextlib.suppress(ParityError):  # the numbers mean nothing
                selftest(path, device="cuda")
            kept_there = ", ".join(sorted(kept)) or "nothing"
            print(f"{path.parent.name}/{path.name}: runs; on the CPU {kept_there}{about}", flush=True)
        except (TransomError, AssertionError) as error:
            failed += 1
            print(f"{path.parent.name}/{path.name}: FAILED: {error!r}", flush=True)
    print(f"{len(bundles) - failed} passed, {failed} failed")
    return failed


def main() -> int:
    """Make an environment with onnxruntime-gpu and the stubs, and check the bundles in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, help="default: those of tests/bundles")
    parser.add_argument("--work", type=Path, default=REPO / "build" / "stub-cuda")
    parser.add_argument("--onnxruntime", default=WANTED, metavar="REQUIREMENT", help=f"default: {WANTED}")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # run in the new environment
    options = parser.parse_args()
    bundles = options.bundles or sorted(path.parent for path in BUNDLES.glob("*/*/bundle.json"))
    if options.check:
        return int(check(bundles) > 0)
    python = options.work.resolve() / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(options.work / "venv", with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDED, options.onnxruntime], check=True)
    (provider,) = python.parents[1].glob(f"lib/*/site-packages/{PROVIDER}")
    stubs = options.work.resolve() / "lib"
    compile_stubs(provider, stubs)
    environment = os.environ | {"LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": str(REPO / "build" / "typing")}
    return subprocess.run([python, __file__, "--check", *bundles], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
