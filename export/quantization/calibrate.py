"""Calibration: real samples through a bundle's FP32 graphs, and the table of ranges that they leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.calib.collector import CollectingBackend
from transom.calib.data import CalibrationData, Sample
from transom.calib.graph_hash import graph_sha256
from transom.calib.run_samples import run_sample
from transom.calib.smoothquant import LARGEST_FACTOR, search_alpha
from transom.calib.table import GraphRanges, RangeTable, Smoothing
from transom.export.families.base import export_family
from transom.export.passes.smoothquant import find_smoothquant_sites, fold_smoothing
from transom.export.quantization.quantizer import QuantizationConfig, observed_tensors
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError
from transom.runtime.loading import load_with_backends

ROWS = 256  # of each activation, from which factors are searched
FREE_WORTH = 0.98  # smooth where this much of the squared error is left, or less: a LayerNorm takes factors for nothing
MUL_WORTH = 0.7  # elsewhere they cost a Mul
SMOOTHING_SAMPLES = 64  # spread over the data, from which factors are searched; the ranges are of all samples


def calibrate(
    bundle: Bundle,
    canonical: Mapping[str, ir.Model],
    config: QuantizationConfig,
    data: CalibrationData,
    *,
    smooth: bool,
    tell: Callable[[str], None],
    smoothing: Mapping[str, Mapping[str, Smoothing]] | None = None,
) -> RangeTable:
    """The ranges of every activation that ``config`` quantises, over all of ``data``, each sample once.

    ``bundle`` is in FP32 and ``canonical`` its graphs by name, which stay as they are. Where ``smooth``, factors are
    searched on some of the samples, unless given as ``smoothing``, and folded in before anything is measured. ``tell``
    is called before each sample.
    Raises CalibrationError for samples that do not fit, values that are not finite, and a graph that no sample reaches.
    """
    if smoothing is None and smooth:
        smoothing = search_smoothing(bundle, canonical, config.method, spread(data.samples), tell)
    smoothing = smoothing or {name: {} for name in canonical}
    models = smoothed(canonical, smoothing)
    observed = {
        name: CollectingBackend(model, graph_of(bundle, name), observed_tensors(model, config))
        for name, model in models.items()
    }
    put_all_through(bundle, observed, data.samples, lambda: tell(f"calibrating on {data.name}"))
    return RangeTable(
        graphs={
            name: GraphRanges(graph_sha256(canonical[name]), backend.ranges, smoothing[name])
            for name, backend in observed.items()
        },
        data={"name": data.name, "samples": len(data.samples), "sha256": data.sha256},
    )


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """At most SMOOTHING_SAMPLES, evenly: neighbours in a sorted folder are alike."""
    places = np.linspace(0, len(samples) - 1, min(len(samples), SMOOTHING_SAMPLES)).astype(int)
    return [samples[int(place)] for place in places]


def search_smoothing(
    bundle: Bundle,
    canonical: Mapping[str, ir.Model],
    method: str,
    samples: Sequence[Sample],
    tell: Callable[[str], None],
) -> dict[str, dict[str, Smoothing]]:
    """The factors of every activation whose linear layers are better off with them, by graph and activation."""
    sites = {name: find_smoothquant_sites(model) for name, model in canonical.items()}
    observed = {
        name: CollectingBackend(model, graph_of(bundle, name), [], [site.name for site in sites[name]], ROWS)
        for name, model in canonical.items()
    }
    put_all_through(bundle, observed, samples, lambda: tell("looking for outliers to smooth"))
    found: dict[str, dict[str, Smoothing]] = {name: {} for name in canonical}
    for name, backend in observed.items():
        ranges = backend.ranges
        for site in sites[name]:
            tell("smoothing outliers")
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
                found[name][site.name] = Smoothing(alpha, factors)
    return found


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
        missing = [tensor for tensor in observed_tensors(model, config) if tensor not in table.graphs[name].tensors]
        if missing:
            step = "Leave out --also, or leave out --ranges" if config.extras else "Leave out --ranges"
            raise CalibrationError(
                f"the table of ranges has none of {missing[0]!r} of the graph {name!r}, which is to be quantised. "
                f"{step} and calibrate anew."
            )


def smoothed(
    canonical: Mapping[str, ir.Model], smoothing: Mapping[str, Mapping[str, Smoothing]]
) -> dict[str, ir.Model]:
    """Copies of the graphs with the factors folded in; weights that do not change are shared."""
    models = {name: model.clone() for name, model in canonical.items()}
    for name, model in models.items():
        fold_smoothing(model, factors_of(smoothing[name]))
    return models


def factors_of(smoothing: Mapping[str, Smoothing]) -> dict[str, NDArray[np.float32]]:
    return {name: found.factors for name, found in smoothing.items()}


def put_all_through(
    bundle: Bundle,
    observed: Mapping[str, CollectingBackend],
    samples: Sequence[Sample],
    before_each: Callable[[], None],
) -> None:
    """Every sample through the family's own code around the observing backends."""

    runner = export_family(bundle.manifest.family).samples
    with load_with_backends(bundle, observed) as loaded:
        for sample in samples:
            before_each()
            for backend in observed.values():
                backend.sample = sample.name
            run_sample(loaded, sample, runner)
    for name, backend in observed.items():
        backend.noise.check(name)


def graph_of(bundle: Bundle, name: str) -> Any:
    """The graph called ``name`` as bundle.json describes it."""
    return next(file.graph for file in bundle.manifest.graphs if file.graph.name == name)
