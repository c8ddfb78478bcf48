"""Run the plugin's kernels in Triton's interpreter, on a CPU: ``python -m transom.export.plugins.interpreter FOLDER``.

A process of its own, for Triton decides when it is imported whether it compiles or interprets. FOLDER holds
``calls.json``, and ``masks.npz`` for masks that are constants; printed is one number per launch, the largest difference
from the function's body in ONNX Runtime over the largest value. A launch has the grid, the integers and the tile sizes
that TensorRT is told for these shapes. PTX and a GPU's rounding have no part in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from transom.export.plugins.compiled import INPUTS as POINTERS
from transom.export.plugins.flash_attention import attention
from transom.export.plugins.kernel_spec import TileSizes
from transom.export.plugins.layout import product
from transom.export.plugins.plugin_calls import PluginCall, by_the_body, example_inputs
from transom.runtime.errors import EngineError, one_line

CALLS, MASKS = "calls.json", "masks.npz"
HALVES = {"HALF": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def interpreted_errors(calls: Sequence[PluginCall], sm: int) -> list[float]:
    """Return the error of every launch of ``calls`` for a GPU, interpreted in a process of its own.

    Raises EngineError where that process fails. It needs triton and torch, whose tensors the interpreter takes.
    """
    with tempfile.TemporaryDirectory(prefix="transom-interpreter-") as temporary:
        folder = Path(temporary)
        masks = {str(index): call.mask for index, call in enumerate(calls) if call.mask is not None}
        np.savez(folder / MASKS, **masks)  # type: ignore[arg-type]
        described = [{**asdict(call), "mask": None, "nodes": ()} for call in calls]
        (folder / CALLS).write_text(json.dumps({"sm": sm, "calls": described}))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __name__, str(folder)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        said = one_line(RuntimeError(done.stderr.strip().rpartition("\n")[2]))
        raise EngineError(
            f"our attention does not run in Triton's interpreter: {said}. Build with --no-plugin, and report this."
        )
    errors: list[float] = json.loads(done.stdout)
    return errors


def interpret(call: PluginCall, inputs: Sequence[NDArray[Any]], tiles: TileSizes) -> NDArray[np.float32]:
    """Return what the kernel writes, with the integers of a plugin's launch; an element that it leaves out is NaN."""
    import torch

    variant, layout = call.variant, call.layout
    tensors = [torch_tensor(array, dtype) for array, dtype in zip(inputs, call.dtypes, strict=True)]
    output = torch.full_like(tensors[0], torch.nan)
    B, _, S, _ = inputs[0].shape
    sizes = {"B": B, "S": S, "T": inputs[1].shape[2], "P": 1}
    names = ("query", "key", "value", "mask" if variant.mask else "lengths")
    arguments: dict[str, Any] = dict.fromkeys((*POINTERS, "split_ml", "split_acc"))
    arguments |= dict(zip(names, tensors, strict=False)) | {"output": output, "ROWS": 0}
    for name, (factor, letters) in layout.strides(variant).items():
        arguments[name] = product((factor, letters), sizes) if letters else factor
    attention[variant.programs(tiles, B, S), 1](**arguments, **variant.constants(tiles))
    return output.float().numpy()


def torch_tensor(array: NDArray[Any], dtype: str) -> Any:
    """Return an array as torch's tensor, rounded to the half precision of a trt.DataType."""
    import torch

    if array.dtype != np.float32 or dtype not in HALVES:
        return torch.from_numpy(np.ascontiguousarray(array))
    bits = array.astype(HALVES[dtype]).view(np.int16)
    return torch.from_numpy(bits).view(torch.float16 if dtype == "HALF" else torch.bfloat16)


def rounded(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return an array after the rounding of ``torch_tensor``, in FP32 again."""
    keep = array.dtype != np.float32 or dtype not in HALVES
    return array if keep else array.astype(HALVES[dtype]).astype(np.float32)


def errors_of(call: PluginCall, sm: int) -> list[float]:
    """Return the error of each of a call's kernels."""
    inputs = example_inputs(call)
    inputs = [rounded(array, dtype) for array, dtype in zip(inputs, call.dtypes, strict=True)]
    expected = by_the_body(call, inputs)
    largest = float(np.abs(expected).max())
    found = (interpret(call, inputs, tiles) for tiles in call.tiles(sm))
    return [float(np.abs(each - expected).max()) / largest for each in found]


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / CALLS).read_text())
    errors = []
    with np.load(folder / MASKS) as masks:
        for index, about in enumerate(job["calls"]):
            about |= {"dtypes": tuple(about["dtypes"]), "shapes": tuple(map(tuple, about["shapes"])), "nodes": ()}
            about["mask"] = masks.get(str(index))
            errors += errors_of(PluginCall(**about), job["sm"])
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
