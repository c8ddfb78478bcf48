"""Run a bundle's golden values on the device, without torch: does it still compute what it should?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from transom.runtime.backend import Array
from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.bundle import SIMULATED, Bundle, Manifest
from transom.runtime.compare import Comparison, compare_outputs, on_scales
from transom.runtime.cpu import instruction_set
from transom.runtime.errors import BundleError, NotFiniteError, ParityError, ShapeError
from transom.runtime.inputs import checked_feeds
from transom.runtime.references import BUNDLE, PYTORCH, Reference, references
from transom.runtime.saturation import may_saturate, multiplies_integers, recorded_sums, saturated_export, sums_here
from transom.runtime.session import LoadedBundle, load
from transom.runtime.spec import EngineAxis

GOLDEN = "golden.safetensors"
GENERATION = "generation"  # the case that holds whole greedy generations

Sides = Mapping[str, Mapping[str, Array]]  # of one case: "input" and each side, tensor name -> array


@dataclass(frozen=True)
class Sums:
    """How 8-bit products are added up here and were at the export, and with which instructions.

    ``here`` and ``export`` are "exact" or "saturated"; ``export`` is None where bundle.json does not tell, and so is
    ``export_set``. ``means`` says what makes them exact here.
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
    near_ties: tuple[
        str, ...
    ] = ()  # where a greedy generation left the one it is compared with, itself undecided there

    def against(self, side: str) -> tuple[Comparison, ...]:
        """Return the comparisons with one side; nothing where the golden values have no such side."""
        return self.comparisons.get(side, ())

    @property
    def against_pytorch(self) -> tuple[Comparison, ...]:
        """Each output against PyTorch's."""
        return self.against(PYTORCH)

    @property
    def against_build(self) -> tuple[Comparison, ...]:
        """Each output against the bundle's own of its export, on the CPU."""
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
        """The side of the first reference: "pytorch", "bundle" or "simulated"."""
        return self.references[0].side

    @property
    def tolerance(self) -> float:
        """The largest error allowed against ``side``."""
        return self.references[0].tolerance

    @property
    def notes(self) -> list[str]:
        """Why tolerances are not narrower."""
        return [reference.note for reference in self.references if reference.note]

    @property
    def worst(self) -> Comparison:
        """The worst element against ``side``."""
        return self.worst_against(self.side)

    def worst_against(self, side: str) -> Comparison:
        """The worst element against any side that the golden values have."""
        return max((each for case in self.cases for each in case.against(side)), key=lambda each: each.error)


def selftest(path: str | PathLike[str], device: str = "cpu", threads: int | None = None) -> SelftestReport:
    """Run a bundle's golden inputs and compare the outputs with its ``references``.

    Raises ParityError beyond a tolerance and for golden values of saturated sums where sums are exact here,
    BundleError when there are no golden values, ShapeError when the engine's bounds leave none of them.
    """
    with load(path, device, threads) as loaded:
        golden = read_golden(Bundle(str(path)))
        if not golden:
            raise BundleError(f"{path} holds no golden values; export it again.")
        manifest = loaded.manifest
        rules = references(manifest, loaded.device, sides_of(golden))
        sums = sums_of(manifest, loaded.device)
        problem = saturated_export(manifest) if sums is not None else None
        if problem is not None:
            raise ParityError(f"{path} on {device} cannot be tested: {problem}")
        fitting = {name: within_bounds(loaded, name, arrays) for name, arrays in sorted(golden.items())}
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


def sides_of(golden: Mapping[str, Sides]) -> frozenset[str]:
    """Return the sides that every case has. Raises BundleError where PyTorch's or the build's are missing."""
    sides = frozenset.intersection(*(frozenset(arrays) for arrays in golden.values()))
    for needed in (PYTORCH, BUNDLE):
        if needed not in sides:
            raise BundleError(f"{GOLDEN}: a case has no outputs of the side {needed!r}; export the bundle again.")
    return sides


def within_bounds(loaded: LoadedBundle, name: str, arrays: Sides) -> tuple[Sides | None, str]:
    """What the engine takes of a golden case, None for nothing, and why not all of it; "" where all.

    A generation is cut to the rows and steps that fit, any other case is left out.
    """
    if not any(isinstance(axis, EngineAxis) for axis in loaded.axes.values()):
        return arrays, ""
    if name != GENERATION:
        try:
            checked_feeds(loaded.graph_for(arrays["input"]), loaded.axes, arrays["input"])
        except ShapeError as error:
            return None, str(error)
        return arrays, ""
    return cut_generation(loaded, arrays)


def cut_generation(loaded: LoadedBundle, arrays: Sides) -> tuple[Sides | None, str]:
    """The rows and steps of a golden generation that fit into the engine's rows and its context."""
    from transom.runtime.replay import from_arrays
    from transom.runtime.tasks.generator import Generator

    given, tokens = arrays["input"], arrays[PYTORCH].get("tokens")
    if not isinstance(loaded, Generator) or not {"prompts", "lengths"} <= given.keys() or tokens is None:
        return arrays, ""  # which is an error of its own
    longest = loaded.max_size(str(loaded.prompt_tokens().shape[1]))
    used = [loaded.decoder_length(prompt) for prompt in from_arrays(given)]
    rows = [
        row for row, length in enumerate(given["lengths"].tolist()) if length <= longest and used[row] < loaded.context
    ]
    rows = rows[: loaded.max_size("B")]
    steps = min([tokens.shape[1], *(loaded.context - used[row] for row in rows)])
    if len(rows) < loaded.axes["B"].min:
        return None, f"of its prompts {len(rows)} fit into {longest} tokens and a context of {loaded.context}"
    if (len(rows), steps) == tokens.shape:
        return arrays, ""
    cut = {
        side: {key: array[rows] if side == "input" else array[rows][:, :steps] for key, array in held.items()}
        for side, held in arrays.items()
    }
    return cut, f"{len(rows)} of {len(tokens)} rows and {steps} of {tokens.shape[1]} steps fit into the engine"


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
    """Say which reference does not hold, and what to do about it."""
    worst = report.worst_against(rule.side)
    note = f" ({rule.note})" if rule.note else ""
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
    """One case, on the scales that the outputs have over the whole parity grid."""
    if name == GENERATION:
        return run_generation(loaded, arrays, rule)
    sides = [side for side in (PYTORCH, BUNDLE, SIMULATED) if side in arrays]
    if not arrays[PYTORCH] or any(arrays[side].keys() != arrays[PYTORCH].keys() for side in sides):
        raise BundleError(f"{GOLDEN}: case {name!r} has not the same outputs on all sides; export the bundle again.")
    graph, inputs = loaded.graph_for(arrays["input"]), arrays["input"]
    ours = loaded.run(inputs, list(arrays[PYTORCH]))
    scales = loaded.manifest.parity.get("scales", {})
    return SelftestCase(
        name, {side: on_scales(compare_outputs(graph, inputs, ours, arrays[side]), scales) for side in sides}
    )


def run_generation(loaded: LoadedBundle, arrays: Sides, rule: Reference) -> SelftestCase:
    """The golden generation: the tokens of ``rule``'s side again, and every side's logits along PyTorch's tokens."""
    from transom.runtime.replay import Chosen, from_arrays, greedy, logits_along, require_same_tokens
    from transom.runtime.tasks.generator import Generator

    given, theirs, expected = arrays["input"], arrays[PYTORCH], arrays[rule.side]
    sides = [side for side in (PYTORCH, BUNDLE, SIMULATED) if side in arrays]
    if not isinstance(loaded, Generator) or not is_generation(given, [arrays[side] for side in sides], expected):
        raise BundleError(f"{GOLDEN}: case {GENERATION!r} is not complete; export the bundle again.")
    prompts = from_arrays(given)
    try:
        ours = greedy(loaded, prompts, expected["tokens"].shape[1])
    except NotFiniteError:
        raise ParityError(
            "the golden generation meets logits that are NaN or infinite. Load the bundle on another device, or export "
            "it again; one in half precision may need --precision fp32."
        ) from None
    scales = loaded.manifest.parity.get("scales", {})
    chosen = Chosen(expected["tokens"], expected["margins"], expected.get("top_ids"), expected.get("top_logits"))
    near_ties = require_same_tokens(ours, chosen, rule.tolerance * scales.get("logits", 1.0), rule.whose)
    graph = loaded.backend("decoder").graph
    logits = {"logits": logits_along(loaded, prompts, theirs["tokens"])[:, : theirs["logits"].shape[1]]}
    return SelftestCase(
        GENERATION,
        {
            side: on_scales(compare_outputs(graph, {}, logits, {"logits": arrays[side]["logits"]}), scales)
            for side in sides
        },
        tuple(divergence.told(rule.whose) for divergence in near_ties),
    )


def is_generation(given: Mapping[str, Array], sides: Sequence[Mapping[str, Array]], judge: Mapping[str, Array]) -> bool:
    """Whether the arrays of a golden generation are there and fit each other; PyTorch's are the first of ``sides``.

    ``judge`` is the side whose tokens are compared.
    """
    theirs = sides[0]
    needed = (
        (given, "prompts", "int64", 2),
        (given, "lengths", "int64", 1),
        (theirs, "tokens", "int64", 2),
        *((side, "logits", "float32", 3) for side in sides),
        (judge, "tokens", "int64", 2),
        (judge, "margins", "float32", 2),
    )
    for arrays, name, dtype, axes in needed:
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].ndim != axes:
            return False
    prompts, lengths, tokens, logits = given["prompts"], given["lengths"], theirs["tokens"], theirs["logits"]
    return (
        0 < len(prompts) == len(lengths) == len(tokens) == len(logits)
        and 0 < int(lengths.min()) <= int(lengths.max()) <= prompts.shape[1]
        and 0 < logits.shape[1] <= tokens.shape[1]
        and tokens.shape == judge["tokens"].shape == judge["margins"].shape
        and all(side["logits"].shape == logits.shape for side in sides)
        and has_top(judge, logits.shape[2])
    )


def has_top(judge: Mapping[str, Array], vocabulary: int) -> bool:
    """Whether the largest logits of each step fit the tokens; bundles of version 0.1.0 have none."""
    if "top_ids" not in judge and "top_logits" not in judge:
        return True
    ids, logits = judge.get("top_ids"), judge.get("top_logits")
    return (
        ids is not None
        and logits is not None
        and ids.dtype == np.int64
        and logits.dtype == np.float32
        and ids.shape == logits.shape
        and ids.ndim == 3
        and ids.shape[:2] == judge["tokens"].shape
        and ids.size > 0
        and 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
    )


def read_golden(bundle: Bundle) -> dict[str, dict[str, dict[str, Array]]]:
    """golden.safetensors as case -> "input" | "pytorch" | "bundle" | "simulated" -> tensor name -> array."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    if GOLDEN not in bundle.manifest.files:
        return {}
    try:
        tensors = parse(bundle.read(GOLDEN))
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"{GOLDEN} is not usable ({error}); export the bundle again.") from None
    cases: dict[str, dict[str, dict[str, Array]]] = {}
    for key, array in tensors.items():
        case, _, rest = key.partition("/")
        side, _, name = rest.partition("/")
        cases.setdefault(case, {"input": {}}).setdefault(side, {})[name] = array
    return cases
