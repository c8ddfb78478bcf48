"""Show that a decode step copies neither cache nor weights.

    python benchmarks/decode_copies.py BUNDLE

ONNX Runtime's own profile of decode steps at two capacities: what each kind of node took and the largest tensor it
wrote. A weight that is transposed or repacked at run time would show as a tensor of its size; a cache that is
copied would show as a TensorScatter whose time grows with the capacity. For comparison the same steps with the
cache's outputs left to ONNX Runtime, which then has to copy.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from transom.runtime.backends.base import with_dtypes
from transom.runtime.backends.ort import tensor_dtypes
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.bundle import Bundle
from transom.runtime.host import processor

STEPS = 30
CAPACITIES = (128, 1024)


def session_of(bundle: Bundle, folder: str) -> Any:
    library = onnxruntime()
    options = library.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = f"{folder}/profile"
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    file = next(file for file in bundle.manifest.graphs if file.graph.name == "decoder")
    if file.weights is not None:
        data = bundle.read(file.weights)
        options.add_external_initializers_from_files_in_memory([file.weights], [data], [len(data)])
    return library.InferenceSession(bundle.read(file.file_for("cpu")), options, providers=["CPUExecutionProvider"])


def profile(bundle: Bundle, capacity: int, *, in_place: bool) -> dict[str, tuple[float, int]]:
    """Return per operator (median µs per step over all its nodes, bytes of the largest tensor it wrote)."""
    with tempfile.TemporaryDirectory() as folder:
        session = session_of(bundle, folder)
        file = next(file for file in bundle.manifest.graphs if file.graph.name == "decoder")
        # state is in the dtype of the CPU's file
        graph = with_dtypes(file.graph, tensor_dtypes(session), file.file_for("cpu"), "Export it again.")
        feeds: dict[str, Any] = {
            "input_ids": np.zeros((1, 1), np.int64),
            "write_indices": np.array([5], np.int64),
            "logits_positions": np.zeros((1, 1), np.int64),
        }
        for tensor in graph.inputs:
            if tensor.state:
                _, heads, _, size = tensor.shape
                feeds[tensor.name] = np.zeros((1, int(heads), capacity, int(size)), tensor.dtype)
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        for tensor in graph.outputs:
            if tensor.aliases is not None and in_place:
                buffer = feeds[tensor.aliases]
                binding.bind_output(tensor.name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            else:
                binding.bind_output(tensor.name, "cpu")
        for _ in range(STEPS):
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text())
    per_step: dict[str, list[float]] = defaultdict(lambda: [0.0] * STEPS)
    largest: dict[str, int] = defaultdict(int)
    seen: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        kind = event["args"]["op_name"]
        step = seen[event["name"]]
        seen[event["name"]] += 1
        per_step[kind][step] += event["dur"]
        largest[kind] = max(largest[kind], int(event["args"].get("output_size", 0)))
    return {kind: (statistics.median(times[5:]), largest[kind]) for kind, times in per_step.items()}


def main() -> None:
    print(f"on {processor()}", flush=True)
    bundle = Bundle(sys.argv[1])
    weights = sum(file.size for name, file in bundle.manifest.files.items() if name.endswith((".weights", ".onnx")))
    print(f"weights: {weights / 2**20:.1f} MiB")
    columns = [profile(bundle, capacity, in_place=True) for capacity in CAPACITIES]
    copied = profile(bundle, CAPACITIES[1], in_place=False)
    heads = [f"in place, C={capacity}: µs per step" for capacity in CAPACITIES]
    print(f"| operator | {' | '.join(heads)} | not bound, C={CAPACITIES[1]}: µs | largest tensor written, bytes |")
    print("|---|---|---|---|---|")
    for kind in sorted(columns[0], key=lambda kind: -columns[0][kind][0]):
        times = " | ".join(f"{column[kind][0]:.0f}" for column in (*columns, copied))
        print(f"| {kind} | {times} | {columns[0][kind][1]} |")


if __name__ == "__main__":
    main()
