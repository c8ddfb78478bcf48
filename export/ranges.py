"""Does every intermediate of a graph fit FP16? Measured in FP32, where nothing overflows unseen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from transom.export.passes.precision import FP16_MAX, KEEP_FP32
from transom.export.passes.probe import PREFIX, probe_ranges
from transom.runtime.backend import Array
from transom.runtime.errors import PrecisionError
from transom.runtime.ort import onnxruntime


def largest_values(model: ir.Model, feeds: Iterable[Mapping[str, Array]]) -> dict[str, tuple[float, str]]:
    """The largest absolute value of every intermediate over ``feeds``: tensor -> (value, module path).

    ``model`` is an FP32 graph and is consumed: its outputs become probes.
    """
    modules = probe_ranges(model)
    library = onnxruntime()
    options = library.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # give memory back between shapes
    session = library.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    largest = dict.fromkeys(modules, 0.0)
    for feed in feeds:
        for name, value in zip(modules, session.run(list(modules), dict(feed)), strict=True):
            largest[name] = max(largest[name], float(value))
    return {name.removeprefix(PREFIX): (value, modules[name]) for name, value in largest.items()}


def require_fp16_range(largest: Mapping[str, tuple[float, str]]) -> None:
    """Raise PrecisionError naming the tensors that FP16 would turn into infinity."""
    over = {
        name: (value, module)
        for name, (value, module) in largest.items()
        if not value < FP16_MAX and module.split(".")[0] not in KEEP_FP32
    }
    if over:
        name, (value, module) = next(iter(over.items()))  # the first in the graph: the cause, or nearest to it
        raise PrecisionError(
            f"fp16 cannot hold {len(over)} tensor(s), first {name} (module {module or 'top'}) reaches {value:.6g}, "
            f"fp16 ends at {FP16_MAX:g}; then {', '.join(list(over)[1:6]) or 'none'}. "
            "Export with --precision bf16."
        )
