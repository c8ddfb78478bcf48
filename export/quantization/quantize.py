"""The stage of an export that makes integers: data, ranges, gate, layers, and what bundle.json records of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import onnx_ir as ir

from transom.calib.data import CalibrationData, Sample, open_calibration_data
from transom.calib.table import RANGES, RangeTable, Smoothing
from transom.export.parity.cases import ParityCases
from transom.export.parity.fp16_range import beyond_fp16, measure_ranges
from transom.export.quantization.calibrate import calibrate, require_fitting, smoothed
from transom.export.quantization.candidate import CPU, Candidate, ranking_reference
from transom.export.quantization.gate import Gate
from transom.export.quantization.layer_search import LayerSearchResult, search_layers
from transom.export.quantization.options import QuantizeOptions
from transom.export.quantization.quantizer import NONE
from transom.export.reference_models import scored_model
from transom.export.variants import Variants
from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.bundle import Bundle
from transom.runtime.cpu import instruction_set
from transom.runtime.errors import CalibrationError
from transom.runtime.host import cpu_name
from transom.runtime.loading import open_bundle
from transom.runtime.manifest import Manifest
from transom.runtime.manifest_sections import EXACT
from transom.runtime.session import LoadedBundle

PARTS = 4  # of the calibration data; one is held out, for the gate or for variety's sake
MAX_CANDIDATES = PARTS  # calibrations, where few cases are held out


@dataclass(frozen=True)
class Quantized:
    """``variants`` ship, with the file RANGES beside them; ``record`` is what bundle.json says."""

    variants: Variants
    table: RangeTable
    record: dict[str, Any]


class Quantization:
    """Everything about one model that its calibrations and gates share.

    ``bundle`` is in FP32, ``canonical`` its graphs by name, ``source`` the user's word for the checkpoint, ``data``
    what is calibrated on, unless there is a ``table`` already.
    Ranges over ``parity_cases`` say whether the graphs fit FP16.
    """

    def __init__(
        self,
        bundle: Bundle,
        canonical: Mapping[str, ir.Model],
        source: str,
        precision: str,
        options: QuantizeOptions,
        data: CalibrationData,
        table: RangeTable | None,
        parity_cases: ParityCases,
        tell: Callable[[str], None],
    ) -> None:
        self._bundle, self._canonical, self._source = bundle, canonical, source
        self._options, self._data, self._parity_cases, self._tell = options, data, parity_cases, tell
        self._config = options.config(precision, tuple(file.graph for file in bundle.manifest.graphs))
        self._reference = scored_model(source, bundle.manifest.task)
        self._scored = self._reference is not None
        if table is not None:
            require_fitting(table, canonical, self._config)
            if self._reference is None:
                require_same(data.split(PARTS)[0], table.data, "the table of ranges")
        self._given = table
        self._smoothing: Mapping[str, Mapping[str, Smoothing]] | None = None  # the first calibration's, for all

    def run(self) -> Quantized:
        """Raises CalibrationError for data that cannot be used, AccuracyError where the gate cannot be met."""
        calibration, held_out = held_out_of(self._data, scored=self._scored)
        table = self._given or self._calibrated(calibration)
        self._smoothing = {name: graph.smoothing for name, graph in table.graphs.items()}
        half = self._fits_fp16(table)
        first = self._candidate(table, held_out, half=half)
        candidates = [first]
        if self._options.gate and self._given is None:
            wanted = min(MAX_CANDIDATES, first.evaluate(CPU, ()).wanted)
            candidates += [self._another(part, half=half) for part in range(1, wanted)]
        samples = self._samples(held_out)
        reference = ranking_reference(self._bundle, samples, self._name_of(held_out), len(first.quantizer.layers))
        found = search_layers(candidates, reference, gate=self._options.gate, same_inputs=self._scored, tell=self._tell)
        return Quantized(first.quantizer.variants(found.kept), table, self._record(table, found, first, half=half))

    def _calibrated(self, data: CalibrationData) -> RangeTable:
        return calibrate(
            self._bundle,
            self._canonical,
            self._config,
            data,
            smooth=self._options.smooth,
            smoothing=self._smoothing,
            tell=self._tell,
        )

    def _another(self, part: int, *, half: bool) -> Candidate:
        """The same on other samples, and of data that the gate takes too, judged on others."""
        calibration, held_out = self._data.split(PARTS, part)
        return self._candidate(self._calibrated(calibration), None if self._scored else held_out, half=half)

    def _candidate(self, table: RangeTable, held_out: CalibrationData | None, *, half: bool) -> Candidate:
        with open_bundle(self._bundle) as fp32:
            self._tell("measuring FP32")
            if held_out is None and self._reference is not None:
                gate = Gate.of_reference(self._reference, fp32)
            else:
                gate = Gate(fp32, self._samples(held_out), self._name_of(held_out))
        return Candidate(self._bundle, self._canonical, self._config, table, gate, half=half)

    def _fits_fp16(self, table: RangeTable) -> bool:
        if self._config.weights_only:
            return True
        self._tell("measuring every tensor's range")
        smoothing = {name: table.graphs[name].smoothing for name in self._canonical}
        ranges = measure_ranges(self._bundle, smoothed(self._canonical, smoothing), self._parity_cases)
        return not beyond_fp16(ranges.tensors)

    def _samples(self, held_out: CalibrationData | None) -> Sequence[Sample]:
        """Return the user's held-out samples, or those of the reference model, which brings its own."""
        if held_out is not None:
            return held_out.samples
        return [] if self._reference is None else self._reference.held_out()

    def _name_of(self, held_out: CalibrationData | None) -> str:
        return f"held-out data of {self._source}" if held_out is None else held_out.name

    def _record(
        self, table: RangeTable, found: LayerSearchResult, candidate: Candidate, *, half: bool
    ) -> dict[str, Any]:
        config = self._config
        record = {
            "activations": dict(config.activations),
            "method": config.method,
            "weight_bits": config.weight_bits,
            "block_size": config.block_size if NONE in config.activations.values() else None,
            "also": list(config.extras),
            "elsewhere": {"cpu": "fp32"} | ({} if config.weights_only else {"default": "fp16" if half else "fp32"}),
            "data": dict(table.data),
            "processor": cpu_name(),
            "instruction_set": instruction_set(),
            "integer_sums": integer_sums().kind if config.weight_bits == 8 and not config.weights_only else EXACT,
            "integer_means": None if config.weights_only else integer_sums().way,
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
                    "sensitivity": found.sensitivities[graph, name],
                    "kept": (graph, name) in found.kept,
                    "why": found.why.get((graph, name)),
                }
                for graph, name in candidate.quantizer.layers
            ],
            "curve": [dict(point) for point in found.curve],
            "gate": {kind: result.to_json() for kind, result in found.results.items()},
        }
        return {key: finite(value) for key, value in record.items()}


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for: the error of outputs that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def gate_again(source: str, fp32: LoadedBundle, data: Sequence[str]) -> Gate | None:
    """The gate that a bundle was judged by; None where it takes the user's data and they are not given."""
    model = scored_model(source, fp32.manifest.task)
    if model is not None:
        return Gate.of_reference(model, fp32)
    if not data:
        return None
    held_out = held_out_again(fp32.manifest, data)
    return Gate(fp32, held_out.samples, held_out.name)


def held_out_again(manifest: Manifest, data: Sequence[str]) -> CalibrationData:
    """The part of ``data`` that the calibration of a bundle left out.

    Raises CalibrationError where it was calibrated on something else: then it may have seen every sample of these.
    """
    calibration, held_out = open_calibration_data(data).split(PARTS)
    if manifest.quantization is not None:
        require_same(calibration, manifest.quantization["data"], f"{manifest.name} in {manifest.precision}")
    return held_out


def require_same(calibration: CalibrationData, recorded: Mapping[str, Any], whose: str) -> None:
    """Raise CalibrationError unless ``calibration`` is, sample by sample, the data that was ``recorded``."""
    if calibration.sha256 != recorded.get("sha256"):
        raise CalibrationError(
            f"{whose} was calibrated on {recorded.get('name')}; what is given now makes {calibration.name} of other "
            "contents, so that nobody knows what was held out. Give the same --calibration-data, unchanged and in the "
            "same order, or calibrate anew."
        )


def held_out_of(data: CalibrationData, *, scored: bool) -> tuple[CalibrationData, CalibrationData | None]:
    """What to calibrate on, and what to measure on; None where the model's score brings its own data."""
    return (data, None) if scored else data.split(PARTS)
