"""Make quantised graphs of FP32 graphs and their ranges: one set of weights and ranges, a variant per target."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

from transom.calib.histogram import Histogram
from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale, activation_scale, clip_range
from transom.export.native.lists import NO_LISTS, NativeLists, lower_graphs
from transom.export.parity.fp16_watch import with_watch
from transom.export.passes.convolutions import Convolution, QuantizableLayer, find_layers
from transom.export.passes.cpu import optimize_for_cpu
from transom.export.passes.cpu.group_query_attention import reads_cache
from transom.export.passes.fp16_embeddings import fp16_embeddings
from transom.export.passes.fp16_watch import add_fp16_watch
from transom.export.passes.half_precision import convert_precision
from transom.export.passes.linear_layers import Linear
from transom.export.passes.qdq_dynamic import quantize_dynamic
from transom.export.passes.qdq_static import optional_sites, quantize_static
from transom.export.passes.weight_only import quantize_weights
from transom.export.quantization.options import DYNAMIC, NONE, QuantizationConfig
from transom.export.variants import Variants, emulations, pack, simulated, state_names, with_integers
from transom.runtime.graph_spec import Graph
from transom.runtime.manifest_graphs import BLOCKS, CPU_ALONE, PRODUCTS, GraphFile

SMALLEST_FP16_SCALE = 2.0**-14  # the smallest normal number: a scale below it would lose digits, or vanish

Layer = tuple[str, str]  # graph, name of the linear layer or convolution


class Quantizer:
    """Makes quantised graphs of FP32 ones, with any of their layers left in high precision.

    ``models`` are FP32, smoothed where they are to be, and are not changed; ``ranges`` are the histograms of
    their tensors, by graph and name. ``half`` says whether the graphs for TensorRT are in FP16 beside int8; where
    ``watch``, as measured on a CPU, they say in every run whether FP16 held its values (``fp16_watch``). With
    ``native`` the CPU's graphs that ship have lists of fused operators beside them, where there can be any.

    layers        the linear layers and convolutions of all graphs, in their order
    convolutions  those of them that are convolutions
    sizes         how many weights each layer has
    """

    def __init__(
        self,
        models: Mapping[str, ir.Model],
        graphs: tuple[Graph, ...],
        config: QuantizationConfig,
        ranges: Mapping[str, Mapping[str, Histogram]],
        *,
        half: bool = True,
        watch: bool = False,
        native: bool = False,
    ) -> None:
        self.config, self.models, self._graphs, self._ranges = config, models, graphs, ranges
        self._half, self._watch, self._native = half, half and watch, native and config.for_cpu
        self._weights = {name: QuantizedWeights(config.weight_bits) for name in models}
        self._scales: dict[bool, dict[str, dict[str, Scale]]] = {}
        found = {
            (name, layer.name): layer
            for name, model in models.items()
            for layer in quantized_layers(model, config, name)
        }
        self.sizes: dict[Layer, int] = {key: prod(layer.kernel_shape) for key, layer in found.items()}
        self.layers: list[Layer] = [*self.sizes]
        self.convolutions = {key for key, layer in found.items() if isinstance(layer, Convolution)}

    def with_ranges(self, ranges: Mapping[str, Mapping[str, Histogram]]) -> Quantizer:
        """Return a quantizer of the same models by other ranges, which shares their quantised weights."""
        other = copy(self)
        other._ranges, other._scales = ranges, {}
        other.__dict__.pop("lowers", None)
        return other

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
        """Return the graphs for ONNX Runtime's CPU by name, in Q/DQ: layers and activations have their names."""
        models = {}
        for graph in self._graphs:
            model = self.models[graph.name].clone()
            layers = self._layers(graph.name, model, high_precision)
            linears = [layer for layer in layers if isinstance(layer, Linear)]
            weights, mode = self._weights[graph.name], self.config.activations[graph.name]
            if mode == NONE:
                quantize_weights(model, linears, weights, self._block_bits, self.config.block_size)
            elif mode == DYNAMIC:
                quantize_dynamic(model, linears, weights)
                convolutions = [layer for layer in layers if isinstance(layer, Convolution)]
                quantize_static(model, convolutions, weights, self.scales(signed=False)[graph.name], signed=False)
            else:
                self._quantize_static(graph.name, model, layers, signed=False)
            fp16_embeddings(model)
            models[graph.name] = model
        return models

    def optimized_cpu(self, high_precision: Collection[Layer] = ()) -> dict[str, ir.Model]:
        """Return the graphs for ONNX Runtime's CPU as they ship, by name: rewritten in operators that are faster."""
        return self._for_cpu(high_precision)[0]

    def _for_cpu(
        self, high_precision: Collection[Layer], *, native: bool = False
    ) -> tuple[dict[str, ir.Model], NativeLists]:
        """Return the graphs that ``optimized_cpu`` returns, and with ``native`` the lists of what they compute."""
        models = self.cpu(high_precision)
        lists = lower_graphs(models, self._graphs) if native else NO_LISTS
        for name, model in models.items():
            if self._has_cpu_file(name):
                optimize_for_cpu(model)
        return models, lists

    @cached_property
    def lowers(self) -> bool:
        """True where any of the CPU's graphs has a list of fused operators, all layers quantised."""
        return self._native and bool(lower_graphs(self.cpu(), self._graphs).lowered)

    def _has_cpu_file(self, graph: str) -> bool:
        """Return whether the CPU has a file of its own; of weights alone only for a cache."""
        return self.config.activations[graph] != NONE or reads_cache(self.models[graph])

    def tensorrt(self, high_precision: Collection[Layer] = ()) -> dict[str, ir.Model]:
        """Return the graphs for TensorRT, by name: int8 with symmetric scales, everything else in FP16."""
        models = {}
        for graph in self._graphs:
            model = self.models[graph.name].clone()
            self._quantize_static(graph.name, model, self._layers(graph.name, model, high_precision), signed=True)
            if self._half:
                convert_precision(model, "fp16", state_names(graph))
            models[graph.name] = model
        return models

    def _layers(self, graph: str, model: ir.Model, high_precision: Collection[Layer]) -> list[QuantizableLayer]:
        layers = quantized_layers(model, self.config, graph)
        return [layer for layer in layers if (graph, layer.name) not in high_precision]

    def _quantize_static(self, graph: str, model: ir.Model, layers: list[QuantizableLayer], *, signed: bool) -> None:
        scales, sites = self.scales(signed=signed)[graph], optional_sites(model, self.config.optional_sites)
        quantize_static(model, layers, self._weights[graph], scales, signed=signed, sites=sites)

    @property
    def _block_bits(self) -> int:
        return 4 if self.config.weight_bits == 4 else 8

    def variants(self, high_precision: Collection[Layer] = (), folder: Path | None = None) -> Variants:
        """Return everything that ships.

        For TensorRT alone a CPU gets that graph too, in float32: rounded as a GPU would round it where it is in FP16.
        """
        if self.config.weights_only:
            return self._weights_only(self.cpu(high_precision), folder)
        if not self.config.for_tensorrt:
            return self._cpu_alone(*self._for_cpu(high_precision, native=self._native), folder)
        models = self.tensorrt(high_precision)
        state = "float16" if self._half else "float32"
        if not self.config.for_cpu:
            cpu = emulations(models) if self._half else {}
            return simulated(pack(self._graphs, models, state, cpu=cpu, folder=folder))
        cpu, lists = self._for_cpu(high_precision, native=self._native)
        emulated = self._emulations(models)
        variants = simulated(pack(self._graphs, models, state, cpu=cpu, emulated=emulated, folder=folder, lists=lists))
        return replace(variants, emulated=self._watched(variants.emulated))

    def _cpu_alone(self, models: dict[str, ir.Model], lists: NativeLists, folder: Path | None) -> Variants:
        made = pack(self._graphs, {}, "float32", cpu=models, folder=folder, lists=lists)
        return with_integers(made, self.integers)

    def _weights_only(self, models: dict[str, ir.Model], folder: Path | None) -> Variants:
        """Return what ships of graphs that GPUs execute too, and the rewritten ones for the CPU where there are any."""
        cpu = {name: model.clone() for name, model in models.items() if self._has_cpu_file(name)}
        lists = lower_graphs(models, self._graphs) if self._native else NO_LISTS
        for model in cpu.values():
            optimize_for_cpu(model)
        if cpu and self.config.made_for == CPU_ALONE:
            return self._cpu_alone({**models, **cpu}, lists, folder)
        others = emulations(models) if cpu else {}  # nothing is half: compared with PyTorch as they are
        made = pack(self._graphs, models, "float32", cpu=cpu, emulated=others, folder=folder, lists=lists)
        return with_integers(made, self.integers)

    def cpu_variant(self, folder: Path, high_precision: Collection[Layer] = ()) -> Variants:
        """Return the graphs for ONNX Runtime's CPU alone, to be measured, with their weights in ``folder``."""
        return with_integers(self._measured(self.optimized_cpu(high_precision), folder), self.integers)

    def native_variant(self, folder: Path, high_precision: Collection[Layer] = ()) -> Variants:
        """Return the graphs for the CPU with their lists of fused operators, to be measured by those."""
        models, lists = self._for_cpu(high_precision, native=True)
        return with_integers(self._measured(models, folder, lists), self.integers)

    def tensorrt_variant(self, folder: Path, high_precision: Collection[Layer] = ()) -> Variants:
        """Return the graphs for TensorRT alone, to be measured on a CPU: FP16 is rounded as a GPU would round it."""
        variants = simulated(self._measured(self._emulations(self.tensorrt(high_precision)), folder))
        return replace(variants, graphs=self._watched(variants.graphs))

    def _measured(self, models: Mapping[str, ir.Model], folder: Path, lists: NativeLists = NO_LISTS) -> Variants:
        return pack(self._graphs, models, "float32", external_above=0, folder=folder, lists=lists)

    def _emulations(self, models: Mapping[str, ir.Model]) -> dict[str, ir.Model]:
        """Return copies of graphs for TensorRT that round as a GPU would, with a watch where there is to be one."""
        emulated = emulations(models)
        for model in emulated.values() if self._watch else ():
            add_fp16_watch(model)
        return emulated

    def _watched(self, files: tuple[GraphFile, ...]) -> tuple[GraphFile, ...]:
        return tuple(replace(file, graph=with_watch(file.graph)) for file in files) if self._watch else files

    @property
    def integers(self) -> dict[str, str]:
        """Return how a CPU session computes the integers of each graph for the CPU."""
        return {name: BLOCKS if mode == NONE else PRODUCTS for name, mode in self.config.activations.items()}


def quantized_layers(model: ir.Model, config: QuantizationConfig, graph: str) -> list[QuantizableLayer]:
    """Return the layers of an FP32 graph that ``config`` quantises: of weights alone the linear ones.

    Blocks of weights are for matrices, and convolutions use each weight many times: reading them is not what they wait
    for.
    """
    layers = find_layers(model)
    return [layer for layer in layers if isinstance(layer, Linear) or config.activations[graph] != NONE]


def calibrated_tensors(model: ir.Model, config: QuantizationConfig, graph: str) -> list[str]:
    """Return the names of the tensors of an FP32 graph whose ranges ``config`` needs.

    They are the activations of its layers, and the results of convolutions, which are quantised as well.
    """
    layers = quantized_layers(model, config, graph)
    values: list[Any] = [layer.activation for layer in layers]
    values += [layer.result for layer in layers if isinstance(layer, Convolution)]
    values += [node.inputs[index] for node, index in optional_sites(model, config.optional_sites)]
    return list(dict.fromkeys(str(value.name) for value in values))
