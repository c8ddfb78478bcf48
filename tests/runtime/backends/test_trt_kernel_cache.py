"""Kernels that TensorRT-RTX compiled are read by the next process."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np

from emulated_gpu import (
    EmulatedTensorRT,
    Put,
)
from transom.runtime import load


def test_compiled_kernels_are_kept_for_the_next_start(
    put: Put, gpu: EmulatedTensorRT, vit_bundle: Path, real_trt: Any
) -> None:
    folder = put(vit_bundle)
    for expected in (1, 1):  # contexts that had to compile: the first load's
        with load(folder, device="tensorrt") as vit:
            vit.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})
        del vit
        gc.collect()
        assert gpu.compiled == expected
    (kept,) = (folder.parent / "cache/transom/kernels").iterdir()
    assert kept.name.startswith(f"tensorrt_rtx-{real_trt.__version__}-sm89-13000-")
    kept.write_bytes(b"of another GPU")
    with load(folder, device="tensorrt") as vit:
        vit.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})
    assert gpu.compiled == 2
