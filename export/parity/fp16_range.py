"""Does every intermediate of a graph fit FP16? Measured in FP32, where nothing overflows unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from transom.export.passes.half_precision import FP16_MAX, KEEP_FP32
from transom.export.passes.probe import PREFIX, SUM, probe_ranges, probe_sums
from transom.runtime.backends.base import Array
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.errors import PrecisionError
from transom.runtime.graph_spec import Graph

Largest = Mapping[str, tuple[float, str]]  # tensor -> (value, path of the module it comes from)


@dataclass(frozen=True)
class Ranges:
    """What was measured of FP32 graphs: the ``tensors``' largest absolute values, and bounds of partial ``sums``.

    A bound is the largest sum of the absolute values of the terms of any element: what an accumulator may reach on the
    way, in whatever order it adds.
    """

    tensors: Largest = field(default_factory=dict)
    sums: Largest = field(default_factory=dict)


class RangeBackend:
    """An FP32 graph as a backend that notes the largest absolute value of every intermediate it computes.

    ``model`` is consumed: it gets probes as outputs; with ``sums`` those of partial sums too, which are as many
    products again.
    """

    device = "cpu"

    def __init__(self, model: ir.Model, graph: Graph, *, sums: bool = False) -> None:
        self.graph = graph
        self._modules = probe_ranges(model) | (probe_sums(model) if sums else {})
        self._values = dict.fromkeys(self._modules, 0.0)
        self._runs = 0
        library = onnxruntime()
        options = library.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # give memory back between shapes
        options.enable_mem_reuse = False  # ONNX Runtime infers a wrong shape for the scores of cross-attention
        self._session = library.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """As a backend does."""
        written = {tensor.name: tensor.aliases for tensor in self.graph.outputs if tensor.aliases is not None}
        names = [*self._modules, *shapes, *written]
        found = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        self._runs += 1
        for name in self._modules:
            self._values[name] = float(np.maximum(self._values[name], found[name]))  # a NaN stays: max would drop it
        for name, buffer in written.items():
            feeds[buffer][...] = found[name]
        return {name: found[name] for name in shapes}

    def require_runs(self, name: str) -> None:
        """Raise PrecisionError where the graph, called ``name``, never ran: its ranges are all 0."""
        if self._runs == 0:
            raise PrecisionError(
                f"the graph {name} was never run, so no range of its tensors is known; expected a case of each graph. "
                "Report this, with the checkpoint's config.json; --precision fp32 needs no ranges."
            )

    @property
    def largest(self) -> dict[str, tuple[float, str]]:
        """Of every intermediate: tensor -> (value, module path)."""
        return self._found(PREFIX)

    @property
    def sums(self) -> dict[str, tuple[float, str]]:
        """Of every sum of products: tensor -> (bound, module path)."""
        return self._found(SUM)

    def _found(self, prefix: str) -> dict[str, tuple[float, str]]:
        return {
            name.removeprefix(prefix): (value, self._modules[name])
            for name, value in self._values.items()
            if name.startswith(prefix)
        }


def in_half(largest: Largest) -> dict[str, tuple[float, str]]:
    """Those that FP16 holds: all but those of modules that stay in FP32."""
    return {name: found for name, found in largest.items() if found[1].split(".")[0] not in KEEP_FP32}


def beyond_fp16(largest: Largest) -> dict[str, tuple[float, str]]:
    """The tensors that FP16 would turn into infinity."""
    return {name: found for name, found in in_half(largest).items() if not found[0] < FP16_MAX}


def require_fp16_range(largest: Largest) -> None:
    """Raise PrecisionError naming the tensors that FP16 would turn into infinity."""
    over = beyond_fp16(largest)
    if over:
        name, (value, module) = next(iter(over.items()))  # the first in the graph: the cause, or nearest to it
        raise PrecisionError(
            f"fp16 cannot hold {len(over)} tensor(s), first {name} (module {module or 'top'}) reaches {value:.6g}, "
            f"fp16 ends at {FP16_MAX:g}; then {', '.join(list(over)[1:6]) or 'none'}. "
            "Export with --precision bf16."
        )
