"""The stages of an export in order; docs/walk.md is the map."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from transom.calib.data import CalibrationData, open_calibration_data
from transom.calib.run_samples import check_reach
from transom.calib.table import RANGES, RangeTable, load_table
from transom.export.bundle_graphs import operator_counts, stored_graphs
from transom.export.bundle_writer import BundleWriter, check_out, new_bundle
from transom.export.checkpoint import LoadedCheckpoint, load_checkpoint, reload_checkpoint
from transom.export.families.base import export_family
from transom.export.onnx_export import onnx_from_module
from transom.export.parity.backends import open_bundle, open_default_files, open_pytorch
from transom.export.parity.cases import ParityCases
from transom.export.parity.compare import TOLERANCES, Limit, check_greedy, check_parity, export_limit
from transom.export.parity.fp16_range import Largest, Ranges, measure_ranges, require_fp16_range
from transom.export.parity.inputs import parity_inputs
from transom.export.parity.results import CaseResult, Golden, parity_to_json
from transom.export.progress import Progress, ProgressReporter, silent
from transom.export.quantization.candidate import gated
from transom.export.quantization.gate_result import GateResult
from transom.export.quantization.options import PLAIN, QuantizeOptions
from transom.export.quantization.quantize import Quantization, Quantized, gate_again
from transom.export.reference_models import score_both
from transom.export.staging import PARTIAL, staging_dir
from transom.export.variants import (
    Variants,
    check_file,
    emulated_variants,
    emulations,
    make_variants,
    open_variants,
    pack,
    simulated,
)
from transom.runtime.bundle import Bundle
from transom.runtime.errors import AccuracyError, ExportError
from transom.runtime.golden import GOLDEN
from transom.runtime.golden_reference import pytorch_tolerance
from transom.runtime.greedy_check import Divergence
from transom.runtime.manifest import PRECISIONS, QUANTIZED, Manifest
from transom.runtime.manifest_graphs import axis_to_json, graph_to_json
from transom.runtime.session import LoadedBundle

TOOLS = (
    "transom",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "tokenizers",
    "sentencepiece",
    "pillow",
    "numpy",
)

CHECKED, NOT_CHECKED = "checked", "not checked"  # the accuracy of a quantised bundle


@dataclass(frozen=True)
class Verified:
    """The worst elements, case by case, and the rows whose greedy generation left PyTorch's at a near tie.

    ``gate`` is the accuracy gate's, of a quantised bundle; None where it was not measured. ``accuracy`` is CHECKED,
    NOT_CHECKED, or None of a bundle that is not quantised, whose parity says it all.
    """

    cases: list[CaseResult]
    near_ties: list[Divergence]
    gate: GateResult | None
    accuracy: str | None


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
    quantize: QuantizeOptions = PLAIN,
    progress: Progress = silent,
) -> Manifest:
    """Carry a checkpoint to a bundle at ``out`` that has been held against PyTorch.

    ``source`` is a reference model's name, a checkpoint folder or a hub id; ``max_sizes`` sets the
    bounds of axes ("S": 512); ``image_size`` is (height, width) in pixels; ``quantize`` says how "int8" and "int4" are
    made. ``progress`` is told each stage: what, how many are done, how many there are.

    Raises CheckpointError when the source cannot be used, ParityError or PrecisionError when the
    artefact would not compute what PyTorch computes, CalibrationError for calibration data that cannot be used,
    AccuracyError where a quantised model is too far off, ExportError for everything else that stops it.
    In each case nothing is left at ``out``, or the old bundle is.
    """
    check_out(out, force=force)
    calibration = check_options(precision, source, quantize)
    steps = ProgressReporter(progress, total=5 + (precision == "fp16"))
    steps.next(f"reading {source}")
    loaded = load_checkpoint(
        source, task=task, max_sizes=max_sizes or {}, image_size=image_size, ignore_unused=ignore_unused
    )
    if calibration is not None:
        calibration.check(loaded, precision, quantize)
    steps.next("tracing the module to ONNX")
    canonical = {
        graph.name: onnx_from_module(part, graph, loaded.axes)
        for graph, part in zip(loaded.graphs, loaded.parts().values(), strict=True)
    }
    operators = {name: operator_counts(model) for name, model in canonical.items()}
    with new_bundle(out, force=force) as writer:
        steps.next(f"making the {precision} graph")
        record: dict[str, Any] = {}
        if calibration is not None:
            made = quantized(writer.folder, loaded, canonical, precision, quantize, calibration, steps)
            variants, record = made.variants, {"quantization": made.record}
            writer.add(RANGES, made.table.to_bytes())
        else:
            variants = make_variants(canonical, loaded.graphs, precision)
        steps.next("writing the bundle")
        description = describe(loaded, precision, variants) | record
        write_files(writer, loaded, variants)
        writer.describe(description)
        bundle, golden = Bundle(writer.folder), Golden()
        open_default_files(bundle)
        with open_pytorch(bundle, loaded) as theirs:
            exercises = ParityCases(
                bundle.manifest, parity_inputs(loaded.graphs, loaded.open_tokenizer(), loaded.preprocess)
            )
            steps.expect(len(exercises))
            ranges = Ranges()
            if precision == "fp16":
                steps.next("measuring every tensor's range")
                ranges = measure_ranges(bundle, canonical, exercises, sums=True)
                require_fp16_range(ranges.tensors)
            del canonical
            with open_bundle(bundle) as ours, contextlib.ExitStack() as stack:
                third = None
                if variants.emulated:
                    third = stack.enter_context(open_variants(bundle, emulated_variants(variants)))
                cases = check_parity(ours, theirs, third, exercises, golden, export_limit(precision), steps.next)
                near_ties = check_greedy(ours, theirs, third, exercises, cases, golden)
                steps.next("scoring")
                score = score_both(loaded.checkpoint.source, theirs, ours)
        writer.add(GOLDEN, golden.to_bytes())
        figures = {
            "operators": operators,
            "parity": parity_to_json(cases, TOLERANCES[precision], ranges, near_ties),
            **({"score": score} if score else {}),
        }
        writer.describe({**description, **figures})
        manifest = Bundle(writer.folder).manifest
    steps.next("done")
    return manifest


@dataclass(frozen=True)
class Calibration:
    """What a quantised export reads beside the checkpoint: ``data``, and ``table`` where --ranges gives one."""

    data: CalibrationData
    table: RangeTable | None

    def check(self, loaded: LoadedCheckpoint, precision: str, options: QuantizeOptions) -> None:
        """Raise CalibrationError or ExportError for what does not go with the model, before anything is computed."""
        options.config(precision, loaded.graphs)
        tokenizer, preprocess = loaded.tokenizer is not None, loaded.preprocess is not None
        check_reach(
            loaded.family.name,
            export_family(loaded.family.name).samples,
            self.data,
            tokenizer=tokenizer,
            preprocess=preprocess,
        )


def check_options(precision: str, source: str, quantize: QuantizeOptions) -> Calibration | None:
    """Refuse what cannot be meant, and open what a quantised export reads; None where it is not quantised."""
    if precision not in PRECISIONS:
        raise ExportError(f"--precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if precision in QUANTIZED:
        quantize.check(precision)
        data = open_calibration_data(quantize.data_for(source))
        return Calibration(data, None if quantize.ranges is None else load_table(quantize.ranges))
    if quantize != PLAIN:
        raise ExportError(
            f"--precision is {precision}, which is not quantised, and an option for quantisation is given; leave it "
            "out, or choose --precision int8."
        )
    return None


def quantized(
    folder: Path,
    loaded: LoadedCheckpoint,
    canonical: Mapping[str, ir.Model],
    precision: str,
    options: QuantizeOptions,
    calibration: Calibration,
    steps: ProgressReporter,
) -> Quantized:
    """Integer graphs whose accuracy was measured, beside an FP32 bundle that exists for as long as this takes."""

    def measure(models: Mapping[str, ir.Model]) -> Largest:
        inputs = parity_inputs(loaded.graphs, loaded.open_tokenizer(), loaded.preprocess)
        exercises = ParityCases(original.manifest, inputs)
        return measure_ranges(original, models, exercises).tensors

    with staging_dir(folder, PARTIAL) as beside:
        writer = BundleWriter(beside)
        variants = make_variants(canonical, loaded.graphs, "fp32")
        write_files(writer, loaded, variants)
        writer.describe(describe(loaded, "fp32", variants))
        original = Bundle(beside)
        return Quantization(
            original,
            canonical,
            loaded.checkpoint.source,
            precision,
            options,
            calibration.data,
            calibration.table,
            measure,
            steps.more,
        ).run()


def verify(
    bundle: Path,
    *,
    source: str | None = None,
    calibration_data: Sequence[str] = (),
    accuracy: bool = True,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = silent,
) -> Verified:
    """Compare a bundle with PyTorch again, through everything that its export put it through.

    Of a bundle with a variant for the CPU that is the variant, and on a CPU the file for other devices too, as those
    would compute it: half precision rounded after every operator, Q/DQ pairs in float32.

    ``source`` says where the checkpoint lies now, if it moved, ``calibration_data`` what a quantised bundle was
    calibrated on, a quarter of which was held out for its gate; a reference model's is known. Without that data, and
    without ``accuracy``, the accuracy of a quantised bundle is not checked: ``gate`` is None. Raises ParityError
    beyond tolerance, AccuracyError where the gate no longer holds, CheckpointError when the checkpoint is gone or is
    not the one the bundle was made from.
    """
    steps = ProgressReporter(progress, total=1)
    opened = Bundle(bundle)
    manifest = opened.manifest
    steps.next("reading the checkpoint")
    loaded = reload_checkpoint(opened, source)
    open_default_files(opened)
    with (
        open_bundle(opened, device, threads) as ours,
        open_pytorch(opened, loaded) as theirs,
        contextlib.ExitStack() as stack,
    ):
        exercises = ParityCases(manifest, parity_inputs(loaded.graphs, loaded.open_tokenizer(), loaded.preprocess))
        steps.expect(len(exercises))
        others = other_devices(opened) if ours.device == "cpu" else None
        third = None if others is None else stack.enter_context(open_variants(opened, others))
        cases = check_parity(ours, theirs, third, exercises, Golden(), verify_limit(manifest), steps.next)
        near_ties = check_greedy(ours, theirs, None, exercises, cases, Golden())
        result = None
        if accuracy and manifest.quantization is not None:
            result = evaluate_again(ours, theirs, calibration_data, steps)
    steps.next("done")
    checked = CHECKED if result is not None else NOT_CHECKED
    return Verified(cases, near_ties, result, checked if manifest.precision in QUANTIZED else None)


def other_devices(bundle: Bundle) -> Variants | None:
    """The graphs of a bundle for other devices as those would compute them; None where the CPU has none of its own.

    None of BF16 either, whose variant for the CPU is just that.
    """
    manifest = bundle.manifest
    if manifest.precision == "bf16" or not any("cpu" in file.files for file in manifest.graphs):
        return None
    graphs = tuple(file.graph for file in manifest.graphs)
    made = pack(graphs, emulations(stored_graphs(bundle, "default")), "float32")
    return simulated(made) if manifest.precision in QUANTIZED else made


def verify_limit(manifest: Manifest) -> Limit:
    """What a verification refuses: of a quantised bundle twice the worst error of its export."""
    return Limit(
        pytorch_tolerance(manifest),
        "This bundle does not compute what its checkpoint does here. Export it again; if a fresh one verifies on "
        "another machine and not on this one, report it with `transom doctor`.",
    )


def evaluate_again(
    ours: LoadedBundle, theirs: LoadedBundle, data: Sequence[str], steps: ProgressReporter
) -> GateResult | None:
    """The gate once more, PyTorch in FP32's place. Raises AccuracyError where it does not hold."""
    manifest = ours.manifest
    assert manifest.quantization is not None
    source = str(manifest.source.get("checkpoint"))
    gate = gate_again(source, theirs, data)
    if gate is None:
        return None
    steps.more("measuring accuracy")
    result = gate.evaluate(ours, gated(manifest.quantization["activations"].values()))
    if not result.holds:
        raise AccuracyError(f"{manifest.name} in {manifest.precision}: {result.summary()}. Export it again.")
    return result


def write_files(writer: BundleWriter, loaded: LoadedCheckpoint, variants: Variants) -> None:
    """Put the graphs into a bundle, each checked as it lies there, and the tokenizers."""
    for name, data in variants.files.items():
        writer.add(name, data)
    for name in variants.files:
        if name.endswith(".onnx"):
            check_file(writer.folder / name)
    for tokenizer in (loaded.tokenizer, loaded.target_tokenizer):
        if tokenizer is not None:
            data, spec = tokenizer
            writer.add(spec.file, data)


def describe(loaded: LoadedCheckpoint, precision: str, variants: Variants) -> dict[str, Any]:
    """bundle.json but for the figures, which come when they are measured."""
    optional = {
        "tokenizer": loaded.tokenizer[1].to_json() if loaded.tokenizer else None,
        "target_tokenizer": loaded.target_tokenizer[1].to_json() if loaded.target_tokenizer else None,
        "preprocess": loaded.preprocess.to_json() if loaded.preprocess else None,
        "generation": loaded.generation.to_json() if loaded.generation else None,
    }
    return {
        "name": loaded.checkpoint.name,
        "family": loaded.family.name,
        "task": loaded.task,
        "precision": precision,
        "config": asdict(loaded.config),
        "axes": {name: axis_to_json(axis) for name, axis in loaded.axes.items()},
        "graphs": [graph_to_json(graph) for graph in variants.graphs],
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
