"""Run a bundle's golden inputs on a device and compare the outputs with its golden values, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.backends.kernels import AUTO
from transom.runtime.bundle import Bundle
from transom.runtime.compare import Comparison, compare_outputs, on_scales
from transom.runtime.errors import BundleError, NotFiniteError, ParityError, ShapeError
from transom.runtime.golden import (
    GENERATION,
    GOLDEN,
    Sides,
    cut_to_bounds,
    is_generation,
    read_golden,
    require_complete,
)
from transom.runtime.golden_reference import BUNDLE, NATIVE, PYTORCH, Reference, references
from transom.runtime.host import instruction_set
from transom.runtime.loading import open_verified
from transom.runtime.manifest import Manifest
from transom.runtime.manifest_graphs import SIMULATED
from transom.runtime.saturation import may_saturate, multiplies_integers, recorded_sums, saturated_export, sums_here
from transom.runtime.session import LoadedBundle


@dataclass(frozen=True)
class Sums:
    """Sums of 8-bit products here and at the export, and the instruction sets of both.

    ``here`` and ``export`` are "exact" or "saturated"; ``export`` and ``export_set`` are None where bundle.json does
    not say. ``means`` says what makes them exact here.
    """

    here: str
    means: str
    export: str | None
    instruction_set: str
    export_set: str | None

    def __str__(self) -> str:
        at_export = "bundle.json does not say how they were at the export"
        if self.export is not None:
            at_export = f"at the export they were {self.export} ({self.export_set or 'instruction set unknown'})"
        return f"8-bit products on this processor ({self.instruction_set}): {self.means}; {at_export}"


@dataclass(frozen=True)
class SelftestCase:
    """One set of golden inputs: each output compared with every side of the golden values."""

    name: str
    comparisons: Mapping[str, tuple[Comparison, ...]]  # by side
    near_ties: tuple[str, ...] = ()  # where a greedy generation left one that was itself undecided there

    def against(self, side: str) -> tuple[Comparison, ...]:
        """Return the comparisons with one side; nothing where the golden values have no such side."""
        return self.comparisons.get(side, ())

    @property
    def against_pytorch(self) -> tuple[Comparison, ...]:
        """Return each output compared with PyTorch's."""
        return self.against(PYTORCH)

    @property
    def against_build(self) -> tuple[Comparison, ...]:
        """Return each output compared with the bundle's own of its export, on the CPU."""
        return self.against(BUNDLE)


@dataclass(frozen=True)
class SelftestReport:
    """Every golden case, and the ``references`` that had to hold; the first is the narrowest.

    ``sums`` is None but for a bundle whose 8-bit products run on the CPU.
    """

    references: tuple[Reference, ...]
    cases: tuple[SelftestCase, ...]
    sums: Sums | None = None
    left_out: tuple[str, ...] = ()  # cases, or parts of one, beyond what the engine on this device takes

    @property
    def side(self) -> str:
        """Return the side of the first reference: "pytorch", "bundle" or "simulated"."""
        return self.references[0].side

    @property
    def tolerance(self) -> float:
        """Return the largest error allowed against ``side``."""
        return self.references[0].tolerance

    @property
    def notes(self) -> list[str]:
        """Return why tolerances are not narrower."""
        return [reference.note for reference in self.references if reference.note]

    @property
    def worst(self) -> Comparison:
        """Return the worst element against ``side``."""
        return self.worst_against(self.side)

    def worst_against(self, side: str) -> Comparison:
        """Return the worst element against any side that the golden values have."""
        return max((each for case in self.cases for each in case.against(side)), key=lambda each: each.error)


def selftest(
    path: str | PathLike[str], device: str = "cpu", threads: int | None = None, kernels: str = AUTO
) -> SelftestReport:
    """Run a bundle's golden inputs and compare the outputs with its ``references``; every file is hashed first.

    Raises ParityError beyond a tolerance and for golden values of saturated sums where sums are exact here,
    BundleError when there are no golden values, ShapeError when the engine's bounds leave none of them.
    """
    bundle = Bundle(str(path), verify=False)
    golden = read_golden(bundle)
    with open_verified(bundle, device, threads, bundle.manifest.files, kernels) as loaded:
        if not golden:
            raise BundleError(f"{path} holds no golden values; export it again.")
        manifest = loaded.manifest
        native = {name: choice.isa for name, choice in loaded.kernels.items() if choice.isa is not None}
        rules = references(manifest, loaded.device, require_complete(loaded, golden), native)
        whole = len(native) == len(manifest.graphs)  # whose sums are exact on every processor
        sums = None if whole else sums_of(manifest, loaded.device)
        problem = saturated_export(manifest) if sums is not None else None
        if problem is not None:
            raise ParityError(f"{path} on {device} cannot be tested: {problem}")
        fitting = {name: cut_to_bounds(loaded, name, arrays) for name, arrays in sorted(golden.items())}
        cases = tuple(run_case(loaded, name, arrays, rules[0]) for name, (arrays, _) in fitting.items() if arrays)
        if not cases:
            raise ShapeError(
                f"the engine of {path} on {device} takes none of its golden values: {fitting[min(fitting)][1]}. Build "
                "it with wider --min and --max, so that it can be tested."
            )
        left_out = tuple(f"{name}: {why}" for name, (_, why) in fitting.items() if why)
        report = SelftestReport(rules, cases, sums, left_out)
    for rule in rules:
        if not report.worst_against(rule.side).error <= rule.tolerance:
            raise ParityError(f"{path} on {device} {broken(report, rule)}")
    return report


def sums_of(manifest: Manifest, device: str) -> Sums | None:
    """Describe the bundle's 8-bit sums on ``device``; None where it multiplies no integers there."""
    if device != "cpu" or not multiplies_integers(manifest):
        return None
    made = manifest.quantization or {}
    means = integer_sums().means if may_saturate(manifest) else "exact, as products with 7-bit weights are everywhere"
    known = made.get("instruction_set")
    export_set = known[:40] if isinstance(known, str) and known != "unknown" else None
    return Sums(sums_here(manifest), means, recorded_sums(manifest), instruction_set(), export_set)


def broken(report: SelftestReport, rule: Reference) -> str:
    """Return which reference does not hold, and what to do about it."""
    worst = report.worst_against(rule.side)
    note = f" ({rule.note})" if rule.note else ""
    if rule.side == NATIVE:
        return (
            f"differs from what the native kernels gave when it was built: {worst}; {rule.tolerance:g} is allowed"
            f"{note}. Test it with kernels='onnxruntime' too, and report it if that agrees."
        )
    if rule.side == BUNDLE:
        sums = "" if report.sums is None else f" {str(report.sums)[0].upper()}{str(report.sums)[1:]}."
        return (
            f"differs from what it gave when it was built: {worst}; {rule.tolerance:g} is allowed{note}.{sums} "
            "Is the onnxruntime here the one that bundle.json names under tools? Export again if it is not, or if "
            "bundle.json does not say that sums were exact."
        )
    if rule.side == SIMULATED:
        return (
            f"differs from its TensorRT graph simulated in float32: {worst}; {rule.tolerance:g} is allowed. The "
            "device computes something else: build the engine again (`transom build --force`), and report it if that "
            "does not help."
        )
    return (
        f"differs from PyTorch: {worst}; the bundle allows {rule.tolerance:g}{note}. "
        "Is the library on this device the one bundle.json names under tools? Export again if it is not."
    )


def run_case(loaded: LoadedBundle, name: str, arrays: Sides, rule: Reference) -> SelftestCase:
    """Run one case and compare it on the scales that the outputs have over all parity cases."""
    if name == GENERATION:
        return run_generation(loaded, arrays, rule)
    sides = [side for side in (PYTORCH, BUNDLE, NATIVE, SIMULATED) if side in arrays]
    if not arrays[PYTORCH] or any(arrays[side].keys() != arrays[PYTORCH].keys() for side in sides):
        raise BundleError(f"{GOLDEN}: case {name!r} has not the same outputs on all sides; export the bundle again.")
    graph, inputs = loaded.graph_for(arrays["input"]), arrays["input"]
    ours = loaded.run(inputs, list(arrays[PYTORCH]))
    scales = loaded.manifest.parity.get("scales", {})
    return SelftestCase(
        name, {side: on_scales(compare_outputs(graph, inputs, ours, arrays[side]), scales) for side in sides}
    )


def run_generation(loaded: LoadedBundle, arrays: Sides, rule: Reference) -> SelftestCase:
    """Compare the golden generation: the tokens of ``rule``'s side, and every side's logits along PyTorch's tokens."""
    from transom.runtime.greedy_check import (
        GreedyTokens,
        greedy,
        logits_along,
        prompts_from_arrays,
        require_same_tokens,
    )
    from transom.runtime.tasks.generator import Generator

    given, theirs, expected = arrays["input"], arrays[PYTORCH], arrays[rule.side]
    sides = [side for side in (PYTORCH, BUNDLE, NATIVE, SIMULATED) if side in arrays]
    if not isinstance(loaded, Generator) or not is_generation(given, [arrays[side] for side in sides], expected):
        raise BundleError(f"{GOLDEN}: case {GENERATION!r} is not complete; export the bundle again.")
    prompts = prompts_from_arrays(given)
    try:
        ours = greedy(loaded, prompts, expected["tokens"].shape[1])
    except NotFiniteError:
        raise ParityError(
            "the golden generation meets logits that are NaN or infinite. Load the bundle on another device, or export "
            "it again; one in half precision may need --precision fp32."
        ) from None
    scales = loaded.manifest.parity.get("scales", {})
    chosen = GreedyTokens(expected["tokens"], expected["margins"], expected.get("top_ids"), expected.get("top_logits"))
    near_ties = require_same_tokens(ours, chosen, rule.tolerance * scales.get("logits", 1.0), rule.owner)
    graph = loaded.backend("decoder").graph
    logits = {"logits": logits_along(loaded, prompts, theirs["tokens"])[:, : theirs["logits"].shape[1]]}
    return SelftestCase(
        GENERATION,
        {
            side: on_scales(compare_outputs(graph, {}, logits, {"logits": arrays[side]["logits"]}), scales)
            for side in sides
        },
        tuple(divergence.describe(rule.owner) for divergence in near_ties),
    )
