"""Probe one library, the GPU or a bundle's device in this process, and print what was found as one line of JSON.

    python -m transom.runtime.probe library tensorrt_rtx     {"version": ...}
    python -m transom.runtime.probe gpu                      {"gpu": {"name": ..., "compute_capability": ..., ...}}
    python -m transom.runtime.probe device BUNDLE            {"device": ..., "reason": ..., "passed_over": {...}}
    python -m transom.runtime.probe kernels                  {"instruction_set": ..., "reason": ..., ...}

A BackendError is printed as {"problem": message}. `transom doctor` runs this in a process of its own, since a broken
library may end its process or hang. Importing this module loads no library.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from transom.runtime.errors import BackendError

MARK = "transom-probe"  # begins the line of the result: a library may print lines of its own
RESULT = re.compile(rf"^{MARK} (\{{.*\}})$", re.MULTILINE)


def probe(question: Sequence[str]) -> dict[str, Any]:
    """Answer ("library", name), ("gpu",), ("device", bundle), ("kernels",); {"problem": message} for a BackendError."""
    probes: dict[str, Callable[..., dict[str, Any]]] = {
        "library": library_version,
        "gpu": gpu,
        "device": device,
        "kernels": kernels,
    }
    kind, *arguments = question
    try:
        return probes[kind](*arguments)
    except BackendError as error:
        return {"problem": str(error)}


def library_version(name: str) -> dict[str, Any]:
    """Load TensorRT or TensorRT-RTX by the name of its module, and return its version."""
    from transom.runtime.backends.trt_library import library

    return {"version": library(name).__version__}


def gpu() -> dict[str, Any]:
    """Return the GPU that this process runs on, as CUDA describes it."""
    from transom.runtime.backends.cuda import find_gpu

    found = find_gpu()
    return {
        "gpu": {
            "name": found.name,
            "compute_capability": "{}.{}".format(*found.capability),
            "memory": f"{found.memory >> 20} MiB",
            "driver": f"CUDA {found.driver // 1000}.{found.driver % 1000 // 10}",
        }
    }


def device(bundle: str) -> dict[str, Any]:
    """Load a bundle with the device "auto", and return which device that is and why."""
    from transom.runtime.loading import choice_for

    return choice_for(bundle).to_json()


def kernels() -> dict[str, Any]:
    """Load the native library, and return which of its kernels run here and why."""
    from transom.runtime.native.library import status

    return status().to_json()


def result_of(output: str) -> dict[str, Any] | None:
    """Return the result in a probe's standard output; None where there is none."""
    results = RESULT.findall(output)
    return {**json.loads(results[-1])} if results else None


if __name__ == "__main__":
    print(f"\n{MARK}", json.dumps(probe(sys.argv[1:])))
