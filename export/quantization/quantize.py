"""The stage of an export that makes integers: data, ranges, gate, layers, and what bundle.json records of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

import onnx_ir as ir

from transom.calib.data import CalibrationData, open_calibration_data
from transom.calib.table import RANGES, RangeTable, Smoothing, load_table
from transom.export.flavours import Flavours
from transom.export.quantization.calibrate import calibrate, require_fitting, smoothed
from transom.export.quantization.gate import Gate
from transom.export.quantization.heldout import reference_samples
from transom.export.quantization.options import QuantizeOptions
from transom.export.quantization.quantizer import NONE
from transom.export.quantization.search import Found, search_layers
from transom.export.quantization.trial import CPU, Trial, ranking_reference
from transom.export.quantization.verdict import ENOUGH
from transom.export.ranges import beyond_fp16
from transom.export.scores import SCORES
from transom.runtime.bundle import Bundle
from transom.runtime.cpu import this_cpu
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks import task_class

HELD_OUT = 0.25  # of a user's calibration data, for the gate
MOST_TRIALS = 4  # calibrations, where few cases are held out

Largest = Mapping[str, tuple[float, str]]


@dataclass(frozen=True)
class Quantized:
    """``flavours`` ship, with the file RANGES beside them; ``record`` is what bundle.json says."""

    flavours: Flavours
    table: RangeTable
    record: dict[str, Any]


class Quantization:
    """Everything about one model that its calibrations and gates share.

    ``bundle`` is in FP32, ``canonical`` its graphs by name, ``source`` the user's word for the checkpoint.
    ``measure`` gives the largest values of FP32 graphs, by which they fit FP16 or not; it consumes its argument.
    """

    def __init__(
        self,
        bundle: Bundle,
        canonical: Mapping[str, ir.Model],
        source: str,
        precision: str,
        options: QuantizeOptions,
        measure: Callable[[Mapping[str, ir.Model]], Largest],
        tell: Callable[[str], None],
    ) -> None:
        self._bundle, self._canonical, self._source = bundle, canonical, source
        self._options, self._measure, self._tell = options, measure, tell
        self._recipe = options.recipe(precision, tuple(file.graph for file in bundle.manifest.graphs))
        self._scored = is_scored(source, bundle.manifest.task)
        self._data = open_calibration_data(options.data_for(source))
        self._smoothing: Mapping[str, Mapping[str, Smoothing]] | None = None  # the first calibration's, for all

    def run(self) -> Quantized:
        """Raises CalibrationError for data that cannot be used, AccuracyError where the gate cannot be met."""
        calibration, held_out = held_out_of(self._data, 0, scored=self._scored)
        table = self._table(calibration)
        self._smoothing = {name: graph.smoothing for name, graph in table.graphs.items()}
        half = self._fits_fp16(table)
        first = self._trial(table, held_out, half=half)
        n = first.judge(CPU, ()).n
        more = range(1, min(MOST_TRIALS, ceil(ENOUGH / max(n, 1)))) if self._options.ranges is None else ()
        trials = [first, *(self._another(seed, half=half) for seed in more)]
        samples = reference_samples(self._source) if held_out is None else list(held_out.samples)
        reference = ranking_reference(self._bundle, samples, self._name_of(held_out))
        found = search_layers(trials, reference, gate=self._options.gate, tell=self._tell)
        return Quantized(first.quantizer.flavours(found.kept), table, self._record(table, found, first, half=half))

    def _table(self, data: CalibrationData) -> RangeTable:
        if self._options.ranges is None:
            return calibrate(
                self._bundle,
                self._canonical,
                self._recipe,
                data,
                smooth=self._options.smooth,
                smoothing=self._smoothing,
                tell=self._tell,
            )
        table = load_table(self._options.ranges)
        require_fitting(table, self._canonical, self._recipe)
        return table

    def _another(self, seed: int, *, half: bool) -> Trial:
        """The same on other samples: of a scored model on half of the data, of any other on another split."""
        calibration, held_out = held_out_of(self._data, seed, scored=self._scored)
        return self._trial(self._table(calibration), held_out, half=half)

    def _trial(self, table: RangeTable, held_out: CalibrationData | None, *, half: bool) -> Trial:
        with task_class(self._bundle.manifest.family)(self._bundle) as fp32:
            self._tell("measuring FP32")
            if held_out is None:
                gate = Gate.of_reference(self._source, fp32)
            else:
                gate = Gate(fp32, held_out.samples, self._name_of(held_out))
        return Trial(self._bundle, self._canonical, self._recipe, table, gate, half=half)

    def _fits_fp16(self, table: RangeTable) -> bool:
        if self._recipe.weights_only:
            return True
        self._tell("measuring every tensor's range")
        smoothing = {name: table.graphs[name].smoothing for name in self._canonical}
        return not beyond_fp16(self._measure(smoothed(self._canonical, smoothing)))

    def _name_of(self, held_out: CalibrationData | None) -> str:
        return f"held-out data of {self._source}" if held_out is None else held_out.name

    def _record(self, table: RangeTable, found: Found, trial: Trial, *, half: bool) -> dict[str, Any]:
        recipe = self._recipe
        record = {
            "activations": dict(recipe.activations),
            "method": recipe.method,
            "weight_bits": recipe.weight_bits,
            "block_size": recipe.block_size if NONE in recipe.activations.values() else None,
            "also": list(recipe.extras),
            "elsewhere": {"cpu": "fp32"} | ({} if recipe.weights_only else {"default": "fp16" if half else "fp32"}),
            "data": dict(table.data),
            "instruction_set": this_cpu().name,
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
                for graph, name in trial.quantizer.layers
            ],
            "curve": [dict(point) for point in found.curve],
            "gate": {kind: verdict.to_json() for kind, verdict in found.verdicts.items()},
        }
        return {key: finite(value) for key, value in record.items()}


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for: the error of outputs that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def is_scored(source: str, task: str) -> bool:
    """Whether a checkpoint has a task score, with held-out data of its own."""
    scored = SCORES.get(source)
    return scored is not None and scored.task == task


def gate_again(source: str, fp32: LoadedBundle, data: Sequence[str]) -> Gate | None:
    """The gate that a bundle was judged by; None where it takes the user's data and they are not given."""
    if is_scored(source, fp32.manifest.task):
        return Gate.of_reference(source, fp32)
    if not data:
        return None
    _, held_out = held_out_of(open_calibration_data(data), 0, scored=False)
    assert held_out is not None
    return Gate(fp32, held_out.samples, held_out.name)


def held_out_of(data: CalibrationData, seed: int, *, scored: bool) -> tuple[CalibrationData, CalibrationData | None]:
    """What to calibrate on, and what to measure on; None where the model's score brings its own data.

    The first calibration of a scored model takes everything, each further one a half of its own.
    """
    if not scored:
        return data.split(HELD_OUT, seed)
    return (data if seed == 0 else data.split(0.5, seed)[0]), None
