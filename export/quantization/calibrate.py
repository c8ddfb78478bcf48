"""Run calibration samples through a bundle's FP32 graphs and return the table of the ranges of their activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.calib.collector import CollectingBackend, require_reached
from transom.calib.data import CalibrationData, Sample, open_calibration_data
from transom.calib.graph_hash import graph_sha256
from transom.calib.histogram import Histogram
from transom.calib.run_samples import check_reach, run_batch, sample_batches
from transom.calib.smoothquant import LARGEST_FACTOR, search_alpha
from transom.calib.table import RANGES, GraphRanges, RangeTable, Smoothing, TensorRanges
from transom.export.bundle_graphs import canonical_graphs, graph_file
from transom.export.bundle_writer import add_to_bundle
from transom.export.families.base import export_family
from transom.export.passes.smoothquant import find_smoothquant_sites, fold_smoothing
from transom.export.quantization.data_split import split_for_gate
from transom.export.quantization.options import QuantizationConfig, QuantizeOptions
from transom.export.quantization.quantizer import calibrated_tensors
from transom.export.quantization.resume import CHUNK, KeepsNothing, Kept
from transom.export.reference_models import scored_model
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError
from transom.runtime.loading import load_with_backends
from transom.runtime.progress import Counter

NO_GRAPH = "0" * 64  # stands for the hash of a graph
ROWS = 256  # of each activation, from which factors are searched
FREE_WORTH = 0.98  # smooth where this much of the squared error is left, or less: a LayerNorm takes factors for nothing
MUL_WORTH = 0.7  # elsewhere they cost a Mul
SMOOTHING_SAMPLES = 64  # spread over the data, from which factors are searched; the ranges are of all samples


def calibrate_bundle(
    bundle: Bundle, options: QuantizeOptions, *, force: bool, report: Callable[[str], None]
) -> RangeTable:
    """Calibrate an FP32 bundle, write the table of ranges into it as RANGES, and return the table.

    Of data that is not a reference model's own a quarter is left for the gate, as an export leaves it. Raises
    CalibrationError for a bundle that is not in FP32, one that has ranges already (unless ``force``), and data that
    cannot be used.
    """
    manifest = bundle.manifest
    if manifest.precision != "fp32":
        already = "is quantised already" if manifest.quantization is not None else f"is in {manifest.precision}"
        raise CalibrationError(
            f"{bundle.folder} {already}; ranges are taken of FP32. Export the checkpoint with --precision fp32 and "
            "calibrate that bundle."
        )
    if RANGES in manifest.files and not force:
        raise CalibrationError(f"{bundle.folder} has a {RANGES}; give --force to replace it.")
    source = str(manifest.source.get("checkpoint"))
    config = options.config("int8", tuple(file.graph for file in manifest.graphs))
    data = open_calibration_data(options.data_for(source))
    check_reach(
        manifest.family,
        export_family(manifest.family, manifest.task).samples,
        data,
        tokenizer=manifest.tokenizer is not None,
        preprocess=manifest.preprocess is not None,
    )
    calibration, _ = split_for_gate(data, scored=scored_model(source, manifest.task) is not None)
    canonical = canonical_graphs(bundle)
    table = calibrate(bundle, canonical, config, calibration, smooth=options.smooth, report=report)
    add_to_bundle(bundle.folder, {RANGES: table.to_bytes()})
    return table


def calibrate(
    bundle: Bundle,
    canonical: Mapping[str, ir.Model],
    config: QuantizationConfig,
    data: CalibrationData,
    *,
    smooth: bool,
    report: Callable[[str], None],
) -> RangeTable:
    """Return the ranges of every activation that ``config`` quantises, over all of ``data``, each sample once.

    ``bundle`` is in FP32 and ``canonical`` its graphs by name, which stay as they are. Where ``smooth``, factors are
    searched on some of the samples, and folded in before anything is measured. ``report`` is called with what is being
    done, before each sample.
    Raises CalibrationError for samples that do not fit, values that are not finite, and a graph that no sample runs.
    """
    kept = KeepsNothing()
    smoothing = searched_smoothing(bundle, canonical, config, data, smooth=smooth, report=report, kept=kept)
    calibration = SharedCalibration(bundle, canonical, config, {0: data}, smoothing, report, kept)
    return calibration.table(data, [0])


def searched_smoothing(
    bundle: Bundle,
    canonical: Mapping[str, ir.Model],
    config: QuantizationConfig,
    data: CalibrationData,
    *,
    smooth: bool,
    report: Callable[[str], None],
    kept: Kept,
) -> dict[str, dict[str, Smoothing]]:
    """Return SmoothQuant's factors, searched on some of the samples of ``data``; none unless ``smooth``."""
    if not smooth:
        return {name: {} for name in canonical}

    def search() -> RangeTable:
        found = search_smoothing(bundle, canonical, config.method, spread(data.samples), report)
        return partial_table({name: {} for name in canonical}, data, found)

    what = {"stage": "smoothing", "method": config.method, "data": data.sha256}
    return {name: dict(graph.smoothing) for name, graph in kept.compute(what, TableFormat(), search).graphs.items()}


class TableFormat:
    """Ranges of some samples, or smoothing, as a table that holds nothing else."""

    def write(self, result: RangeTable) -> Any:
        return result.to_json()

    def read(self, value: Any) -> RangeTable:
        return RangeTable.from_json(value)


def partial_table(
    ranges: Mapping[str, Mapping[str, TensorRanges]],
    data: CalibrationData,
    smoothing: Mapping[str, Mapping[str, Smoothing]],
) -> RangeTable:
    """Return a table of a part of what an export computes, of no graph in particular."""
    graphs = {name: GraphRanges(NO_GRAPH, tensors, smoothing[name]) for name, tensors in ranges.items()}
    return RangeTable(graphs, {"name": data.name, "samples": max(1, len(data.samples)), "sha256": data.sha256})


class SharedCalibration:
    """Ranges of activations over several ``parts`` of data, each sample run once for all tables that it counts in.

    The histograms of several parts add up to that of all of their values. ``smoothing`` is folded into the graphs
    first. A part is run when a table first needs it, or with others by ``collect``, which opens the sessions once.
    Raises CalibrationError as ``calibrate`` does.
    """

    def __init__(
        self,
        bundle: Bundle,
        canonical: Mapping[str, ir.Model],
        config: QuantizationConfig,
        parts: Mapping[int, CalibrationData],
        smoothing: Mapping[str, Mapping[str, Smoothing]],
        report: Callable[[str], None],
        kept: Kept,
    ) -> None:
        self._bundle, self._canonical, self._config = bundle, canonical, config
        self._parts, self._smoothing, self._report, self._kept = parts, smoothing, report, kept
        self._ranges: dict[int, dict[str, dict[str, TensorRanges]]] = {}

    def collect(self, parts: Iterable[int]) -> None:
        """Run the samples of the parts that were not run yet, CHUNK at a time."""
        missing = [part for part in parts if part not in self._ranges]
        counter = Counter(self._report, "calibrating", sum(len(self._parts[part].samples) for part in missing))
        opened: dict[str, CollectingBackend] = {}
        nothing: Mapping[str, Mapping[str, Smoothing]] = {name: {} for name in self._canonical}

        def run(chunk: CalibrationData) -> RangeTable:
            if not opened:
                opened.update(self._open())
            run_all(self._bundle, opened, chunk.samples, counter.next, together=True)
            return partial_table({name: each.take_ranges() for name, each in opened.items()}, chunk, nothing)

        for part in missing:
            chunks = []
            for chunk in self._parts[part].chunks(CHUNK):
                what = {"stage": "ranges", "config": self._described(), "data": chunk.sha256}
                ran = counter.done
                chunks.append(self._kept.compute(what, TableFormat(), partial(run, chunk)))
                counter.skip(len(chunk.samples) - (counter.done - ran))
            self._ranges[part] = {
                name: merged([chunk.graphs[name].tensors for chunk in chunks]) for name in self._canonical
            }
        for name, backend in opened.items():
            backend.random_input_check.check(name)

    def _open(self) -> dict[str, CollectingBackend]:
        return {
            name: CollectingBackend(
                model, graph_file(self._bundle, name).graph, calibrated_tensors(model, self._config, name)
            )
            for name, model in smoothed(self._canonical, self._smoothing).items()
        }

    def _described(self) -> dict[str, Any]:
        """Return what the ranges of a sample depend on beside the bundle, as plain data."""
        factors = {
            name: {site: found.factors.tobytes().hex() for site, found in graph.items()}
            for name, graph in self._smoothing.items()
        }
        config = self._config
        return {"smoothing": factors, "activations": dict(config.activations), "also": list(config.optional_sites)}

    def table(self, data: CalibrationData, parts: Sequence[int]) -> RangeTable:
        """Return the table of ranges of ``data``, which is made of ``parts``."""
        self.collect(parts)
        return RangeTable(
            graphs={
                name: GraphRanges(graph_sha256(model), self._merged(name, parts), self._smoothing[name])
                for name, model in self._canonical.items()
            },
            data={"name": data.name, "samples": len(data.samples), "sha256": data.sha256},
        )

    def _merged(self, graph: str, parts: Sequence[int]) -> dict[str, TensorRanges]:
        ranges = merged([self._ranges[part][graph] for part in parts])
        require_reached(ranges, self._canonical[graph])
        return ranges


def merged(collected: Sequence[Mapping[str, TensorRanges]]) -> dict[str, TensorRanges]:
    """Return the ranges of all the samples of several collections of the same tensors."""
    return {
        tensor: TensorRanges(Histogram.merged(ranges[tensor].histogram for ranges in collected))
        for tensor in collected[0]
    }


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """Return at most SMOOTHING_SAMPLES, evenly: neighbours in a sorted folder are alike."""
    indices = np.linspace(0, len(samples) - 1, min(len(samples), SMOOTHING_SAMPLES)).astype(int)
    return [samples[int(index)] for index in indices]


def search_smoothing(
    bundle: Bundle,
    canonical: Mapping[str, ir.Model],
    method: str,
    samples: Sequence[Sample],
    report: Callable[[str], None],
) -> dict[str, dict[str, Smoothing]]:
    """Search SmoothQuant's factors; return those that lower the error of the linear layers, by graph and activation."""
    sites = {name: find_smoothquant_sites(model) for name, model in canonical.items()}
    backends = {
        name: CollectingBackend(
            model, graph_file(bundle, name).graph, [], channels=[site.name for site in sites[name]], rows=ROWS
        )
        for name, model in canonical.items()
    }
    run_all(bundle, backends, samples, Counter(report, "looking for outliers to smooth", len(samples)).next)
    for name, backend in backends.items():
        backend.random_input_check.check(name)
    counter = Counter(report, "smoothing outliers", sum(map(len, sites.values())))
    smoothing: dict[str, dict[str, Smoothing]] = {name: {} for name in canonical}
    for name, backend in backends.items():
        ranges = backend.ranges
        for site in sites[name]:
            counter.next()
            channels = ranges[site.name].channels
            assert channels is not None
            alpha, factors = search_alpha(
                backend.kept_rows(site.name),
                [linear.kernel() for linear in site.linears],
                method=method,
                activation_max=np.maximum(np.abs(channels.minimum), np.abs(channels.maximum)),
                worth=FREE_WORTH if site.norm is not None else MUL_WORTH,
            )
            if alpha:
                smoothing[name][site.name] = Smoothing(alpha, factors)
    return smoothing


def require_fitting(table: RangeTable, canonical: Mapping[str, ir.Model], config: QuantizationConfig) -> None:
    """Raise CalibrationError unless ``table`` is of these graphs and holds every range that ``config`` needs."""
    for name, model in canonical.items():
        ranges = table.require(name, graph_sha256(model))
        channels = {site.name: site.linears[0].kernel_shape[0] for site in find_smoothquant_sites(model)}
        for site, smoothing in ranges.smoothing.items():
            if len(smoothing.factors) != channels.get(site):
                raise CalibrationError(
                    f"the table of ranges smooths {site!r} of the graph {name!r} by {len(smoothing.factors)} factors; "
                    f"expected {channels.get(site, 'none')}. Calibrate again."
                )
            least, most = float(smoothing.factors.min()), float(smoothing.factors.max())
            if least < 1 / LARGEST_FACTOR or most > LARGEST_FACTOR:  # weights times these might not be finite
                raise CalibrationError(
                    f"the table of ranges smooths {site!r} of the graph {name!r} by factors from {least:g} to "
                    f"{most:g}; expected {1 / LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}. Calibrate again."
                )
    if config.weights_only:
        return
    for name, model in smoothed(canonical, {name: table.graphs[name].smoothing for name in canonical}).items():
        needed = calibrated_tensors(model, config, name)
        missing = [tensor for tensor in needed if tensor not in table.graphs[name].tensors]
        if missing:
            step = "Leave out --also, or leave out --ranges" if config.optional_sites else "Leave out --ranges"
            raise CalibrationError(
                f"the table of ranges has none of {missing[0]!r} of the graph {name!r}, which is to be quantised. "
                f"{step} and calibrate anew."
            )


def smoothed(
    canonical: Mapping[str, ir.Model], smoothing: Mapping[str, Mapping[str, Smoothing]]
) -> dict[str, ir.Model]:
    """Return copies of the graphs with the factors folded in; weights that do not change are shared."""
    models = {name: model.clone() for name, model in canonical.items()}
    for name, model in models.items():
        fold_smoothing(model, factors_of(smoothing[name]))
    return models


def factors_of(smoothing: Mapping[str, Smoothing]) -> dict[str, NDArray[np.float32]]:
    return {name: found.factors for name, found in smoothing.items()}


def run_all(
    bundle: Bundle,
    backends: Mapping[str, CollectingBackend],
    samples: Sequence[Sample],
    before_each: Callable[[], None],
    *,
    together: bool = False,
) -> None:
    """Run every sample by the family's own code around ``backends``, one per graph, which stay open.

    In their order, or ``together`` where their rows are equal.
    """
    runner = export_family(bundle.manifest.family, bundle.manifest.task).samples

    def run(batch: Sequence[Sample]) -> None:
        for backend in backends.values():
            backend.sample = batch[0].name
        run_batch(loaded, batch, runner)

    with load_with_backends(bundle, backends) as loaded:
        for batch in sample_batches(loaded, samples, runner) if together else ([sample] for sample in samples):
            for _ in batch:
                before_each()
            try:
                run(batch)
            except CalibrationError:
                for sample in batch if len(batch) > 1 else ():
                    run([sample])  # raises it again, and names the one
                raise
