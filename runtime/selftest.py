"""The golden values again, on the device, without torch: does this bundle still compute what it should?

FP32, FP16 and BF16 are held against PyTorch. A quantised bundle is further from PyTorch than any parity could allow;
how much that costs, the accuracy gate measured. Here it is held against what the bundle itself gave when it was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

from transom.runtime.backend import Array
from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.bundle import QUANTIZED, Bundle, Manifest
from transom.runtime.compare import Comparison, compare_outputs, on_scales
from transom.runtime.cpu import instruction_set
from transom.runtime.errors import BundleError, ParityError, ShapeError
from transom.runtime.inputs import checked_feeds
from transom.runtime.saturation import may_saturate, multiplies_integers, recorded_sums, saturated_export, sums_here
from transom.runtime.session import LoadedBundle, load
from transom.runtime.spec import EngineAxis

GOLDEN = "golden.safetensors"
GENERATION = "generation"  # the case that holds whole greedy generations
PYTORCH, BUNDLE = "pytorch", "bundle"  # sides of golden.safetensors: what computed the values
# max|here - built| / max|built| of a quantised bundle on another CPU. Sums of integers are exact. The FP32 around them
# is not: what lies between two integers may be rounded to the other one, and the layers behind carry that on. Nearly
# every output repeats to 1e-6, a few do not: with FP32 arithmetic in place of the integer kernels the worst of the
# reference models are 3e-7 (ViT), 2.5e-3 (BERT), 7e-3 (Transformer), 1.1e-2 (GPT), 1.4e-2 (CLIP), 5.1e-2 (MiniLM).
INT8_REPEAT = 0.1


@dataclass(frozen=True)
class Yardstick:
    """Which side of the golden values a bundle is held against, and how far off it may be."""

    side: str
    tolerance: float

    @property
    def whose(self) -> str:
        return {PYTORCH: "PyTorch's", BUNDLE: "the build's"}[self.side]


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
    """One set of golden inputs: each output against PyTorch's, and against the bundle's own when it was built."""

    name: str
    against_pytorch: tuple[Comparison, ...]
    against_build: tuple[Comparison, ...]
    near_ties: tuple[str, ...] = ()  # where a greedy generation left the one it is held against, itself undecided there

    def against(self, side: str) -> tuple[Comparison, ...]:
        return self.against_build if side == BUNDLE else self.against_pytorch


@dataclass(frozen=True)
class SelftestReport:
    """``tolerance`` bounds the error against ``side``, "pytorch" or "bundle"; the one against the other is told.

    ``sums`` is None but for a bundle whose 8-bit products run on the CPU.
    """

    side: str
    tolerance: float
    cases: tuple[SelftestCase, ...]
    sums: Sums | None = None
    left_out: tuple[str, ...] = ()  # cases, or parts of one, beyond what the engine on this device takes

    @property
    def worst(self) -> Comparison:
        """The worst element of those that are judged."""
        return self.worst_against(self.side)

    def worst_against(self, side: str) -> Comparison:
        return max((each for case in self.cases for each in case.against(side)), key=lambda each: each.error)


def selftest(path: str | PathLike[str], device: str = "cpu", threads: int | None = None) -> SelftestReport:
    """Run a bundle's golden inputs and hold the outputs against what its ``yardstick`` names.

    Raises ParityError beyond the tolerance and for golden values of saturated sums where sums are exact here,
    BundleError when there are no golden values, ShapeError when the engine's bounds leave none of them.
    """
    with load(path, device, threads) as loaded:
        golden = read_golden(Bundle(str(path)))
        if not golden:
            raise BundleError(f"{path} holds no golden values; export it again.")
        manifest = loaded.manifest
        rule = yardstick(manifest, loaded.device)
        sums = sums_of(manifest, loaded.device)
        problem = saturated_export(manifest) if sums is not None else None
        if problem is not None:
            raise ParityError(f"{path} on {device} cannot be tested: {problem}")
        fitting = {name: within_bounds(loaded, name, arrays) for name, arrays in sorted(golden.items())}
        cases = tuple(run_case(loaded, name, arrays, rule) for name, (arrays, _) in fitting.items() if arrays)
        if not cases:
            raise ShapeError(
                f"the engine of {path} on {device} takes none of its golden values: {fitting[min(fitting)][1]}. Build "
                "it with wider --min and --max, so that it can be tested."
            )
        left_out = tuple(f"{name}: {why}" for name, (_, why) in fitting.items() if why)
        report = SelftestReport(rule.side, rule.tolerance, cases, sums, left_out)
    if not report.worst.error <= report.tolerance:
        raise ParityError(f"{path} on {device} {broken(report)}")
    return report


def within_bounds(
    loaded: LoadedBundle, name: str, arrays: Mapping[str, Mapping[str, Array]]
) -> tuple[Mapping[str, Mapping[str, Array]] | None, str]:
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


def cut_generation(
    loaded: LoadedBundle, arrays: Mapping[str, Mapping[str, Array]]
) -> tuple[Mapping[str, Mapping[str, Array]] | None, str]:
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


def yardstick(manifest: Manifest, device: str) -> Yardstick:
    """What a bundle is held against on ``device``.

    A quantised one repeats on any CPU what it gave when it was built; elsewhere another flavour of it runs, of which
    only the distance from PyTorch is known.
    """
    if manifest.precision in QUANTIZED and device == "cpu":
        return Yardstick(BUNDLE, INT8_REPEAT)
    return Yardstick(PYTORCH, float(manifest.parity["tolerance"]))


def broken(report: SelftestReport) -> str:
    """What is wrong and what to do about it."""
    if report.side == BUNDLE:
        sums = "" if report.sums is None else f" {str(report.sums)[0].upper()}{str(report.sums)[1:]}."
        return (
            f"differs from what it gave when it was built: {report.worst}; {report.tolerance:g} is allowed.{sums} "
            "Is the onnxruntime here the one that bundle.json names under tools? Export again if it is not, or if "
            "bundle.json does not say that sums were exact."
        )
    return (
        f"differs from PyTorch: {report.worst}; the bundle allows {report.tolerance:g}. "
        "Is the library on this device the one bundle.json names under tools? Export again if it is not."
    )


def run_case(
    loaded: LoadedBundle, name: str, arrays: Mapping[str, Mapping[str, Array]], rule: Yardstick
) -> SelftestCase:
    """One case, on the scales that the outputs have over the whole parity grid."""
    if name == GENERATION:
        return run_generation(loaded, arrays, rule)
    if not arrays[PYTORCH] or arrays[BUNDLE].keys() != arrays[PYTORCH].keys():
        raise BundleError(f"{GOLDEN}: case {name!r} has not the same outputs on both sides; export the bundle again.")
    graph, inputs = loaded.graph_for(arrays["input"]), arrays["input"]
    ours = loaded.run(inputs, list(arrays[PYTORCH]))
    scales = loaded.manifest.parity.get("scales", {})
    return SelftestCase(
        name,
        against_pytorch=on_scales(compare_outputs(graph, inputs, ours, arrays[PYTORCH]), scales),
        against_build=on_scales(compare_outputs(graph, inputs, ours, arrays[BUNDLE]), scales),
    )


def run_generation(loaded: LoadedBundle, arrays: Mapping[str, Mapping[str, Array]], rule: Yardstick) -> SelftestCase:
    """The golden generation: the same tokens again, and the logits along PyTorch's."""
    from transom.runtime.replay import from_arrays, greedy, logits_along, require_same_tokens
    from transom.runtime.tasks.generator import Generator

    given, theirs, built, expected = arrays["input"], arrays[PYTORCH], arrays[BUNDLE], arrays[rule.side]
    if not isinstance(loaded, Generator) or not is_generation(given, theirs, built, expected):
        raise BundleError(f"{GOLDEN}: case {GENERATION!r} is not complete; export the bundle again.")
    prompts = from_arrays(given)
    ours = greedy(loaded, prompts, expected["tokens"].shape[1])
    scales = loaded.manifest.parity.get("scales", {})
    tolerance = rule.tolerance * scales.get("logits", 1.0)
    near_ties = require_same_tokens(ours.tokens, expected["tokens"], expected["margins"], tolerance, rule.whose)
    graph = loaded.backend("decoder").graph
    logits = {"logits": logits_along(loaded, prompts, theirs["tokens"])[:, : theirs["logits"].shape[1]]}
    return SelftestCase(
        GENERATION,
        against_pytorch=on_scales(compare_outputs(graph, {}, logits, {"logits": theirs["logits"]}), scales),
        against_build=on_scales(compare_outputs(graph, {}, logits, {"logits": built["logits"]}), scales),
        near_ties=tuple(divergence.told(rule.whose) for divergence in near_ties),
    )


def is_generation(
    given: Mapping[str, Array], theirs: Mapping[str, Array], built: Mapping[str, Array], judge: Mapping[str, Array]
) -> bool:
    """Whether the arrays of a golden generation are there and fit each other; ``judge`` is one of the sides."""
    needed = (
        (given, "prompts", "int64", 2),
        (given, "lengths", "int64", 1),
        (theirs, "tokens", "int64", 2),
        (theirs, "logits", "float32", 3),
        (built, "logits", "float32", 3),
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
        and logits.shape == built["logits"].shape
    )


def read_golden(bundle: Bundle) -> dict[str, dict[str, dict[str, Array]]]:
    """golden.safetensors as case -> "input" | "pytorch" | "bundle" -> tensor name -> array."""
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
        cases.setdefault(case, {"input": {}, "pytorch": {}, "bundle": {}}).setdefault(side, {})[name] = array
    return cases
