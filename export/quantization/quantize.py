"""Run the quantisation stage of an export: calibrate, pass the gate, search layers, record it all for bundle.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import onnx_ir as ir

from transom.calib.data import CalibrationData
from transom.calib.samples import Sample
from transom.calib.table import RANGES, RangeTable
from transom.export.parity.cases import ParityCases
from transom.export.parity.fp16_range import beyond_fp16, measure_ranges
from transom.export.parity.fp16_watch import Fp16DoubtError
from transom.export.quantization.calibrate import (
    SharedCalibration,
    require_fitting,
    searched_smoothing,
    smoothed,
)
from transom.export.quantization.candidate import TENSORRT, Candidate, histograms, quantizer_of_table, rank_layers
from transom.export.quantization.data_split import PARTS, require_same_data, split_for_gate
from transom.export.quantization.gate import Gate
from transom.export.quantization.gate_result import ENOUGH_INPUTS
from transom.export.quantization.layer_search import LayerSearchResult, search_layers
from transom.export.quantization.options import NONE, QuantizationConfig, QuantizeOptions
from transom.export.quantization.remembered_rows import remembering
from transom.export.quantization.resume import KeepsNothing, Kept
from transom.export.reference_models import ReferenceModel, scored_model
from transom.export.variants import Variants
from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.bundle import Bundle
from transom.runtime.host import cpu_name, instruction_set
from transom.runtime.loading import open_bundle
from transom.runtime.manifest_graphs import BOTH
from transom.runtime.manifest_sections import EXACT

MAX_CANDIDATES = PARTS  # calibrations, where few cases are held out


@dataclass(frozen=True)
class QuantizationJob:
    """The inputs of the quantisation of one model.

    bundle        the model in FP32
    canonical     its graphs by name
    source        the checkpoint as the user named it
    precision     "int8" or "int4"
    data          calibration data, of which a part is held out for the gate where the model has no task score
    table         ranges that stand in for calibration, if given
    parity_cases  over which ranges are measured that say whether the graphs fit FP16
    report        called with what is being done
    measure_fp16  measure those ranges first; else the graphs are taken to fit, and watched in every run that measures
                  them, here and in the parity runs
    made_for      what the bundle is for, one of MADE_FOR
    release       called when sessions were closed, to give their memory back; with ``graphs``, or graphs=False
    """

    bundle: Bundle
    canonical: Mapping[str, ir.Model]
    source: str
    precision: str
    options: QuantizeOptions
    data: CalibrationData
    table: RangeTable | None
    parity_cases: ParityCases
    report: Callable[[str], None]
    made_for: str = BOTH
    measure_fp16: bool = False
    release: Callable[..., None] = lambda **options: None

    @property
    def config(self) -> QuantizationConfig:
        config = self.options.config(self.precision, tuple(file.graph for file in self.bundle.manifest.graphs))
        return replace(config, made_for=self.made_for)

    @property
    def reference(self) -> ReferenceModel | None:
        """The reference model, whose task score is the gate's measure; None of any other checkpoint or task."""
        return scored_model(self.source, self.bundle.manifest.task)


@dataclass(frozen=True)
class Quantized:
    """``variants`` ship, with the file RANGES beside them; ``record`` goes into bundle.json."""

    variants: Variants
    table: RangeTable
    record: dict[str, Any]


def quantize_model(job: QuantizationJob, folder: Path | None = None) -> Quantized:
    """Quantise a model; layers stay in high precision until its gate holds.

    The weights that ship are written to ``folder``, or held in memory without one.

    Raises CalibrationError for data and a table that cannot be used, AccuracyError where the gate cannot be met.
    """
    scored = job.reference is not None
    calibration, held_out = split_for_gate(job.data, scored=scored)
    shared = table = None
    kept = Kept(job.bundle) if job.options.resume else KeepsNothing()
    if job.table is not None:
        require_fitting(job.table, job.canonical, job.config)
        if not scored:
            require_same_data(job.data.split(PARTS)[0], job.table.data, "the table of ranges")
        table = job.table
    else:
        smoothing = searched_smoothing(
            job.bundle,
            job.canonical,
            job.config,
            calibration,
            smooth=job.options.smooth,
            report=job.report,
            kept=kept,
        )
        job.release()
        shared = SharedCalibration(
            job.bundle, job.canonical, job.config, parts_of(job.data), smoothing, job.report, kept
        )
        if job.options.gate and held_out is not None and len(held_out.samples) < ENOUGH_INPUTS:
            shared.collect(range(PARTS))  # further candidates are certain, and need the part that is held out here
        table = shared.table(calibration, [part for part in range(PARTS) if scored or part > 0])
        job.release()
    gates = open_gates(job, held_out, most=MAX_CANDIDATES if job.options.gate and shared else 1)
    tables = [table]
    for part in range(1, len(gates)):  # calibrated on other samples
        assert shared is not None
        others = [other for other in range(PARTS) if other != part]
        tables.append(shared.table(job.data.split(PARTS, part)[0], others))
    job.release(graphs=False)
    if job.config.for_cpu and not job.measure_fp16:  # else the graph that rounds ships itself, and has no watch
        try:
            return searched(job, tables, gates, held_out, kept, folder, half=True, watch=True)
        except Fp16DoubtError:
            pass
    return searched(job, tables, gates, held_out, kept, folder, half=fits_fp16(job, table), watch=False)


def searched(
    job: QuantizationJob,
    tables: Sequence[RangeTable],
    gates: Sequence[Gate],
    held_out: CalibrationData | None,
    kept: Kept,
    folder: Path | None,
    *,
    half: bool,
    watch: bool,
) -> Quantized:
    """Quantise by the first of ``tables``; layers stay in high precision until all of the ``gates`` hold.

    There is a gate for each table. Raises AccuracyError where they do not, Fp16DoubtError only with ``watch``.
    """
    quantizer = quantizer_of_table(
        job.bundle, job.canonical, job.config, tables[0], half=half, watch=watch, native=True
    )
    quantizers = [quantizer, *(quantizer.with_ranges(histograms(table, job.canonical)) for table in tables[1:])]
    candidates = [
        Candidate(job.bundle, each, gate, folder, partial(job.release, graphs=False))
        for each, gate in zip(quantizers, gates, strict=True)
    ]
    found = search_layers(
        candidates,
        lambda candidate: rank_layers(candidate, job.bundle, *held_out_samples(job, held_out), job.report, kept),
        gate=job.options.gate,
        always_rank=job.options.rank,
        same_inputs=job.reference is not None,
        report=job.report,
    )
    record = quantization_record(job.config, tables[0], found, candidates[0], half=half)
    return Quantized(quantizer.variants(found.high_precision, folder), tables[0], record)


def parts_of(data: CalibrationData) -> dict[int, CalibrationData]:
    """Return the parts of the data, by number, each of which is held out once."""
    return {part: data.split(PARTS, part)[1] for part in range(PARTS)}


def open_gates(job: QuantizationJob, held_out: CalibrationData | None, most: int) -> list[Gate]:
    """Return a gate for each candidate, as many as its cases are few for, at most ``most``.

    The first is on ``held_out``, the further ones on other parts of the user's data; a reference model's own data are
    the same for all.
    """
    with open_bundle(job.bundle) as opened, remembering(job.bundle, opened) as fp32:
        job.report("measuring FP32")
        if held_out is None and job.reference is not None:
            gate = Gate.of_reference(job.reference, fp32)
            return [gate] * min(most, gate.wanted)
        gates = [Gate(fp32, *held_out_samples(job, held_out))]
        for part in range(1, min(most, gates[0].wanted)):
            job.report("measuring FP32")
            other = job.data.split(PARTS, part)[1]
            gates.append(Gate(fp32, other.samples, other.name))
    return gates


def fits_fp16(job: QuantizationJob, table: RangeTable) -> bool:
    """Return whether everything but int8 can be FP16 in the graphs for TensorRT, where there are any."""
    if not job.config.for_tensorrt:
        return True
    job.report("measuring every tensor's range")
    smoothing = {name: table.graphs[name].smoothing for name in job.canonical}
    ranges = measure_ranges(job.bundle, smoothed(job.canonical, smoothing), job.parity_cases)
    return not beyond_fp16(ranges.tensors)


def held_out_samples(job: QuantizationJob, held_out: CalibrationData | None) -> tuple[Sequence[Sample], str]:
    """Return the user's held-out samples, or those of the reference model, and their name."""
    if held_out is not None:
        return held_out.samples, held_out.name
    return [] if job.reference is None else job.reference.held_out(), f"held-out data of {job.source}"


def quantization_record(
    config: QuantizationConfig, table: RangeTable, found: LayerSearchResult, candidate: Candidate, *, half: bool
) -> dict[str, Any]:
    """Return the section ``quantization`` of bundle.json."""
    multiplies = config.for_cpu and not config.weights_only  # 8-bit activations and weights, on a CPU
    record = {
        "activations": dict(config.activations),
        "method": config.method,
        "weight_bits": config.weight_bits,
        "block_size": config.block_size if NONE in config.activations.values() else None,
        "also": list(config.optional_sites),
        "elsewhere": {variant: "fp16" if variant == TENSORRT and half else "fp32" for variant in candidate.gate_modes},
        "data": dict(table.data),
        "processor": cpu_name(),
        "instruction_set": instruction_set(),
        "integer_sums": integer_sums().kind if config.weight_bits == 8 and multiplies else EXACT,
        "integer_means": integer_sums().way if multiplies else None,
        "ranges": RANGES,
        "smoothing": {
            f"{name}/{norm}": smoothing.alpha
            for name, graph in table.graphs.items()
            for norm, smoothing in graph.smoothing.items()
        },
        "layers": [
            {
                "name": name,
                "graph": graph,
                **({"operator": "Conv"} if (graph, name) in candidate.quantizer.convolutions else {}),
                "sensitivity": None if found.sensitivities is None else found.sensitivities[graph, name],
                "kept": (graph, name) in found.high_precision,
                "why": found.why.get((graph, name)),
            }
            for graph, name in candidate.quantizer.layers
        ],
        "curve": None if found.curve is None else [dict(point) for point in found.curve],
        "gate": {variant: result.to_json() for variant, result in found.results.items()},
    }
    return {key: finite(value) for key, value in record.items()}


def finite(value: Any) -> Any:
    """Return the value with null for numbers that JSON does not have: the error of outputs that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
