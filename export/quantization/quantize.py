"""Run the quantisation stage of an export: calibrate, pass the gate, search layers, record it all for bundle.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import onnx_ir as ir

from transom.calib.data import CalibrationData
from transom.calib.samples import Sample
from transom.calib.table import RANGES, RangeTable, Smoothing
from transom.export.parity.cases import ParityCases
from transom.export.parity.fp16_range import beyond_fp16, measure_ranges
from transom.export.quantization.calibrate import calibrate, require_fitting, smoothed
from transom.export.quantization.candidate import TENSORRT, Candidate, ranking_outputs
from transom.export.quantization.data_split import PARTS, require_same_data, split_for_gate
from transom.export.quantization.gate import Gate
from transom.export.quantization.layer_search import LayerSearchResult, search_layers
from transom.export.quantization.options import NONE, QuantizationConfig, QuantizeOptions
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
    on_step       called with what is being done
    made_for      what the bundle is for, one of MADE_FOR
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
    if job.table is not None:
        require_fitting(job.table, job.canonical, job.config)
        if not scored:
            require_same_data(job.data.split(PARTS)[0], job.table.data, "the table of ranges")
    calibration, held_out = split_for_gate(job.data, scored=scored)
    table = job.table or calibrated(job, calibration)
    smoothing = {name: graph.smoothing for name, graph in table.graphs.items()}  # of all candidates
    half = fits_fp16(job, table)
    first = make_candidate(job, table, held_out, half=half)
    candidates = [first]
    if job.options.gate and job.table is None:
        wanted = min(MAX_CANDIDATES, first.evaluate(first.variant, ()).wanted)
        for part in range(1, wanted):  # calibrated on other samples; held-out data of the user is other data, too
            calibration, other = job.data.split(PARTS, part)
            other_table = calibrated(job, calibration, smoothing)
            candidates.append(make_candidate(job, other_table, None if scored else other, half=half))
    samples, name = held_out_samples(job, held_out)
    fp32_outputs = ranking_outputs(job.bundle, samples, name, len(first.quantizer.layers))
    found = search_layers(candidates, fp32_outputs, gate=job.options.gate, same_inputs=scored, report=job.report)
    record = quantization_record(job.config, table, found, first, half=half)
    return Quantized(first.quantizer.variants(found.high_precision, folder), table, record)


def calibrated(
    job: QuantizationJob, data: CalibrationData, smoothing: Mapping[str, Mapping[str, Smoothing]] | None = None
) -> RangeTable:
    """Calibrate the model on ``data``, with ``smoothing`` where it is given."""
    return calibrate(
        job.bundle,
        job.canonical,
        job.config,
        data,
        smooth=job.options.smooth,
        smoothing=smoothing,
        report=job.report,
    )


def make_candidate(
    job: QuantizationJob, table: RangeTable, held_out: CalibrationData | None, *, half: bool
) -> Candidate:
    """Return the candidate of a table, with a gate on ``held_out``, or on a reference model's own data."""
    with open_bundle(job.bundle) as fp32:
        job.report("measuring FP32")
        if held_out is None and job.reference is not None:
            gate = Gate.of_reference(job.reference, fp32)
        else:
            gate = Gate(fp32, *held_out_samples(job, held_out))
    return Candidate(job.bundle, job.canonical, job.config, table, gate, half=half)


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
                "sensitivity": found.sensitivities[graph, name],
                "kept": (graph, name) in found.high_precision,
                "why": found.why.get((graph, name)),
            }
            for graph, name in candidate.quantizer.layers
        ],
        "curve": [dict(point) for point in found.curve],
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
