"""Make and measure the quantised graphs of one calibration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from transom.calib.data import Sample
from transom.calib.histogram import Histogram
from transom.calib.table import RangeTable
from transom.export.quantization.calibrate import smoothed
from transom.export.quantization.fidelity import Fp32Outputs
from transom.export.quantization.gate import Gate
from transom.export.quantization.gate_result import GateResult
from transom.export.quantization.options import DYNAMIC, NONE, STATIC, QuantizationConfig
from transom.export.quantization.quantizer import Layer, Quantizer
from transom.export.quantization.remembered_rows import remembering
from transom.export.quantization.resume import Kept, Number
from transom.export.quantization.switchable import SwitchableBundle
from transom.export.variants import open_variants
from transom.runtime.bundle import Bundle
from transom.runtime.loading import open_bundle
from transom.runtime.manifest_graphs import NATIVE
from transom.runtime.progress import Counter
from transom.runtime.session import LoadedBundle

FEW_SAMPLES, MOST_SAMPLES = 8, 48  # of the held-out ones: all layers are ranked on the few, the upper quarter on more
UPPER = 0.25  # of the layers, at least UPPER_LAYERS: a search seldom goes further down
UPPER_LAYERS = 8
RANKING_RUNS = 500  # samples times layers of that quarter
CPU, TENSORRT = "cpu", "default"  # variants, as bundle.json names them
GATE_MODES = {STATIC: "static", DYNAMIC: "dynamic", NONE: "weight-only"}  # what the gate calls ACTIVATIONS


class Candidate:
    """The quantised graphs of one calibration, with the gate that they are measured by.

    ``bundle`` is in FP32; ``quantizer`` makes quantised graphs of its own, whose weights lie in ``folder``, or where
    temporary files do, until their sessions are open. ``release`` is called when those were closed.

    gate_modes  how the gate calls the activations of each variant that ships, the one for the CPU first
    """

    def __init__(
        self,
        bundle: Bundle,
        quantizer: Quantizer,
        gate: Gate,
        folder: Path | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._bundle, self.quantizer, self._gate = bundle, quantizer, gate
        self._folder, self._release = folder, release
        self._results: dict[tuple[str, frozenset[Layer]], GateResult] = {}
        config = quantizer.config
        self.gate_modes = {CPU: gate_mode(config.activations.values())} if config.for_cpu else {}
        if config.for_tensorrt:
            self.gate_modes[TENSORRT] = "static"
        if quantizer.lowers:  # last: none is measured behind one that does not hold
            self.gate_modes[NATIVE] = self.gate_modes[CPU]

    @property
    def variant(self) -> str:
        """The variant whose figures stand for the model: the CPU's where it ships."""
        return next(iter(self.gate_modes))

    def evaluate(self, variant: str, high_precision: Collection[Layer]) -> GateResult:
        """Return the gate result of a variant with the layers ``high_precision`` not quantised, computed once."""
        key = (variant, frozenset(high_precision))
        if key not in self._results:
            with self.open_variant(variant, high_precision) as opened, remembering(self._bundle, opened) as loaded:
                self._results[key] = self._gate.evaluate(loaded, self.gate_modes[variant])
            self._release()
        return self._results[key]

    def open_switchable(self) -> SwitchableBundle:
        """Load the CPU's variant with a switch for each layer, which has it compute in FP32."""
        quantizer = self.quantizer
        return SwitchableBundle(self._bundle, quantizer.cpu(), quantizer.models, integers=quantizer.integers)

    def open_variant(self, variant: str, high_precision: Collection[Layer]) -> LoadedBundle:
        """Load a variant as the runtime would; the one for TensorRT rounds as a GPU would."""
        quantizer = self.quantizer
        make = {CPU: quantizer.cpu_variant, NATIVE: quantizer.native_variant, TENSORRT: quantizer.tensorrt_variant}
        with TemporaryDirectory(dir=self._folder, prefix=".measured-") as folder:
            made = make[variant](Path(folder), high_precision)
            return open_variants(self._bundle, made, native=variant == NATIVE)


def quantizer_of_table(
    bundle: Bundle,
    canonical: Mapping[str, ir.Model],
    config: QuantizationConfig,
    table: RangeTable,
    *,
    half: bool,
    watch: bool = False,
    native: bool = False,
) -> Quantizer:
    """Return what quantises ``canonical``, the FP32 graphs of ``bundle``, by ``table`` and the smoothing in it.

    ``half``, ``watch`` and ``native`` are as for a Quantizer.
    """
    graphs = tuple(file.graph for file in bundle.manifest.graphs)
    smoothing = {name: table.graphs[name].smoothing for name in canonical}
    ranges = histograms(table, canonical)
    return Quantizer(smoothed(canonical, smoothing), graphs, config, ranges, half=half, watch=watch, native=native)


def histograms(table: RangeTable, names: Collection[str]) -> dict[str, dict[str, Histogram]]:
    """Return the histograms of a table's tensors, by graph, of ``names``, and tensor."""
    return {name: {tensor: found.histogram for tensor, found in table.graphs[name].tensors.items()} for name in names}


def gate_mode(activations: Collection[str]) -> str:
    """Return how the gate calls graphs whose activations are quantised in several ways: by the coarsest."""
    return next(GATE_MODES[mode] for mode in (STATIC, DYNAMIC, NONE) if mode in activations)


def rank_layers(
    candidate: Candidate,
    bundle: Bundle,
    samples: Sequence[Sample],
    name: str,
    report: Callable[[str], None],
    kept: Kept,
) -> dict[Layer, float]:
    """Return the sensitivity of each layer: the relative output error of the CPU's variant where it alone is quantised.

    Measured on FEW_SAMPLES of the held-out ``samples``, called ``name``, then for the upper quarter of the layers on
    more of them. ``bundle`` is in FP32.
    """
    upper = max(UPPER_LAYERS, round(UPPER * len(candidate.quantizer.layers)))
    more = min(MOST_SAMPLES, max(FEW_SAMPLES, RANKING_RUNS // upper))
    with open_bundle(bundle) as fp32:
        outputs = [Fp32Outputs(fp32, samples, name, most=most) for most in sorted({FEW_SAMPLES, more})]
    if len(samples) <= FEW_SAMPLES:
        del outputs[1:]
    sensitivities: dict[Layer, float] = {}
    with candidate.open_switchable() as switchable:
        layers = switchable.layers
        for fp32_outputs in outputs:
            counter = Counter(report, "ranking layers by what quantising each costs", len(layers))
            for layer in layers:
                counter.next()
                what = {
                    "stage": "sensitivity",
                    "graphs": switchable.sha256,
                    "data": fp32_outputs.sha256,
                    "layer": layer,
                }
                error = partial(layer_error, switchable, layer, fp32_outputs)
                sensitivities[layer] = kept.compute(what, Number(), error)
            layers = sorted(layers, key=lambda layer: -sensitivities[layer])[:upper]
    return {layer: sensitivities[layer] for layer in candidate.quantizer.layers}


def layer_error(switchable: SwitchableBundle, layer: Layer, fp32_outputs: Fp32Outputs) -> float:
    """Return the relative output error with ``layer`` alone quantised."""
    others = [other for other in switchable.layers if other != layer]
    return switchable.measure(others, fp32_outputs).error.value
