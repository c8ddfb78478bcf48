"""Describe what a build executed, by what, and what it compiled only: recorded with each engine in bundle.json.

Every line comes from something that this build did. What it did not do has no line under ``executed``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transom.export.engine.targets import Target
from transom.export.engine.trt_graphs import TensorRTGraph
from transom.runtime.backends.cuda import Gpu
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.backends.trt_library import NAMES
from transom.runtime.errors import ParityError

COMPILER, INTERPRETED_BY = "triton", "torch"  # Triton's interpreter takes torch's tensors
# max|kernel - body| / max|body|, as in trt_parity.py
TOLERANCES = {"FLOAT": 2e-5, "HALF": 5e-3, "BF16": 4e-2}


@dataclass(frozen=True)
class Evidence:
    """Lines about one graph of an engine: what was executed, and what was compiled and not executed."""

    executed: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence((*self.executed, *other.executed), (*self.compiled, *other.compiled))

    def to_json(self) -> dict[str, Any]:
        return {"executed": list(self.executed), "compiled": list(self.compiled)}


def graph_evidence(worst: float) -> Evidence:
    """Describe the comparison of TensorRT's variant with the bundle (``require_trt_parity``)."""
    library = f"ONNX Runtime {onnxruntime().__version__}"
    return Evidence((f"graph: {library} on a CPU, on the golden inputs, off from the bundle by at most {worst:.1e}",))


def engine_evidence(target: Target, version: str, gpu: Gpu | None) -> Evidence:
    """Describe the building of the engine; ``gpu`` is the one that it was built on, for a library that needs one."""
    library = f"{NAMES[target.library]} {version}"
    if gpu is None:
        return Evidence((), (f"engine: {library} for {target.name}, executed on no GPU by this build",))
    return Evidence((), (f"engine: {library} on {gpu}; none of its outputs were compared",))


def plugin_evidence(graphs: Mapping[str, TensorRTGraph], sm: int) -> dict[str, Evidence]:
    """Compile the plugins' kernels for compute capability ``sm``, run them in Triton's interpreter, and describe both.

    The inputs are random, masks that are constants the graph's own. Without torch nothing is interpreted, and a line
    says so. Raises ParityError for a kernel that does not compute what its function does, EngineError for one that
    cannot be compiled. Needs triton.
    """
    found = {}
    for name, graph in graphs.items():
        found[name] = Evidence()
        if not graph.plugins:
            continue
        from transom.export.plugins.interpreter import interpreted_errors
        from transom.export.plugins.plugin_calls import plugin_calls

        calls, what = plugin_calls(graph.model), f"our kernel of {len(graph.plugins)} attentions"
        kernels = [kernel for call in calls for kernel in call.kernels(sm)]
        version = importlib.metadata.version(COMPILER)
        registers, spilled = (max(each) for each in zip(*(kernel.assembled for kernel in kernels), strict=True))
        ptx = f"PTX of {len(kernels)} variants for SM{kernels[0].capability} by Triton {version}"
        found[name] += Evidence((), (f"{what}: {ptx}, up to {registers} registers, {spilled} bytes spilled",))
        if find_spec(INTERPRETED_BY) is None:
            found[name] += Evidence((), (f"{what}: not run in Triton's interpreter, which needs {INTERPRETED_BY}",))
            continue
        errors = interpreted_errors(calls, sm)
        require_close(errors, [(call.nodes[0], call.dtypes[0]) for call in calls for _ in call.tiles(sm)])
        where = f"Triton {version}'s interpreter on a CPU, {len(errors)} launches"
        found[name] += Evidence((f"{what}: {where}, off from its ONNX function by at most {max(errors):.1e}",))
    return found


def require_close(errors: list[float], launches: list[tuple[str, str]]) -> None:
    """Raise ParityError for the first launch, by its node and dtype, whose error is beyond TOLERANCES."""
    for error, (node, dtype) in zip(errors, launches, strict=True):
        if not error <= TOLERANCES[dtype]:
            raise ParityError(
                f"our attention does not compute what the node {node} does: in Triton's interpreter it is off by "
                f"{error:.2e} of its largest value; {TOLERANCES[dtype]:g} is allowed. No engine was built. Build with "
                "--no-plugin, and report this."
            )
