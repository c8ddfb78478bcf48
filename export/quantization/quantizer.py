"""Make quantised graphs of FP32 graphs and their ranges: one set of weights and ranges, a variant per target."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir

from transom.calib.histogram import Histogram
from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale, activation_scale, clip_range
from transom.export.passes.fp16_embeddings import fp16_embeddings
from transom.export.passes.half_precision import convert_precision
from transom.export.passes.linear_layers import Linear, find_linears
from transom.export.passes.qdq_dynamic import quantize_dynamic
from transom.export.passes.qdq_static import optional_sites, quantize_static
from transom.export.passes.weight_only import quantize_weights
from transom.export.quantization.options import DYNAMIC, NONE, QuantizationConfig
from transom.export.variants import Variants, emulations, pack, simulated, state_names, with_integers
from transom.runtime.graph_spec import Graph
from transom.runtime.manifest_graphs import BLOCKS, PRODUCTS

SMALLEST_FP16_SCALE = 2.0**-14  # the smallest normal number: a scale below it would lose digits, or vanish

Layer = tuple[str, str]  # graph, name of the linear layer


class Quantizer:
    """Makes quantised graphs of FP32 ones, with any of their layers left in high precision.

    ``models`` are FP32, smoothed where they are to be, and are not changed; ``ranges`` are the histograms of
    their tensors, by graph and name. ``half`` says whether the graphs for TensorRT are in FP16 beside int8.

    layers  the linear layers of all graphs, in their order
    sizes   how many weights each layer has
    """

    def __init__(
        self,
        models: Mapping[str, ir.Model],
        graphs: tuple[Graph, ...],
        config: QuantizationConfig,
        ranges: Mapping[str, Mapping[str, Histogram]],
        *,
        half: bool = True,
    ) -> None:
        self.config, self.models, self._graphs, self._ranges = config, models, graphs, ranges
        self._half = half
        self._weights = {name: QuantizedWeights(config.weight_bits) for name in models}
        self._scales: dict[bool, dict[str, dict[str, Scale]]] = {}
        self.sizes: dict[Layer, int] = {
            (name, linear.name): linear.kernel_shape[0] * linear.kernel_shape[1]
            for name, model in models.items()
            for linear in find_linears(model)
        }
        self.layers: list[Layer] = [*self.sizes]

    def scales(self, *, signed: bool) -> dict[str, dict[str, Scale]]:
        """Return the scales of all activations that have ranges, by graph and name."""
        if signed not in self._scales:
            self._scales[signed] = {
                graph: {name: self._scale(histogram, signed=signed) for name, histogram in found.items()}
                for graph, found in self._ranges.items()
            }
        return self._scales[signed]

    def _scale(self, histogram: Histogram, *, signed: bool) -> Scale:
        low, high = clip_range(histogram, self.config.method, symmetric=signed)
        scale = activation_scale(low, high, signed=signed)
        if signed and self._half:
            return Scale(max(scale.scale, SMALLEST_FP16_SCALE), scale.zero_point)
        return scale

    def cpu(self, high_precision: Collection[Layer] = ()) -> dict[str, ir.Model]:
        """Return the graphs for ONNX Runtime's CPU, by name."""
        models = {}
        for graph in self._graphs:
            model = self.models[graph.name].clone()
            linears = self._linears(graph.name, model, high_precision)
            weights, mode = self._weights[graph.name], self.config.activations[graph.name]
            if mode == NONE:
                quantize_weights(model, linears, weights, self._block_bits, self.config.block_size)
            elif mode == DYNAMIC:
                quantize_dynamic(model, linears, weights)
            else:
                self._quantize_static(graph.name, model, linears, signed=False)
            fp16_embeddings(model)
            models[graph.name] = model
        return models

    def tensorrt(self, high_precision: Collection[Layer] = ()) -> dict[str, ir.Model]:
        """Return the graphs for TensorRT, by name: int8 with symmetric scales, everything else in FP16."""
        models = {}
        for graph in self._graphs:
            model = self.models[graph.name].clone()
            self._quantize_static(graph.name, model, self._linears(graph.name, model, high_precision), signed=True)
            if self._half:
                convert_precision(model, "fp16", state_names(graph))
            models[graph.name] = model
        return models

    def _linears(self, graph: str, model: ir.Model, high_precision: Collection[Layer]) -> list[Linear]:
        return [linear for linear in find_linears(model) if (graph, linear.name) not in high_precision]

    def _quantize_static(self, graph: str, model: ir.Model, linears: list[Linear], *, signed: bool) -> None:
        scales, sites = self.scales(signed=signed)[graph], optional_sites(model, self.config.optional_sites)
        quantize_static(model, linears, self._weights[graph], scales, signed=signed, sites=sites)

    @property
    def _block_bits(self) -> int:
        return 4 if self.config.weight_bits == 4 else 8

    def variants(self, high_precision: Collection[Layer] = ()) -> Variants:
        """Return everything that ships."""
        cpu = self.cpu(high_precision)
        if self.config.weights_only:
            return pack(self._graphs, cpu, "float32")
        models = self.tensorrt(high_precision)
        state = "float16" if self._half else "float32"
        return simulated(pack(self._graphs, models, state, cpu=cpu, emulated=emulations(models)))

    def cpu_variant(self, high_precision: Collection[Layer] = ()) -> Variants:
        """Return the graphs for ONNX Runtime's CPU alone, to be measured."""
        return with_integers(pack(self._graphs, self.cpu(high_precision), "float32"), self.integers)

    def tensorrt_variant(self, high_precision: Collection[Layer] = ()) -> Variants:
        """Return the graphs for TensorRT alone, to be measured on a CPU: FP16 is rounded as a GPU would round it."""
        return simulated(pack(self._graphs, emulations(self.tensorrt(high_precision)), "float32"))

    @property
    def integers(self) -> dict[str, str]:
        """Return how a CPU session computes the integers of each graph for the CPU."""
        return {name: BLOCKS if mode == NONE else PRODUCTS for name, mode in self.config.activations.items()}


def calibrated_tensors(model: ir.Model, config: QuantizationConfig) -> list[str]:
    """Return the names of the activations of an FP32 graph whose ranges ``config`` needs."""
    values: list[Any] = [linear.activation for linear in find_linears(model)]
    values += [node.inputs[index] for node, index in optional_sites(model, config.optional_sites)]
    return list(dict.fromkeys(str(value.name) for value in values))
