"""The stages of an export in order; docs/walk.md is the map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from transom.export.bundle import BundleWriter, axes_to_json, check_out, graph_to_json, new_bundle
from transom.export.flavours import Flavours, make_flavours
from transom.export.golden import Golden
from transom.export.onnx import onnx_from_module
from transom.export.parity import TOLERANCES, Case, PyTorchBackend, grid, require_parity
from transom.export.ranges import largest_values, require_fp16_range
from transom.export.samples import Samples, single_rows
from transom.export.scores import score_both
from transom.export.source import Loaded, load_source
from transom.runtime.backend import Array
from transom.runtime.bundle import PRECISIONS, Bundle, Manifest
from transom.runtime.compare import compare_outputs, largest_scales, on_scales
from transom.runtime.errors import CheckpointError, ExportError
from transom.runtime.ort import OrtBackend
from transom.runtime.selftest import GOLDEN
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks import task_class

Progress = Callable[[str, int, int], None]
TOOLS = ("transom", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "tokenizers", "pillow", "numpy")


class Steps:
    """Tells ``progress`` what is being done, how many steps are behind and how many there are."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, -1, total

    def next(self, what: str) -> None:
        self._done += 1
        self._progress(what, self._done, max(self._total, self._done))

    def expect(self, more: int) -> None:
        self._total += more


def silent(what: str, done: int, total: int) -> None:
    """A ``Progress`` that tells nobody."""


def export(
    source: str,
    out: Path,
    *,
    precision: str = "fp32",
    task: str | None = None,
    max_sizes: Mapping[str, int] | None = None,
    image_size: tuple[int, int] | None = None,
    ignore_unused: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Carry a checkpoint to a bundle at ``out`` that has been held against PyTorch.

    ``source`` is a reference model's name, a checkpoint folder or a hub id; ``max_sizes`` sets the
    bounds of axes ("S": 512); ``image_size`` is (height, width) in pixels. ``progress`` is told each
    stage: what, how many are done, how many there are.

    Raises CheckpointError when the source cannot be used, ParityError or PrecisionError when the
    artefact would not compute what PyTorch computes, ExportError for everything else that stops it.
    In each case nothing is left at ``out``, or the old bundle is.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"--precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    check_out(out, force=force)
    steps = Steps(progress, total=5 + (precision == "fp16"))
    steps.next(f"reading {source}")
    loaded = load_source(
        source, task=task, max_sizes=max_sizes or {}, image_size=image_size, ignore_unused=ignore_unused
    )
    samples, shapes = samples_for(loaded), grid(loaded.axes)
    steps.expect(len(shapes))

    steps.next("tracing the module to ONNX")
    canonical = onnx_from_module(loaded.module, loaded.graph, loaded.axes)
    steps.next(f"making the {precision} graph")
    flavours = make_flavours(canonical, loaded.graph, precision)
    largest: dict[str, tuple[float, str]] = {}
    if precision == "fp16":
        steps.next("measuring every tensor's range")
        largest = largest_values(canonical, (row for sizes in shapes for row in single_rows(samples.feeds(sizes))))
        require_fp16_range(largest)
    del canonical

    with new_bundle(out, force=force) as writer:
        steps.next("writing the bundle")
        description = describe(loaded, precision, flavours)
        write_files(writer, loaded, flavours)
        writer.describe(description)
        bundle, golden = Bundle(writer.folder), Golden()
        with open_bundle(bundle) as ours, open_pytorch(bundle, loaded) as theirs:
            cases = check_parity(ours, theirs, flavours, samples, shapes, golden, steps)
            steps.next("scoring")
            score = score_both(loaded.checkpoint.source, theirs, ours)
        writer.add(GOLDEN, golden.to_bytes())
        figures = {"parity": parity_to_json(cases, precision, largest), **({"score": score} if score else {})}
        writer.describe({**description, **figures})
        manifest = Bundle(writer.folder).manifest
    steps.next("done")
    return manifest


def verify(
    bundle: Path,
    *,
    source: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = silent,
) -> list[Case]:
    """Hold a bundle against PyTorch again, over the grid of its axes; the worst elements, case by case.

    ``source`` says where the checkpoint lies now, if it moved. Raises ParityError beyond tolerance,
    CheckpointError when the checkpoint is gone or is not the one the bundle was made from.
    """
    steps = Steps(progress, total=1)
    opened = Bundle(bundle)
    manifest = opened.manifest
    steps.next("reading the checkpoint")
    recorded = manifest.source
    loaded = load_source(
        source or str(recorded.get("checkpoint")),
        task=manifest.task,
        max_sizes={name: axis.max for name, axis in manifest.axes.items()},
        image_size=tuple(manifest.config["image_size"]) if "image_size" in manifest.config else None,
        ignore_unused=True,
    )
    if loaded.checkpoint.sha256() != recorded.get("sha256"):
        raise CheckpointError(
            f"{loaded.checkpoint.folder} is not the checkpoint that {bundle} was made from: its hash differs. "
            "Give the right one with --source, or export again."
        )
    samples, shapes = samples_for(loaded), grid(manifest.axes)
    steps.expect(len(shapes))
    with open_bundle(opened, device, threads) as ours, open_pytorch(opened, loaded) as theirs:
        cases = check_parity(ours, theirs, None, samples, shapes, Golden(), steps)
    steps.next("done")
    return cases


def check_parity(
    ours: LoadedBundle,
    theirs: LoadedBundle,
    flavours: Flavours | None,
    samples: Samples,
    shapes: list[dict[str, int]],
    golden: Golden,
    steps: Steps,
) -> list[Case]:
    """Run both sides over the grid; ParityError if any shape is beyond tolerance.

    Errors are taken on each output's scale over the whole grid.
    """
    precision, name = ours.manifest.precision, ours.manifest.name
    emulated = None
    if flavours is not None and flavours.emulated is not None:
        emulated = OrtBackend(flavours.emulated, flavours.emulated_files.__getitem__, "cpu", None)
    cases = []
    for sizes in shapes:
        shown = " ".join(f"{axis}={size}" for axis, size in sizes.items())
        steps.next(f"parity at {shown}")
        feeds = samples.feeds(sizes)
        expected, found = theirs.run(feeds), ours.run(feeds)
        golden.offer(shown, feeds, expected, found)
        graph = ours.graph_for(feeds)
        cases.append(Case(sizes, compare_outputs(graph, feeds, found, expected)))
        del found  # outputs at the maximum can be gigabytes
        if emulated is not None:
            cases.append(Case(sizes, compare_outputs(graph, feeds, run_rows(emulated, feeds, expected), expected)))
    scales = largest_scales(comparison for case in cases for comparison in case.comparisons)
    cases = [Case(case.shape, on_scales(case.comparisons, scales)) for case in cases]
    require_parity(cases, precision, f"{name} in {precision}")
    return cases


def run_rows(backend: OrtBackend, feeds: Mapping[str, Array], like: Mapping[str, Array]) -> dict[str, Array]:
    """A batch through ``backend`` row by row; outputs named and shaped as ``like``."""
    shapes = {name: (1, *array.shape[1:]) for name, array in like.items()}
    rows = [backend.run(row, shapes) for row in single_rows(feeds)]
    return {name: np.concatenate([row[name] for row in rows]) for name in like}


def samples_for(loaded: Loaded) -> Samples:
    return Samples(loaded.graph, loaded.text_encoder(), loaded.preprocess)


def open_bundle(bundle: Bundle, device: str = "cpu", threads: int | None = None) -> LoadedBundle:
    """The bundle as a device would load it."""
    return task_class(bundle.manifest.family)(bundle, device, threads)


def open_pytorch(bundle: Bundle, loaded: Loaded) -> LoadedBundle:
    """The same runtime around the PyTorch module: whatever differs comes from the graph alone."""
    return task_class(bundle.manifest.family)(
        bundle, opener=lambda graph, read, device, threads: PyTorchBackend(loaded.module, graph.graph)
    )


def write_files(writer: BundleWriter, loaded: Loaded, flavours: Flavours) -> None:
    for name, data in flavours.files.items():
        writer.add(name, data)
    if loaded.tokenizer is not None:
        data, spec = loaded.tokenizer
        writer.add(spec.file, data)


def describe(loaded: Loaded, precision: str, flavours: Flavours) -> dict[str, Any]:
    """bundle.json but for the figures, which come when they are measured."""
    optional = {
        "tokenizer": loaded.tokenizer[1].to_json() if loaded.tokenizer else None,
        "preprocess": loaded.preprocess.to_json() if loaded.preprocess else None,
    }
    return {
        "name": loaded.checkpoint.name,
        "family": loaded.family.name,
        "task": loaded.task,
        "precision": precision,
        "config": asdict(loaded.config),
        "axes": axes_to_json(loaded.axes),
        "graphs": [graph_to_json(flavours.graph)],
        "labels": list(loaded.labels),
        "options": dict(loaded.options),
        **{key: value for key, value in optional.items() if value is not None},
        "source": {
            "checkpoint": loaded.checkpoint.source,
            "sha256": loaded.checkpoint.sha256(),
            "weights_left_out": sorted(loaded.left_out)[:100],
        },
        "tools": {tool: version(tool) for tool in TOOLS},
        "parity": {"tolerance": TOLERANCES[precision]},
    }


def parity_to_json(cases: list[Case], precision: str, largest: Mapping[str, tuple[float, str]]) -> dict[str, Any]:
    """The figures of the parity run; ``fp16_largest`` is the tensor nearest to the end of FP16."""
    worst = max(cases, key=lambda case: case.worst.error)
    figures: dict[str, Any] = {
        "metric": "max|ours - pytorch| at a shape / max|pytorch| over all shapes (logits: at least 1), per output",
        "tolerance": TOLERANCES[precision],
        "scales": largest_scales(worst.comparisons),
        "worst": {"sizes": dict(worst.shape), **worst.worst.to_json()},
        "cases": [{"sizes": dict(c.shape), "errors": {e.tensor: e.error for e in c.comparisons}} for c in cases],
    }
    if largest:
        name, (value, module) = max(largest.items(), key=lambda item: item[1][0])
        figures["fp16_largest"] = {"tensor": name, "module": module, "value": value}
    return figures
