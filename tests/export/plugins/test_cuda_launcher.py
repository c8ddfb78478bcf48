"""What a launch packs, through the real cuda-python, to a libcuda of a few lines that prints what it is given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")
pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")

from cuda.bindings import driver as real_driver

from emulated_driver import compile_elsewhere
from transom.export.plugins.compiled import json_from_compiled

LARGE = {"dtype": "fp16", "size": 128, "heads": 1}  # more shared memory than a launch has without asking

# What cuda-python looks for in libcuda.so.1, and a launch that prints what it was given
LIBCUDA = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long flags, int *status) {
    void *here = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *found = here ? dlsym(here, name) : 0;
    if (status) *status = *found ? 0 : 1;
    return 0;
}
int cuGetProcAddress(const char *name, void **found, int version, unsigned long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuModuleLoadDataEx(void **module, const char *image, unsigned n, const int *options, void **values) {
    printf("%zu %u %d %d %zu\\n", strlen(image), n, options[0], options[1], (size_t)values[1]);
    if (!strstr(image, ".entry")) { strcpy(values[0], "line 1; no entry"); return 218; }
    *module = (void *)7;
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    printf("%zu %s\\n", (size_t)module, name);
    *function = (void *)9;
    return 0;
}
int cuModuleUnload(void *module) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) {
    printf("%zu %d %d\\n", (size_t)function, attribute, value);
    return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned more, unsigned most,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    printf("%zu %u %u %u %u %u %u %u %zu %d\\n", (size_t)function, x, y, z, threads, more, most, shared, (size_t)stream,
           extra == 0);
    for (const char *kind = getenv("PARAMETERS"); *kind; kind++, parameters++)
        if (*kind == 'p') printf("%ld ", *(long *)*parameters); else printf("%d ", *(int *)*parameters);
    printf("\\n");
    fflush(stdout);
    return 0;
}
"""
THROUGH_CUDA_PYTHON = """
import sys
from transom.export.plugins import cuda_launcher as gpu
from transom.export.plugins.compiled import compiled_from_json
gpu.find_gpu, gpu.use_primary_context = lambda: gpu.Gpu("none", (8, 9), 0, 13000), lambda: None
for line in sys.stdin:
    made = compiled_from_json(line)
    try:
        kernel = gpu.Kernel(made)
        addresses = {name: 2**40 + 4096 * n for n, name in enumerate((*made.tensors, *made.outputs))}
        kernel.launch(addresses, 2, 5, 37, stream=77)
    except gpu.BackendError as error:
        sys.stdout.flush()
        print(error, flush=True)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_packing_through_cuda_python(tmp_path: Path) -> None:
    """The real library hands on what we pack: JIT's log, the attribute, the launch, and each parameter in its width."""
    (compiled,) = compile_elsewhere([("attention", 89, LARGE, {}, (128, 64, 8, 2))], tmp_path / "triton")
    (tmp_path / "libcuda.c").write_text(LIBCUDA)
    library = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", tmp_path / "libcuda.so.1", tmp_path / "libcuda.c"]
    subprocess.run(["cc", *library, "-ldl"], check=True)
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(tmp_path),
        "PARAMETERS": "ppp" + "i" * len(compiled.integers) + "p",
    }
    broken = json.dumps(json.loads(json_from_compiled(compiled)) | {"ptx": "nothing"})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THROUGH_CUDA_PYTHON],
        input=f"{json_from_compiled(compiled)}\n{broken}\n",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log, room = (
        int(getattr(real_driver.CUjit_option, f"CU_JIT_ERROR_LOG_BUFFER{more}")) for more in ("", "_SIZE_BYTES")
    )
    most = int(real_driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    addresses = [2**40 + 4096 * n for n in range(4)]
    assert (
        done.stdout.splitlines()[:6]
        == [
            f"{len(compiled.ptx)} 2 {log} {room} 8192",
            "7 attention",
            f"9 {most} {compiled.shared}",
            f"9 2 1 1 {compiled.threads} 1 1 {compiled.shared} 77 1",  # one tile of 5 queries for each of two rows
            " ".join(map(str, [*addresses[:3], *compiled.sizes(2, 5, 37), addresses[3]])) + " ",
            f"7 2 {log} {room} 8192",
        ]
    )
    assert "CUDA_ERROR_INVALID_PTX, and its compiler said: line 1; no entry; expected" in done.stdout
