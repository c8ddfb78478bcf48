"""Make and measure the quantised graphs of one calibration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx_ir as ir

from transom.calib.data import Sample
from transom.calib.table import RangeTable
from transom.export.quantization.calibrate import smoothed
from transom.export.quantization.fidelity import Fp32Outputs
from transom.export.quantization.gate import Gate
from transom.export.quantization.gate_result import GateResult
from transom.export.quantization.options import DYNAMIC, NONE, STATIC, QuantizationConfig
from transom.export.quantization.quantizer import Layer, Quantizer
from transom.export.quantization.switchable import SwitchableBundle
from transom.export.variants import open_variants
from transom.runtime.bundle import Bundle
from transom.runtime.loading import open_bundle
from transom.runtime.session import LoadedBundle

RANKING_RUNS = 1000  # samples times layers; one gate result takes about as many
RANKING_SAMPLES = 8, 48  # fewest and most
CPU, TENSORRT = "cpu", "default"  # variants, as bundle.json names them
GATE_MODES = {STATIC: "static", DYNAMIC: "dynamic", NONE: "weight-only"}  # what the gate calls ACTIVATIONS


class Candidate:
    """The quantised graphs of one calibration, with the gate that they are measured by.

    ``bundle`` is in FP32; ``table`` holds ranges of its graphs ``canonical``, and smoothing. ``half`` says whether
    everything but int8 is FP16 in the graphs for TensorRT.

    gate_modes  how the gate calls the activations of each variant that ships, the one for the CPU first
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
        graphs = tuple(file.graph for file in bundle.manifest.graphs)
        smoothing = {name: table.graphs[name].smoothing for name in canonical}
        ranges = {
            name: {tensor: found.histogram for tensor, found in table.graphs[name].tensors.items()}
            for name in canonical
        }
        self.quantizer = Quantizer(smoothed(canonical, smoothing), graphs, config, ranges, half=half)
        self._results: dict[tuple[str, frozenset[Layer]], GateResult] = {}
        self.gate_modes = {CPU: gate_mode(config.activations.values())} if config.for_cpu else {}
        if config.for_tensorrt:
            self.gate_modes[TENSORRT] = "static"

    @property
    def variant(self) -> str:
        """The variant whose figures stand for the model: the CPU's where it ships."""
        return next(iter(self.gate_modes))

    def evaluate(self, variant: str, high_precision: Collection[Layer]) -> GateResult:
        """Return the gate result of a variant with the layers ``high_precision`` not quantised, computed once."""
        key = (variant, frozenset(high_precision))
        if key not in self._results:
            with self.open_variant(variant, high_precision) as loaded:
                self._results[key] = self._gate.evaluate(loaded, self.gate_modes[variant])
        return self._results[key]

    def layer_errors(self, fp32_outputs: Fp32Outputs) -> Iterator[tuple[Layer, float]]:
        """Yield each layer with the relative output error of the CPU's variant in which it alone is quantised."""
        quantizer = self.quantizer
        with SwitchableBundle(
            self._bundle, quantizer.cpu(), quantizer.models, integers=quantizer.integers
        ) as switchable:
            for layer in switchable.layers:
                others = [other for other in switchable.layers if other != layer]
                yield layer, switchable.measure(others, fp32_outputs).error.value

    def open_variant(self, variant: str, high_precision: Collection[Layer]) -> LoadedBundle:
        """Load a variant as the runtime would; the one for TensorRT rounds as a GPU would."""
        make = self.quantizer.cpu_variant if variant == CPU else self.quantizer.tensorrt_variant
        return open_variants(self._bundle, make(high_precision))


def gate_mode(activations: Collection[str]) -> str:
    """Return how the gate calls graphs whose activations are quantised in several ways: by the coarsest."""
    return next(GATE_MODES[mode] for mode in (STATIC, DYNAMIC, NONE) if mode in activations)


def ranking_outputs(bundle: Bundle, samples: Sequence[Sample], name: str, layers: int) -> Fp32Outputs:
    """Return FP32's outputs on a few of the held-out samples: the more ``layers`` are ranked by them, the fewer."""
    fewest, most = RANKING_SAMPLES
    with open_bundle(bundle) as fp32:
        return Fp32Outputs(fp32, samples, name, most=min(most, max(fewest, RANKING_RUNS // max(layers, 1))))
