"""Load a bundle whose layers can be switched to FP32 between two runs, in one session per graph."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir

from transom.export.passes.layer_switches import SWITCHES, add_layer_switches, add_module_switches
from transom.export.quantization.fidelity import Fidelity, Fp32Outputs
from transom.export.quantization.quantizer import Layer
from transom.export.variants import pack, with_integers
from transom.runtime.backends.base import Array
from transom.runtime.backends.ort import OrtBackend
from transom.runtime.bundle import Bundle
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.loading import load_with_backends


class SwitchableBackend:
    """An ONNX Runtime session over a graph with switches; ``switches`` int64 (n,), 1 where a layer is in FP32."""

    device = "cpu"

    def __init__(self, backend: OrtBackend, layers: int) -> None:
        self._backend = backend
        inputs = tuple(tensor for tensor in backend.graph.inputs if tensor.name != SWITCHES)
        self.graph: Graph = replace(backend.graph, inputs=inputs)
        self.switches = np.zeros(layers, np.int64)

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Run the graph as any backend does, with the switches as they are."""
        return self._backend.run({**feeds, SWITCHES: self.switches}, shapes)


class SwitchableBundle:
    """``bundle`` with ``models`` in place of its own graphs and a switch for each of ``layers``.

    ``models`` are consumed. ``integers`` says how a CPU session computes the integers of each graph, where there are
    any. ``fp32`` are the graphs that ``models`` were made of, by name: for quantised ones with smoothing folded in, and
    then the layers are those that were quantised; for ``half`` precision the canonical graphs, and the layers are the
    modules. ``sha256`` are the hashes of all files, in hex, by name.
    Raises BundleError where ``models`` are not made of them.
    """

    def __init__(
        self,
        bundle: Bundle,
        models: Mapping[str, ir.Model],
        fp32: Mapping[str, ir.Model],
        *,
        half: bool = False,
        integers: Mapping[str, str] | None = None,
        threads: int | None = None,
    ) -> None:
        add_switches = add_module_switches if half else add_layer_switches
        self._names = {name: add_switches(model, fp32[name]) for name, model in models.items()}
        self.layers: list[Layer] = [(graph, name) for graph, names in self._names.items() for name in names]
        graphs = tuple(with_switches(file.graph, len(self._names[file.graph.name])) for file in bundle.manifest.graphs)
        variants = pack(graphs, models, "float32", external_above=0)
        if integers is not None:
            variants = with_integers(variants, integers)
        self.sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in variants.files.items()}
        self._backends = {
            file.graph.name: SwitchableBackend(
                OrtBackend(file, variants.files.__getitem__, "cpu", threads), len(self._names[file.graph.name])
            )
            for file in variants.graphs
        }
        self._loaded = load_with_backends(bundle, self._backends)

    def measure(self, fp32_layers: Collection[Layer], fp32_outputs: Fp32Outputs) -> Fidelity:
        """Compare the bundle with FP32 while ``fp32_layers`` are switched to FP32."""
        for graph, names in self._names.items():
            self._backends[graph].switches[:] = [(graph, name) in fp32_layers for name in names]
        return fp32_outputs.compare(self._loaded)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loaded.close()


def with_switches(graph: Graph, layers: int) -> Graph:
    """Return the graph with the input SWITCHES, int64 (layers,)."""
    return replace(graph, inputs=(*graph.inputs, Tensor(SWITCHES, "int64", (layers,))))
