"""Calibration: real samples through the FP32 graphs of a bundle, and the table of ranges that they leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from transom.calib.data import CalibrationData, Sample
from transom.calib.drive import put_through
from transom.calib.observe import ObservingBackend
from transom.calib.smooth import search_alpha
from transom.calib.table import GraphRanges, RangeTable, Smoothing, TensorRanges, graph_sha256
from transom.export.passes.smooth import Norm, find_norms, fold_smoothing
from transom.export.quantize import Recipe, observed_tensors
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError
from transom.runtime.spec import Graph
from transom.runtime.tasks import task_class

SMOOTHING_SAMPLES = 64  # from which the factors are searched; all samples are for the ranges


def calibrate(
    bundle: Bundle,
    canonical: Mapping[str, ir.Model],
    recipe: Recipe,
    data: CalibrationData,
    *,
    smooth: bool,
    tell: Callable[[str], None],
) -> RangeTable:
    """The ranges of every activation that ``recipe`` quantises, over all of ``data``.

    ``bundle`` is in FP32 and ``canonical`` its graphs by name. Where ``smooth``, factors are searched on the
    first samples and folded in before anything is measured. ``tell`` is called once per sample. Raises CalibrationError for
    samples that do not fit, values that are not finite, and graphs that no sample reaches.
    """
    samples: Sequence[Sample] = data.samples
    smoothing: dict[str, dict[str, Smoothing]] = {name: {} for name in canonical}
    if smooth:
        smoothing = search_smoothing(bundle, canonical, recipe, samples[:SMOOTHING_SAMPLES], tell)
    models = smoothed(canonical, smoothing)
    tensors = {name: observed_tensors(model, recipe) for name, model in models.items()}
    observed = observe(bundle, models, tensors, {}, samples, lambda: tell(f"calibrating on {data.name}"))
    for name, backend in observed.items():
        require_reached(name, backend, data)
    return RangeTable(
        graphs={
            name: GraphRanges(
                graph_sha256(canonical[name]),
                {tensor: TensorRanges(histogram, None) for tensor, histogram in backend.histograms.items()},
                smoothing[name],
            )
            for name, backend in observed.items()
        },
        data=data.describe(),
    )
