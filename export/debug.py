"""Find the layers that break the accuracy of a bundle: layers of the shipped graphs are switched to FP32.

Half precision and integers that are written into a graph (strong typing) cannot be undone by a session option. So the
graph gets a switch per layer (export/passes/layer_switches.py), and export/bisect.py searches by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transom.calib.data import Sample
from transom.calib.graph_hash import graph_sha256
from transom.calib.table import RANGES, RangeTable
from transom.export.bisect import bisect_layers
from transom.export.bundle_graphs import stored_graphs
from transom.export.checkpoint import LoadedCheckpoint, reload_checkpoint
from transom.export.onnx_export import onnx_from_module
from transom.export.parity.inputs import ParityInputs, parity_inputs, single_rows
from transom.export.quantization.calibrate import smoothed
from transom.export.quantization.candidate import CPU, MOST_SAMPLES
from transom.export.quantization.data_split import held_out_part
from transom.export.quantization.fidelity import Fidelity, Fp32Outputs
from transom.export.quantization.quantizer import Layer
from transom.export.quantization.switchable import SwitchableBundle
from transom.export.reference_models import REFERENCE_MODELS, scored_model
from transom.export.variants import make_variants, open_variants
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError, ExportError
from transom.runtime.json_reader import parse_json
from transom.runtime.made_for import no_tensorrt
from transom.runtime.manifest import QUANTIZED, Manifest
from transom.runtime.manifest_graphs import BLOCKS, SIMULATED, TENSORRT_ALONE
from transom.runtime.progress import Progress, ProgressReporter, silent

HALF = "default"  # the one file of a graph in half precision
DEBUG_SAMPLES = MOST_SAMPLES
TOKENS = 64  # of each sample, where there are only parity inputs


@dataclass(frozen=True)
class FaultyLayer:
    """A layer that lowers the error in FP32, and the relative output error before and after, with those before it.

    ``agreement`` is the share of cases with FP32's top-1 after it; None where the task chooses nothing.
    """

    name: str
    graph: str
    before: float
    after: float
    agreement: float | None


@dataclass(frozen=True)
class Findings:
    """The layers that break a bundle, worst first.

    variant     the variant that was searched, as bundle.json calls it
    data        the name of the inputs
    output      the names of the outputs that errors are taken over
    layers      how many there are in all
    shipped     relative output error of the bundle as it is
    agreement   share of cases with FP32's top-1 of the bundle as it is; None where the task chooses nothing
    everything  the error with every layer in FP32: what is left comes from elsewhere
    target      the error that was searched for
    """

    manifest: Manifest
    variant: str
    data: str
    output: str
    layers: int
    shipped: float
    agreement: float | None
    everything: float
    target: float
    worst: tuple[FaultyLayer, ...]

    @property
    def left(self) -> float:
        """The error with the layers that were found in FP32."""
        return self.worst[-1].after if self.worst else self.shipped

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.manifest.precision,
            "flavour": self.variant,
            "data": self.data,
            "output": self.output,
            "layers": self.layers,
            "target": self.target,
            "error": {"shipped": self.shipped, "everything_restored": self.everything, "left": self.left},
            "agreement": self.agreement,
            "worst": [asdict(layer) for layer in self.worst],
        }


def debug_accuracy(
    folder: Path,
    *,
    source: str | None = None,
    calibration_data: Sequence[str] = (),
    variant: str = CPU,
    target: float | None = None,
    most: int = 10,
    threads: int | None = None,
    progress: Progress = silent,
) -> Findings:
    """Search the bundle at ``folder`` until its relative output error is at most ``target``, or ``most`` layers.

    ``variant`` is "cpu" or "default" (for TensorRT), of a quantised bundle; a half-precision graph is searched as a GPU
    would round it, and a bundle for TensorRT alone has the second only. ``source`` and ``calibration_data`` are as for
    ``verify``. Raises ExportError for a bundle in FP32 and for a graph that it was not exported for, CalibrationError
    where its ranges or held-out data are missing, CheckpointError as ``verify`` does.
    """
    steps = ProgressReporter(progress, total=4)
    bundle = Bundle(folder)
    manifest = bundle.manifest
    if manifest.precision == "fp32":
        raise ExportError(
            f"{folder} is in fp32: nothing in it was quantised or rounded. Give a bundle in int8, int4, fp16 or bf16; "
            "`transom verify` compares this one with PyTorch."
        )
    refusal = no_tensorrt(manifest, folder)
    if refusal is not None and (variant == HALF or manifest.precision not in QUANTIZED):
        raise ExportError(refusal)
    table = table_of(bundle) if manifest.precision in QUANTIZED else None
    held_out = held_out_samples(manifest, calibration_data)
    steps.next("reading the checkpoint")
    loaded = reload_checkpoint(bundle, source)
    samples, data = held_out or parity_samples(loaded)
    steps.next("tracing the module to ONNX")
    fp32 = {
        graph.name: onnx_from_module(part, graph, loaded.axes)
        for graph, part in zip(loaded.graphs, loaded.parts().values(), strict=True)
    }
    steps.next("measuring FP32")
    with open_variants(bundle, make_variants(fp32, loaded.graphs, "fp32")) as unrounded:
        fp32_outputs = Fp32Outputs(unrounded, samples, data, most=DEBUG_SAMPLES)
    if table is not None:
        ranges = {name: table.require(name, graph_sha256(model)) for name, model in fp32.items()}
        fp32 = smoothed(fp32, {name: found.smoothing for name, found in ranges.items()})
    variant = variant if table is not None and manifest.made_for != TENSORRT_ALONE else HALF
    steps.next("building the graph with a switch per layer")
    fidelities: dict[frozenset[Layer], Fidelity] = {}
    shipped = stored_graphs(bundle, variant)
    integers = None if table is None else integers_of(manifest, variant)
    with SwitchableBundle(bundle, shipped, fp32, half=table is None, integers=integers, threads=threads) as switchable:

        def error(in_fp32: frozenset[Layer]) -> float:
            steps.more("searching for the layers that break it")
            fidelities[in_fp32] = switchable.measure(in_fp32, fp32_outputs)
            return fidelities[in_fp32].error.value

        found = bisect_layers(switchable.layers, error, target=target, most=most)
    worst: list[FaultyLayer] = []
    for index, step in enumerate(found.steps):
        graph, name = step.layer
        in_fp32 = frozenset(each.layer for each in found.steps[: index + 1])
        worst.append(FaultyLayer(name, graph, step.before, step.after, top1(fidelities[in_fp32])))
    as_shipped = fidelities[frozenset()]
    steps.next("done")
    return Findings(
        manifest=manifest,
        variant=variant,
        data=data,
        output=as_shipped.output,
        layers=len(switchable.layers),
        shipped=found.shipped,
        agreement=top1(as_shipped),
        everything=found.everything,
        target=found.target,
        worst=tuple(worst),
    )


def integers_of(manifest: Manifest, variant: str) -> dict[str, str]:
    """Return how a CPU session computes the integers of each graph, by name, in a quantised bundle's ``variant``."""
    return {
        file.graph.name: file.integers if file.integers and (variant == CPU or file.integers == BLOCKS) else SIMULATED
        for file in manifest.graphs
    }


def top1(fidelity: Fidelity) -> float | None:
    return None if fidelity.top1 is None else fidelity.top1.value


def table_of(bundle: Bundle) -> RangeTable:
    """Return the table of ranges that a quantised bundle was made with, which says how it was smoothed."""
    if RANGES not in bundle.manifest.files:
        raise CalibrationError(
            f"{bundle.folder} has no {RANGES}, which says how its weights were smoothed before they were quantised. "
            "Export it again."
        )
    return RangeTable.from_json(parse_json(bundle.read(RANGES), RANGES))


def held_out_samples(manifest: Manifest, data: Sequence[str]) -> tuple[Sequence[Sample], str] | None:
    """Return samples that calibration did not see, and their name; None for a bundle that was not calibrated.

    Raises CalibrationError where a quantised bundle needs the user's data.
    """
    source = str(manifest.source.get("checkpoint"))
    if data and not (manifest.quantization and scored_model(source, manifest.task)):
        held_out = held_out_part(manifest, data)
        return held_out.samples, held_out.name
    if source in REFERENCE_MODELS:
        return REFERENCE_MODELS[source].held_out(), f"held-out data of {source}"
    if manifest.precision in QUANTIZED:
        raise CalibrationError(
            f"the layers of {manifest.name} are measured on inputs that its calibration did not see, and none are "
            "known. Give --calibration-data what it was calibrated on: the part that was held out is taken."
        )
    return None


def parity_samples(loaded: LoadedCheckpoint) -> tuple[list[Sample], str]:
    """Return rows of the passage and photographs of the parity inputs, for every graph that takes some.

    Where tokens see images, each row of the passage has a photograph in front.
    """
    data = "passages and photographs of the parity runs"
    made = parity_inputs(loaded.graphs, loaded.open_tokenizer(), loaded.preprocess, loaded.marks)
    mark = loaded.options.get("image_token_id")
    if mark is not None:
        return pictured_rows(loaded, made, mark), data
    found: list[Sample] = []
    for graph in loaded.graphs:
        inputs = {tensor.name: tensor for tensor in graph.inputs}
        feeds = {}
        if "pixel_values" in inputs:
            feeds["pixel_values"] = made[graph.name].feeds({"B": DEBUG_SAMPLES})["pixel_values"]
        elif "input_ids" in inputs:
            shape = DEBUG_SAMPLES, min(TOKENS, loaded.axes["S"].max)
            feeds["input_ids"] = made[graph.name].ids(shape, inputs["input_ids"].exclusive_max or 1)
        rows = single_rows(feeds) if feeds else ()
        found += [Sample(f"row {row} of {graph.name}", feeds=fed) for row, fed in enumerate(rows)]
    return found, data


def pictured_rows(loaded: LoadedCheckpoint, made: Mapping[str, ParityInputs], mark: int) -> list[Sample]:
    """Return rows of the passage, each with a photograph at its first token, ``mark``, and room for an answer."""
    decoder = next(graph for graph in loaded.graphs if graph.name == "decoder")
    vocabulary = decoder.inputs[0].exclusive_max or 1
    ids = made["decoder"].ids((DEBUG_SAMPLES, max(2, min(TOKENS, loaded.axes["S"].max // 2))), vocabulary)
    ids = np.where(ids == mark, (mark + 1) % vocabulary, ids)
    ids[:, 0] = mark
    pixels = made["encoder"].feeds({"B": DEBUG_SAMPLES})["pixel_values"]
    rows = single_rows({"input_ids": ids, "pixel_values": pixels})
    return [Sample(f"row {row}", feeds=fed) for row, fed in enumerate(rows)]
