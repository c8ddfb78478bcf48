"""Run calibration samples through a bundle's FP32 graphs and return the table of the ranges of their activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.calib.collector import CollectingBackend
from transom.calib.data import CalibrationData, Sample, open_calibration_data
from transom.calib.graph_hash import graph_sha256
from transom.calib.run_samples import check_reach, run_sample
from transom.calib.smoothquant import LARGEST_FACTOR, search_alpha
from transom.calib.table import RANGES, GraphRanges, RangeTable, Smoothing
from transom.export.bundle_graphs import canonical_graphs, graph_file
from transom.export.bundle_writer import add_to_bundle
from transom.export.families.base import export_family
from transom.export.passes.smoothquant import find_smoothquant_sites, fold_smoothing
from transom.export.quantization.data_split import split_for_gate
from transom.export.quantization.options import QuantizationConfig, QuantizeOptions
from transom.export.quantization.quantizer import calibrated_tensors
from transom.export.reference_models import scored_model
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError
from transom.runtime.loading import load_with_backends

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
    smoothing: Mapping[str, Mapping[str, Smoothing]] | None = None,
) -> RangeTable:
    """Return the ranges of every activation that ``config`` quantises, over all of ``data``, each sample once.

    ``bundle`` is in FP32 and ``canonical`` its graphs by name, which stay as they are. Where ``smooth``, factors are
    searched on some of the samples, unless given as ``smoothing``, and folded in before anything is measured.
    ``report`` is called with what is being done, before each sample.
    Raises CalibrationError for samples that do not fit, values that are not finite, and a graph that no sample runs.
    """
    if smoothing is None and smooth:
        smoothing = search_smoothing(bundle, canonical, config.method, spread(data.samples), report)
    smoothing = smoothing or {name: {} for name in canonical}
    backends = {
        name: CollectingBackend(model, graph_file(bundle, name).graph, calibrated_tensors(model, config, name))
        for name, model in smoothed(canonical, smoothing).items()
    }
    run_all(bundle, backends, data.samples, lambda: report(f"calibrating on {data.name}"))
    return RangeTable(
        graphs={
            name: GraphRanges(graph_sha256(canonical[name]), backend.ranges, smoothing[name])
            for name, backend in backends.items()
        },
        data={"name": data.name, "samples": len(data.samples), "sha256": data.sha256},
    )


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
    run_all(bundle, backends, samples, lambda: report("looking for outliers to smooth"))
    smoothing: dict[str, dict[str, Smoothing]] = {name: {} for name in canonical}
    for name, backend in backends.items():
        ranges = backend.ranges
        for site in sites[name]:
            report("smoothing outliers")
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
) -> None:
    """Run every sample by the family's own code around ``backends``, one per graph."""
    runner = export_family(bundle.manifest.family, bundle.manifest.task).samples
    with load_with_backends(bundle, backends) as loaded:
        for sample in samples:
            before_each()
            for backend in backends.values():
                backend.sample = sample.name
            run_sample(loaded, sample, runner)
    for name, backend in backends.items():
        backend.random_input_check.check(name)
