"""A bundle whose layers can be put back into FP32 from one run to the next, in one session per graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir

from transom.export.passes.layer_switches import SWITCHES, add_linear_switches, add_module_switches
from transom.export.quantization.fidelity import Fidelity, Fp32Outputs
from transom.export.quantization.quantizer import Layer
from transom.export.variants import pack, with_integers
from transom.runtime.backends.base import Array
from transom.runtime.backends.ort import OrtBackend
from transom.runtime.bundle import Bundle
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.loading import load_with_backends


class SwitchedBackend:
    """An ONNX Runtime session over a graph with switches; ``restored`` int64 (n,), 1 where one is thrown."""

    device = "cpu"

    def __init__(self, backend: OrtBackend, layers: int) -> None:
        self._backend = backend
        given = tuple(tensor for tensor in backend.graph.inputs if tensor.name != SWITCHES)
        self.graph: Graph = replace(backend.graph, inputs=given)
        self.restored = np.zeros(layers, np.int64)

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """As a backend does."""
        return self._backend.run({**feeds, SWITCHES: self.restored}, shapes)


class SwitchedBundle:
    """``bundle`` around ``models`` in place of its own graphs, which are used up, with a switch for each of ``layers``.

    ``integers`` says what a CPU session makes of the integers of each graph, where there are any.
    ``fp32`` are the graphs that they were made of, by name: of quantised ones with smoothing folded in, and then the
    layers are the linear ones; of ``half`` precision the canonical graphs, and the layers are the modules. Raises
    BundleError where ``models`` are not made of them.
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
        restore = add_module_switches if half else add_linear_switches
        names = {name: restore(model, fp32[name]) for name, model in models.items()}
        self.layers: list[Layer] = [(graph, name) for graph, found in names.items() for name in found]
        self._names = names
        graphs = tuple(with_switches(file.graph, len(names[file.graph.name])) for file in bundle.manifest.graphs)
        variants = pack(graphs, models, "float32", external_above=0)
        if integers is not None:
            variants = with_integers(variants, integers)
        files = {file.graph.name: file for file in variants.graphs}
        self._backends = {
            name: SwitchedBackend(OrtBackend(file, variants.files.__getitem__, "cpu", threads), len(names[name]))
            for name, file in files.items()
        }
        self._loaded = load_with_backends(bundle, self._backends)

    def measure(self, restored: Collection[Layer], reference: Fp32Outputs) -> Fidelity:
        """How far the bundle is from FP32 with these layers restored."""
        for graph, names in self._names.items():
            self._backends[graph].restored[:] = [(graph, name) in restored for name in names]
        return reference.compare(self._loaded)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loaded.close()


def with_switches(graph: Graph, layers: int) -> Graph:
    return replace(graph, inputs=(*graph.inputs, Tensor(SWITCHES, "int64", (layers,))))
