"""An export in six stages: load, trace, convert, write, compare with PyTorch, describe.

    load_checkpoint        SOURCE -> LoadedCheckpoint: module, graphs, processors
    trace                  -> Traced: canonical FP32 graphs
    convert or quantize    -> Converted: the variants that ship
    write_files            -> StagedBundle: files in a staging folder, bundle.json not yet
    compare_with_pytorch   -> Parity: errors, golden values, score
    describe               -> Manifest: bundle.json, written last; then the folder is put in place

Each stage gets what the stages before it returned; none calls back into this file.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from transom.calib.data import CalibrationData, open_calibration_data
from transom.calib.run_samples import check_reach
from transom.calib.table import RANGES, RangeTable, load_table
from transom.export.bundle_graphs import operator_counts
from transom.export.bundle_writer import BundleWriter, StagedBundle, check_out, new_bundle
from transom.export.checkpoint import LoadedCheckpoint, load_checkpoint
from transom.export.families.base import export_family
from transom.export.manifest_fields import manifest_fields
from transom.export.memory import release
from transom.export.onnx_export import onnx_from_module
from transom.export.parity.backends import open_default_files, open_native, open_pytorch
from transom.export.parity.cases import ParityCases
from transom.export.parity.compare import TOLERANCES, check_greedy, check_parity, export_limit
from transom.export.parity.fp16_range import Ranges, measure_ranges, require_fp16_range
from transom.export.parity.fp16_watch import Fp16DoubtError
from transom.export.parity.inputs import ParityInputs, parity_inputs
from transom.export.parity.results import CaseResult, Golden, parity_to_json
from transom.export.quantization.options import DEFAULTS, NONE, QuantizeOptions
from transom.export.quantization.quantize import QuantizationJob, quantize_model
from transom.export.reference_models import score_both
from transom.export.variants import Variants, check_file, emulated_variants, make_variants, open_variants
from transom.runtime.backends.kernels import ONNXRUNTIME
from transom.runtime.backends.spinning import threads_sleep
from transom.runtime.errors import ExportError
from transom.runtime.golden import GOLDEN
from transom.runtime.greedy_check import Divergence
from transom.runtime.loading import open_bundle
from transom.runtime.manifest import PRECISIONS, QUANTIZED, Manifest
from transom.runtime.manifest_graphs import BOTH, CPU_ALONE, MADE_FOR, TENSORRT_ALONE
from transom.runtime.progress import Progress, ProgressReporter, silent
from transom.runtime.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Calibration:
    """Inputs of a quantised export beside the checkpoint: ``data``, and ``table`` where --ranges gives one."""

    data: CalibrationData
    table: RangeTable | None

    def check(self, loaded: LoadedCheckpoint, precision: str, options: QuantizeOptions) -> None:
        """Raise CalibrationError or ExportError for what does not fit the model, before anything is computed."""
        options.config(precision, loaded.graphs)
        tokenizer, preprocess = loaded.tokenizer is not None, loaded.preprocess is not None
        check_reach(
            loaded.family.name,
            export_family(loaded.family.name, loaded.task).samples,
            self.data,
            tokenizer=tokenizer,
            preprocess=preprocess,
        )


@dataclass(frozen=True)
class Traced:
    """Canonical FP32 graphs by name, and how many nodes of each operator they have."""

    graphs: dict[str, ir.Model]
    operators: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Converted:
    """The variants that ship, the ``files`` beside them, and the ``fields`` that they add to bundle.json."""

    variants: Variants
    files: Mapping[str, bytes]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Parity:
    """Results of the comparison with PyTorch, golden values, and the task score where the checkpoint has one."""

    results: Sequence[CaseResult]
    near_ties: Sequence[Divergence]
    golden: Golden
    score: Mapping[str, Any] | None


@threads_sleep()
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
    quantize: QuantizeOptions = DEFAULTS,
    made_for: str = BOTH,
    progress: Progress = silent,
) -> Manifest:
    """Export a checkpoint to a bundle at ``out`` whose outputs were compared with PyTorch's.

    ``source`` is a reference model's name, a checkpoint folder or a hub id; ``max_sizes`` sets the bounds of axes ("S":
    512); ``image_size`` is (height, width) in pixels; ``quantize`` says how "int8" and "int4" are made; ``made_for``,
    one of MADE_FOR, for which devices. ``progress`` gets each step: its description, how many are done, how many there
    are.

    Raises CheckpointError when the source cannot be used, ParityError or PrecisionError when the
    bundle would not compute what PyTorch computes, CalibrationError for calibration data that cannot be used,
    AccuracyError where a quantised model is too far off, ExportError for everything else that stops it.
    In each case nothing is left at ``out``, or the old bundle is.
    """
    check_out(out, force=force)
    calibration = check_options(precision, source, quantize, made_for)
    reporter = ProgressReporter(progress, total=5 + needs_range(precision, made_for))
    reporter.next(f"reading {source}")
    loaded = load_checkpoint(
        source, task=task, max_sizes=max_sizes or {}, image_size=image_size, ignore_unused=ignore_unused
    )
    if calibration is not None:
        calibration.check(loaded, precision, quantize)
    reporter.next("tracing the module to ONNX")
    traced = trace(loaded)
    inputs = parity_inputs(loaded.graphs, loaded.open_tokenizer(), loaded.preprocess, loaded.marks)
    with new_bundle(out, force=force) as writer:
        reporter.next(f"making the {precision} graph")

        def quantized(*, measure_fp16: bool) -> Converted:
            assert calibration is not None
            job = loaded, traced, inputs, precision, made_for, quantize, calibration, writer.folder, reporter.more
            return quantize_graphs(*job, measure_fp16=measure_fp16)

        def compared(converted: Converted) -> Manifest:
            return write_and_compare(writer, loaded, traced, converted, inputs, precision, made_for, reporter)

        if calibration is None:
            manifest = compared(convert(loaded, traced, precision, made_for, writer.folder))
        else:
            try:
                manifest = compared(quantized(measure_fp16=False))
            except Fp16DoubtError:  # in a case that no earlier run came near to
                traced.graphs.update(trace(loaded).graphs)
                manifest = compared(quantized(measure_fp16=True))
    reporter.next("done")
    return manifest


def write_and_compare(
    writer: BundleWriter,
    loaded: LoadedCheckpoint,
    traced: Traced,
    converted: Converted,
    inputs: Mapping[str, ParityInputs],
    precision: str,
    made_for: str,
    reporter: ProgressReporter,
) -> Manifest:
    """Write what was converted, compare it with PyTorch and describe it; ``traced`` loses its graphs.

    Raises CheckpointError for a checkpoint that changed meanwhile, ParityError, PrecisionError, and of them
    Fp16DoubtError where a watch in the variants has its doubts.
    """
    if not needs_range(precision, made_for):
        traced.graphs.clear()
    reporter.next("writing the bundle")
    fields = {**manifest_fields(loaded, precision, converted.variants, made_for), **converted.fields}
    write_files(writer, loaded, converted)
    bundle = writer.staged(fields, open_tokenizers(loaded))
    open_default_files(bundle)
    parity_cases = ParityCases(bundle.manifest, inputs)
    reporter.expect(len(parity_cases))
    ranges = Ranges()
    if needs_range(precision, made_for):
        reporter.next("measuring every tensor's range")
        ranges = measure_ranges(bundle, traced.graphs, parity_cases, sums=True)
        require_fp16_range(ranges.tensors)
    traced.graphs.clear()  # large, and not read again
    release(loaded)
    parity = compare_with_pytorch(bundle, loaded, converted.variants, parity_cases, reporter)
    loaded.require_unchanged()  # what was compared is what is hashed as the source
    return describe(writer, fields, traced, ranges, parity)


def needs_range(precision: str, made_for: str) -> bool:
    """Return whether every tensor's range is measured: of FP16, unless a CPU alone is to compute it, in float32."""
    return precision == "fp16" and made_for != CPU_ALONE


def check_options(precision: str, source: str, quantize: QuantizeOptions, made_for: str = BOTH) -> Calibration | None:
    """Refuse options that contradict each other; open the inputs of a quantised export, None for other precisions."""
    if precision not in PRECISIONS:
        raise ExportError(f"--precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if made_for not in MADE_FOR:
        raise ExportError(f"--for is {made_for!r}; expected one of {', '.join(MADE_FOR)}.")
    if made_for == CPU_ALONE and precision == "bf16":
        raise ExportError(
            "--for cpu is given with --precision bf16, which a CPU can only emulate, slower than fp32; choose "
            "--precision fp32, or fp16 for files of half the size."
        )
    if made_for == TENSORRT_ALONE and (precision == "int4" or quantize.activations == NONE):
        raise ExportError(
            "--for tensorrt is given, and weights in blocks are an operator of ONNX Runtime alone (MatMulNBits), of "
            "which no engine is built; leave --for out, or choose --precision int8 with activations in integers."
        )
    if precision in QUANTIZED:
        quantize.check(precision)
        data = open_calibration_data(quantize.data_for(source))
        return Calibration(data, None if quantize.ranges is None else load_table(quantize.ranges))
    if quantize != DEFAULTS:
        raise ExportError(
            f"--precision is {precision}, which is not quantised, and an option for quantisation is given; leave it "
            "out, or choose --precision int8."
        )
    return None


def trace(loaded: LoadedCheckpoint) -> Traced:
    """Trace the module behind each graph to its canonical ONNX graph, and count the operators."""
    parts = loaded.parts()
    graphs = {graph.name: onnx_from_module(parts[graph.name], graph, loaded.axes) for graph in loaded.graphs}
    return Traced(graphs, {name: operator_counts(model) for name, model in graphs.items()})


def convert(loaded: LoadedCheckpoint, traced: Traced, precision: str, made_for: str, folder: Path) -> Converted:
    """Convert copies of the graphs to FP32, FP16 or BF16; large weights are written to ``folder`` as they come.

    Raises PrecisionError when a weight does not fit FP16.
    """
    made = make_variants(traced.graphs, loaded.graphs, precision, folder=folder, made_for=made_for, native=True)
    return Converted(made, {}, {})


def quantize_graphs(
    loaded: LoadedCheckpoint,
    traced: Traced,
    inputs: Mapping[str, ParityInputs],
    precision: str,
    made_for: str,
    options: QuantizeOptions,
    calibration: Calibration,
    folder: Path,
    report: Callable[[str], None],
    *,
    measure_fp16: bool = False,
) -> Converted:
    """Calibrate and quantise copies of the graphs, with an FP32 bundle that their accuracy is compared with.

    ``measure_fp16`` is as for a QuantizationJob. That bundle's weights lie in a scratch folder below ``folder``
    meanwhile, and what ships is written there. Raises CalibrationError for data that cannot be used, AccuracyError
    where the accuracy gate does not hold.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fp32-") as scratch:
        variants = make_variants(traced.graphs, loaded.graphs, "fp32", external_above=0, folder=Path(scratch))
        fp32 = StagedBundle.of_variants(
            manifest_fields(loaded, "fp32", variants), variants, tokenizer_files(loaded), open_tokenizers(loaded)
        )
        job = QuantizationJob(
            fp32,
            traced.graphs,
            loaded.checkpoint.source,
            precision,
            options,
            calibration.data,
            calibration.table,
            ParityCases(fp32.manifest, inputs),
            report,
            made_for,
            measure_fp16,
            partial(release, loaded),
        )
        made = quantize_model(job, folder)
        return Converted(made.variants, {RANGES: made.table.to_bytes()}, {"quantization": made.record})


def write_files(writer: BundleWriter, loaded: LoadedCheckpoint, converted: Converted) -> None:
    """Write graphs, tokenizers and ranges; check each ONNX file as it lies there."""
    graphs = converted.variants.files
    for file in converted.variants.stored.values():
        writer.adopt(file)
    for name, data in {**converted.files, **graphs, **tokenizer_files(loaded)}.items():
        writer.add(name, data)
    for name in graphs:
        if name.endswith(".onnx"):
            check_file(writer.folder / name)


def tokenizer_files(loaded: LoadedCheckpoint) -> dict[str, bytes]:
    """Return the tokenizers' files by name, of which there are none, one or two."""
    return {tokenizer.spec.file: tokenizer.data for tokenizer in loaded.tokenizers}


def open_tokenizers(loaded: LoadedCheckpoint) -> dict[str, TextTokenizer]:
    """Return the open tokenizers by the names of their files."""
    return {tokenizer.spec.file: tokenizer.opened for tokenizer in loaded.tokenizers}


def compare_with_pytorch(
    bundle: StagedBundle,
    loaded: LoadedCheckpoint,
    variants: Variants,
    parity_cases: ParityCases,
    reporter: ProgressReporter,
) -> Parity:
    """Compare the staged bundle with PyTorch in every case and whole generations; score both.

    Its lists of fused operators are compared, too, and half precision as a GPU rounds it. Raises ParityError beyond the
    tolerance of its precision.
    """
    precision, golden = bundle.manifest.precision, Golden()
    with (
        open_pytorch(bundle, loaded) as theirs,
        open_bundle(bundle, kernels=ONNXRUNTIME) as ours,
        contextlib.ExitStack() as stack,
    ):
        third = None
        if variants.emulated:
            third = stack.enter_context(open_variants(bundle, emulated_variants(variants)))
        native = open_native(bundle)
        if native is not None:
            stack.enter_context(native)
        limit = export_limit(precision)
        results = check_parity(ours, theirs, third, parity_cases, golden, limit, reporter.next, native)
        near_ties = check_greedy(ours, theirs, third, parity_cases, results, golden, native)
        reporter.next("scoring")
        score = score_both(loaded.checkpoint.source, theirs, ours)
    return Parity(results, near_ties, golden, score)


def describe(
    writer: BundleWriter, fields: Mapping[str, Any], traced: Traced, ranges: Ranges, parity: Parity
) -> Manifest:
    """Write the golden values, then bundle.json, and return it as a reader sees it."""
    writer.add(GOLDEN, parity.golden.to_bytes())
    tolerance = TOLERANCES[fields["precision"]]
    measured = {
        "operators": traced.operators,
        "parity": parity_to_json(parity.results, tolerance, ranges, parity.near_ties),
        **({"score": parity.score} if parity.score else {}),
    }
    manifest = writer.manifest({**fields, **measured})
    writer.describe({**fields, **measured})
    return manifest
