"""The golden values again, on the device, without torch: does this bundle still compute what PyTorch computed?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

from transom.runtime.backend import Array
from transom.runtime.bundle import Bundle
from transom.runtime.compare import Comparison, compare_outputs, on_scales
from transom.runtime.errors import BundleError, ParityError
from transom.runtime.session import LoadedBundle, load

GOLDEN = "golden.safetensors"
GENERATION = "generation"  # the case that holds whole greedy generations


@dataclass(frozen=True)
class SelftestCase:
    """One set of golden inputs: each output against PyTorch's, and against the bundle's own when it was built."""

    name: str
    against_pytorch: tuple[Comparison, ...]
    against_build: tuple[Comparison, ...]
    near_ties: tuple[str, ...] = ()  # where a greedy generation left PyTorch's, which was nearly undecided itself


@dataclass(frozen=True)
class SelftestReport:
    """``tolerance`` bounds the error against PyTorch; the one against the build is told, not judged."""

    tolerance: float
    cases: tuple[SelftestCase, ...]

    @property
    def worst(self) -> Comparison:
        found = (comparison for case in self.cases for comparison in case.against_pytorch)
        return max(found, key=lambda comparison: comparison.error)


def selftest(path: str | PathLike[str], device: str = "cpu", threads: int | None = None) -> SelftestReport:
    """Run a bundle's golden inputs and hold the outputs against PyTorch's.

    Raises ParityError beyond the tolerance that bundle.json records, BundleError when there are no
    golden values.
    """
    with load(path, device, threads) as loaded:
        golden = read_golden(Bundle(str(path)))
        tolerance = float(loaded.manifest.parity["tolerance"])
        if not golden:
            raise BundleError(f"{path} holds no golden values; export it again.")
        scales = loaded.manifest.parity.get("scales", {})
        report = SelftestReport(
            tolerance, tuple(run_case(loaded, name, arrays, scales) for name, arrays in sorted(golden.items()))
        )
    if not report.worst.error <= tolerance:
        raise ParityError(
            f"{path} on {device} differs from PyTorch: {report.worst}; the bundle allows {tolerance:g}. "
            "Is the library on this device the one bundle.json names under tools? Export again if it is not."
        )
    return report


def run_case(
    loaded: LoadedBundle, name: str, arrays: Mapping[str, Mapping[str, Array]], scales: Mapping[str, float]
) -> SelftestCase:
    """One case; ``scales`` are those of the outputs over the whole parity grid."""
    if name == GENERATION:
        return run_generation(loaded, arrays, scales)
    if not arrays["pytorch"] or arrays["bundle"].keys() != arrays["pytorch"].keys():
        raise BundleError(f"{GOLDEN}: case {name!r} has not the same outputs on both sides; export the bundle again.")
    graph, inputs = loaded.graph_for(arrays["input"]), arrays["input"]
    ours = loaded.run(inputs, list(arrays["pytorch"]))
    return SelftestCase(
        name,
        on_scales(compare_outputs(graph, inputs, ours, arrays["pytorch"]), scales),
        on_scales(compare_outputs(graph, inputs, ours, arrays["bundle"]), scales),
    )


def run_generation(
    loaded: LoadedBundle, arrays: Mapping[str, Mapping[str, Array]], scales: Mapping[str, float]
) -> SelftestCase:
    """The golden generation: PyTorch's tokens again, and the logits along them."""
    from transom.runtime.replay import from_arrays, greedy, logits_along, require_same_tokens
    from transom.runtime.tasks.generator import Generator

    given, theirs, built = arrays["input"], arrays["pytorch"], arrays["bundle"]
    if not isinstance(loaded, Generator) or not is_generation(given, theirs, built):
        raise BundleError(f"{GOLDEN}: case {GENERATION!r} is not complete; export the bundle again.")
    prompts = from_arrays(given)
    tokens = theirs["tokens"]
    ours = greedy(loaded, prompts, tokens.shape[1])
    tolerance = float(loaded.manifest.parity["tolerance"])
    near_ties = require_same_tokens(ours.tokens, tokens, theirs["margins"], tolerance * scales.get("logits", 1.0))
    logits = {"logits": logits_along(loaded, prompts, tokens)[:, : theirs["logits"].shape[1]]}
    graph = loaded.backend("decoder").graph
    return SelftestCase(
        GENERATION,
        on_scales(compare_outputs(graph, {}, logits, {"logits": theirs["logits"]}), scales),
        on_scales(compare_outputs(graph, {}, logits, {"logits": built["logits"]}), scales),
        tuple(map(str, near_ties)),
    )


def is_generation(given: Mapping[str, Array], theirs: Mapping[str, Array], built: Mapping[str, Array]) -> bool:
    """Whether the arrays of a golden generation are there and fit each other."""
    expected = (
        (given, "prompts", "int64", 2),
        (given, "lengths", "int64", 1),
        (theirs, "tokens", "int64", 2),
        (theirs, "margins", "float32", 2),
        (theirs, "logits", "float32", 3),
        (built, "logits", "float32", 3),
    )
    for arrays, name, dtype, axes in expected:
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].ndim != axes:
            return False
    prompts, lengths, tokens, logits = given["prompts"], given["lengths"], theirs["tokens"], theirs["logits"]
    return (
        0 < len(prompts) == len(lengths) == len(tokens) == len(logits)
        and 0 < int(lengths.min()) <= int(lengths.max()) <= prompts.shape[1]
        and 0 < logits.shape[1] <= tokens.shape[1]
        and tokens.shape == theirs["margins"].shape
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
