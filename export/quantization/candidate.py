"""One calibration and one gate: quantised candidates are made and measured here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir

from transom.calib.data import Sample
from transom.calib.table import RangeTable
from transom.export.quantization.calibrate import smoothed
from transom.export.quantization.fidelity import Fp32Outputs
from transom.export.quantization.gate import Gate
from transom.export.quantization.gate_result import GateResult
from transom.export.quantization.quantizer import DYNAMIC, NONE, STATIC, Layer, QuantizationConfig, Quantizer
from transom.export.quantization.switched import SwitchedBundle
from transom.export.variants import open_variants
from transom.runtime.bundle import Bundle
from transom.runtime.graph_spec import Graph
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks import task_class

RANKING_RUNS = 1000  # about as many as one verdict takes: samples times layers
RANKING_SAMPLES = 8, 48  # fewest and most of them
CPU, TENSORRT = "cpu", "default"  # variants, as bundle.json names them
GATED = {STATIC: "static", DYNAMIC: "dynamic", NONE: "weight-only"}  # what the gate calls them


class Candidate:
    """``bundle`` is in FP32; ``table`` holds ranges of its graphs ``canonical``, and smoothing.

    ``half`` says whether everything but int8 is FP16 in the graphs for TensorRT.
    """

    def __init__(
        self,
        bundle: Bundle,
        canonical: Mapping[str, ir.Model],
        config: QuantizationConfig,
        table: RangeTable,
        gate: Gate,
        *,
        half: bool,
    ) -> None:
        self._bundle, self._gate = bundle, gate
        graphs: tuple[Graph, ...] = tuple(file.graph for file in bundle.manifest.graphs)
        smoothing = {name: table.graphs[name].smoothing for name in canonical}
        ranges = {
            name: {tensor: found.histogram for tensor, found in table.graphs[name].tensors.items()}
            for name in canonical
        }
        self.quantizer = Quantizer(smoothed(canonical, smoothing), graphs, config, ranges, half=half)
        self._results: dict[tuple[str, frozenset[Layer]], GateResult] = {}
        self.kinds = {CPU: gated(config.activations.values())}
        if not config.weights_only:
            self.kinds[TENSORRT] = "static"

    def evaluate(self, kind: str, kept: Collection[Layer]) -> GateResult:
        """The variant ``kind``, with ``kept`` in higher precision, on everything that is held out."""
        key = (kind, frozenset(kept))
        if key not in self._results:
            with self.open_variant(kind, kept) as loaded:
                self._results[key] = self._gate.evaluate(loaded, self.kinds[kind])
        return self._results[key]

    def errors_alone(self, reference: Fp32Outputs) -> Iterator[tuple[Layer, float]]:
        """Each layer with the relative output error of the CPU's variant where it alone is quantised."""
        quantizer = self.quantizer
        with SwitchedBundle(self._bundle, quantizer.cpu(), quantizer.models, integers=quantizer.integers) as switched:
            for layer in switched.layers:
                restored = [other for other in switched.layers if other != layer]
                yield layer, switched.measure(restored, reference).error.value

    @contextmanager
    def open_variant(self, kind: str, kept: Collection[Layer]) -> Iterator[LoadedBundle]:
        """A variant as the runtime would load it: the one for TensorRT rounds as a GPU would."""
        made = self.quantizer.cpu_variant(kept) if kind == CPU else self.quantizer.tensorrt_variant(kept)
        with open_variants(self._bundle, made) as loaded:
            yield loaded


def gated(modes: Collection[str]) -> str:
    """The gate's word for graphs of several modes: that of the coarsest."""
    return next(GATED[mode] for mode in (STATIC, DYNAMIC, NONE) if mode in modes)


def ranking_reference(bundle: Bundle, samples: Sequence[Sample], name: str, layers: int) -> Fp32Outputs:
    """FP32's answers on a few of the held-out samples: the fewer, the more layers there are to be ranked by them."""
    fewest, most = RANKING_SAMPLES
    with task_class(bundle.manifest.family)(bundle) as fp32:
        return Fp32Outputs(fp32, samples, name, most=min(most, max(fewest, RANKING_RUNS // max(layers, 1))))
