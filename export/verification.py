"""A bundle compared with PyTorch again, through the same cases and the same accuracy gate as its export."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transom.export.bundle_graphs import stored_graphs
from transom.export.checkpoint import reload_checkpoint
from transom.export.parity.backends import open_default_files, open_native, open_pytorch
from transom.export.parity.cases import ParityCases
from transom.export.parity.compare import Limit, check_greedy, check_parity
from transom.export.parity.inputs import parity_inputs
from transom.export.parity.results import CaseResult, Golden
from transom.export.quantization.candidate import gate_mode
from transom.export.quantization.gate import Gate
from transom.export.quantization.gate_result import GateResult
from transom.export.quantization.options import STATIC
from transom.export.variants import Variants, emulations, open_variants, pack, simulated, with_integers
from transom.runtime.backends.kernels import ONNXRUNTIME
from transom.runtime.bundle import Bundle
from transom.runtime.errors import AccuracyError
from transom.runtime.golden_reference import pytorch_tolerance
from transom.runtime.greedy_check import Divergence
from transom.runtime.loading import open_bundle
from transom.runtime.manifest import QUANTIZED, Manifest
from transom.runtime.manifest_graphs import BLOCKS, BOTH, TENSORRT_ALONE
from transom.runtime.progress import Progress, ProgressReporter, silent
from transom.runtime.session import LoadedBundle

CHECKED, NOT_CHECKED = "checked", "not checked"  # the accuracy of a quantised bundle


@dataclass(frozen=True)
class Verified:
    """Worst elements case by case, and the rows whose greedy generation diverged from PyTorch's at a near tie.

    ``gate`` is the accuracy gate's result of a quantised bundle; None where it was not measured. ``accuracy`` is
    CHECKED, NOT_CHECKED, or None of a bundle that is not quantised, for which parity suffices.
    """

    cases: list[CaseResult]
    near_ties: list[Divergence]
    gate: GateResult | None
    accuracy: str | None


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
    """Compare a bundle with PyTorch again, in every case of its export.

    A bundle with a variant for the CPU is compared by that variant, and on a CPU by the file for other devices too, as
    those would compute it: half precision rounded after every operator, Q/DQ pairs in float32.

    ``source`` says where the checkpoint lies now, if it moved, ``calibration_data`` what a quantised bundle was
    calibrated on, a quarter of which was held out for its gate; a reference model's is known. Without that data, and
    without ``accuracy``, the accuracy of a quantised bundle is not checked: ``gate`` is None. Raises ParityError
    beyond tolerance, AccuracyError where the gate no longer holds, CheckpointError when the checkpoint is gone or is
    not the one the bundle was made from.
    """
    reporter = ProgressReporter(progress, total=1)
    opened = Bundle(bundle)
    manifest = opened.manifest
    reporter.next("reading the checkpoint")
    loaded = reload_checkpoint(opened, source)
    open_default_files(opened)
    with (
        open_bundle(opened, device, threads, ONNXRUNTIME) as ours,
        open_pytorch(opened, loaded) as theirs,
        contextlib.ExitStack() as stack,
    ):
        parity_cases = ParityCases(
            manifest, parity_inputs(loaded.graphs, loaded.open_tokenizer(), loaded.preprocess, loaded.marks)
        )
        reporter.expect(len(parity_cases))
        others = other_devices(opened) if ours.device == "cpu" else None
        third = None if others is None else stack.enter_context(open_variants(opened, others))
        native = open_native(opened) if ours.device == "cpu" else None
        if native is not None:
            stack.enter_context(native)
        limit = verify_limit(manifest)
        results = check_parity(ours, theirs, third, parity_cases, Golden(), limit, reporter.next, native)
        near_ties = check_greedy(ours, theirs, None, parity_cases, results, Golden(), native)
        gate = None
        if accuracy and manifest.quantization is not None:
            gate = evaluate_again(ours, theirs, calibration_data, reporter)
            if native is not None:
                evaluate_again(native, theirs, calibration_data, reporter)
    reporter.next("done")
    checked = CHECKED if gate is not None else NOT_CHECKED
    return Verified(results, near_ties, gate, checked if manifest.precision in QUANTIZED else None)


def other_devices(bundle: Bundle) -> Variants | None:
    """Return the graphs for other devices as those would compute them; None where the CPU has no variant of its own.

    None of BF16 either, nor of a bundle for TensorRT alone, whose variant for the CPU is that emulation.
    """
    manifest = bundle.manifest
    if manifest.precision == "bf16" or manifest.made_for != BOTH:
        return None
    if not any("cpu" in file.files for file in manifest.graphs):
        return None
    graphs = tuple(file.graph for file in manifest.graphs)
    made = pack(graphs, emulations(stored_graphs(bundle, "default")), "float32")
    if manifest.precision not in QUANTIZED:
        return made
    blocks = all(file.integers == BLOCKS for file in manifest.graphs)  # of weights alone: as every device runs them
    return with_integers(made, {graph.name: BLOCKS for graph in graphs}) if blocks else simulated(made)


def verify_limit(manifest: Manifest) -> Limit:
    """Return the limit of a verification: for a quantised bundle twice the worst error of its export."""
    return Limit(
        pytorch_tolerance(manifest),
        "This bundle does not compute what its checkpoint does here. Export it again; if a fresh one verifies on "
        "another machine and not on this one, report it with `transom doctor`.",
    )


def evaluate_again(
    ours: LoadedBundle, theirs: LoadedBundle, data: Sequence[str], reporter: ProgressReporter
) -> GateResult | None:
    """Evaluate the accuracy gate with PyTorch as the FP32 reference; None without held-out data.

    Raises AccuracyError where it does not hold.
    """
    manifest = ours.manifest
    assert manifest.quantization is not None
    source = str(manifest.source.get("checkpoint"))
    gate = Gate.of_bundle(source, theirs, data)
    if gate is None:
        return None
    reporter.more("measuring accuracy")
    modes = [STATIC] if manifest.made_for == TENSORRT_ALONE else manifest.quantization["activations"].values()
    result = gate.evaluate(ours, gate_mode(modes))
    if not result.holds:
        raise AccuracyError(f"{manifest.name} in {manifest.precision}: {result.summary()}. Export it again.")
    return result
