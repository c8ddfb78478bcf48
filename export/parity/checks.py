"""The artefact against PyTorch: both loaded by the same runtime, put through the same exercises, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from transom.export.checkpoint import LoadedCheckpoint
from transom.export.parity.cases import ParityCases, Run
from transom.export.parity.compare import TOLERANCES, Case, PyTorchBackend, require_parity
from transom.export.parity.fp16_range import RangeBackend, Ranges
from transom.export.parity.golden import Golden
from transom.export.variants import Variants
from transom.runtime.backends.base import Array
from transom.runtime.backends.ort import OrtBackend
from transom.runtime.bundle import Bundle
from transom.runtime.compare import compare_outputs, largest_scales, on_scales
from transom.runtime.errors import BackendError, BundleError, ExportError, ParityError
from transom.runtime.golden import GENERATION
from transom.runtime.golden_reference import BUNDLE, PYTORCH
from transom.runtime.greedy_check import Divergence, as_arrays, greedy, logits_along, require_same_tokens
from transom.runtime.manifest import QUANTIZED
from transom.runtime.manifest_graphs import SIMULATED
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks import task_class
from transom.runtime.tasks.generator import Generator


@dataclass(frozen=True)
class Limit:
    """The error at which parity fails, on each output's scale, and what to do then."""

    tolerance: float
    advice: str


def export_limit(precision: str) -> Limit:
    """What an export refuses."""
    more = "try more calibration data like what the model will see, or --activations dynamic" * (precision in QUANTIZED)
    advice = f"Nothing was written. If the model is sound, report it; {more or 'if it is badly scaled'}, or"
    return Limit(TOLERANCES[precision], f"{advice} a wider precision.")


def check_parity(
    ours: LoadedBundle,
    theirs: LoadedBundle,
    simulated: LoadedBundle | None,
    exercises: ParityCases,
    golden: Golden,
    limit: Limit,
    tell: Callable[[str], None],
) -> list[Case]:
    """Put both sides through the exercises; ParityError if any is beyond ``limit``.

    ``simulated`` is a third side, where there is one: our graphs for other devices as those would compute them. Errors
    are taken on each output's scale over all exercises. Every side has every case: see ``in_step``.
    """
    cases: list[Case] = []
    sides = in_step([exercises.runs(theirs), exercises.runs(ours)], len(exercises))
    third = None if simulated is None else in_step([exercises.runs(simulated, by_row=True)], len(exercises))
    for expected, found in sides:
        shown = " ".join(f"{axis}={size}" for axis, size in expected.sizes.items())
        tell("parity at " + shown.partition(" chunk=")[0])
        cases.append(Case(expected.sizes, compare_outputs(found.graph, found.feeds, found.outputs, expected.outputs)))
        kept = {PYTORCH: small(expected, golden), BUNDLE: small(found, golden)}
        del found  # outputs at the maximum can be gigabytes
        if third is not None:
            (run,) = next(third)
            require_outputs([expected, run])
            compared = compare_outputs(run.graph, run.feeds, run.outputs, expected.outputs)
            cases.append(Case(run.sizes, compared, emulated=True))
            if ours.manifest.precision in QUANTIZED:
                kept[SIMULATED] = small(run, golden)
            del run
        if expected.feeds and all(kept.values()):
            golden.offer(shown, expected.feeds, kept)
    if third is not None:
        next(third, None)  # which has no more cases either
    scales = largest_scales(comparison for case in cases for comparison in case.comparisons)
    cases = [replace(case, comparisons=on_scales(case.comparisons, scales)) for case in cases]
    require_parity(cases, limit.tolerance, f"{ours.manifest.name} in {ours.manifest.precision}", limit.advice)
    return cases


def small(run: Run, golden: Golden) -> dict[str, Array]:
    """The outputs that golden values may keep: none of a large case, and no state, which is seen in what follows."""
    read = {tensor.name: run.outputs[tensor.name] for tensor in run.graph.outputs if not tensor.state}
    return read if golden.fits(sum(array.nbytes for array in read.values())) else {}


def in_step(sides: Sequence[Iterator[Run]], cases: int) -> Iterator[list[Run]]:
    """Each case's runs, one of each side.

    Raises ParityError where there are no cases, where a side has more or fewer of them than ``cases``, and as
    ``require_outputs`` does.
    """
    for number in range(cases + 1):
        runs = [run for side in sides if (run := next(side, None)) is not None]
        if cases == 0 or len(runs) != (len(sides) if number < cases else 0):
            raise ParityError(
                f"{len(runs)} of {len(sides)} sides have a case {number + 1}; expected {cases} cases, at least one, of "
                "each. Nothing was proven; report this, with the checkpoint's config.json."
            )
        if runs:
            require_outputs(runs)
            yield [runs.pop(0) for _ in sides]  # held on to by nothing here: outputs can be gigabytes


def require_outputs(runs: Sequence[Run]) -> None:
    """Raise ParityError where the runs of one case give other outputs or none: what is not there cannot differ."""
    if not runs[0].outputs or any(run.outputs.keys() != runs[0].outputs.keys() for run in runs):
        given = " and ".join(", ".join(run.outputs) or "nothing" for run in runs)
        raise ParityError(
            f"the sides of a case give {given}; expected the same outputs. Nothing was proven; report this, with the "
            "checkpoint's config.json."
        )


def check_greedy(
    ours: LoadedBundle,
    theirs: LoadedBundle,
    simulated: LoadedBundle | None,
    exercises: ParityCases,
    cases: list[Case],
    golden: Golden,
) -> list[Divergence]:
    """Greedy generations of both sides, equal token by token; the rows that part where PyTorch was unsure itself.

    Nothing where the family does not generate. Raises ParityError for any other difference, but of a quantised
    bundle: its tokens are its own, and what they are worth is for the accuracy gate to say. ``simulated`` generates for
    the golden values of such a bundle alone.
    """
    if not (isinstance(ours, Generator) and isinstance(theirs, Generator)):
        return []
    quantized = ours.manifest.precision in QUANTIZED
    sides: dict[str, Generator] = {PYTORCH: theirs, BUNDLE: ours}
    if quantized and isinstance(simulated, Generator):
        sides[SIMULATED] = simulated
    prompts, new_tokens = exercises.greedy_prompts, exercises.greedy_tokens
    if new_tokens == 0:  # a context of one token: nothing to generate, and one token's logits to remember
        tokens = ours.prompt_tokens()
        if tokens in ours.backend("decoder").graph.inputs:
            feeds = {tokens.name: np.array([prompts[0][:1]])}
            runs = {name: side.run(feeds, ["logits"]) for name, side in sides.items()}
            golden.offer("one token", feeds, runs, always=True)
        return []
    found = {name: greedy(side, prompts, new_tokens) for name, side in sides.items()}
    expected = found[PYTORCH].chosen
    near_ties = []
    if not quantized:
        scale = largest_scales(comparison for case in cases for comparison in case.comparisons)["logits"]
        tolerance = TOLERANCES[ours.manifest.precision] * scale
        near_ties = require_same_tokens(found[BUNDLE], expected, tolerance)
    steps = golden.steps(found[PYTORCH].logits[:, :1].nbytes, len(sides))
    golden.offer(
        GENERATION,
        as_arrays(prompts),
        {
            name: {
                **generation.chosen.to_arrays(),
                "logits": logits_along(sides[name], prompts, expected.tokens)[:, :steps],
            }
            for name, generation in found.items()
        },
        always=True,  # nothing else runs the decoder
    )
    return near_ties


def open_bundle(bundle: Bundle, device: str = "cpu", threads: int | None = None) -> LoadedBundle:
    """The bundle as a device would load it."""
    return task_class(bundle.manifest.family)(bundle, device, threads)


def open_pytorch(bundle: Bundle, loaded: LoadedCheckpoint) -> LoadedBundle:
    """The same runtime around the PyTorch module: whatever differs comes from the graphs alone."""
    parts = loaded.parts()
    return task_class(bundle.manifest.family)(
        bundle,
        opener=lambda graph, read, device, threads: PyTorchBackend(parts[graph.graph.name], graph.graph),
    )


def open_emulated(bundle: Bundle, variants: Variants) -> LoadedBundle:
    """The same runtime around the graphs for other devices as those would compute them."""
    emulated = {graph.graph.name: graph for graph in variants.emulated}
    return task_class(bundle.manifest.family)(
        bundle,
        opener=lambda graph, read, device, threads: OrtBackend(
            emulated[graph.graph.name], variants.emulated_files.__getitem__, "cpu", None
        ),
    )


def open_default_files(bundle: Bundle) -> None:
    """Build an ONNX Runtime session of each default file that has a variant for the CPU beside it.

    Parity opens the variant alone, so nothing else would show that what ships for other devices loads at all. Types and
    the graph's edges are checked and kernels found; nothing is computed, for how half precision adds depends on the
    processor. ONNX Runtime's CPU has no kernels of BF16: of such a file only operators, types and shapes were checked,
    when it was written. Raises ExportError.
    """
    if bundle.manifest.precision == "bf16":
        return
    for file in bundle.manifest.graphs:
        default = file.files["default"]
        if file.file_for("cpu") == default:
            continue
        alone = replace(file, files={"default": default}, integers=file.integers and SIMULATED)
        try:
            opened = OrtBackend(alone, bundle.read, "cpu", None)
        except (BackendError, BundleError) as error:
            raise ExportError(
                f"{default}, which would ship for GPUs, does not load: {error} Report this, with the checkpoint's "
                "config.json; --precision fp32 ships no such file."
            ) from None
        wrong = {*opened.graph.inputs, *opened.graph.outputs} - {*file.graph.inputs, *file.graph.outputs}
        if wrong:
            raise ExportError(
                f"{default}, which would ship for GPUs, has {', '.join(sorted(each.name for each in wrong))} in "
                "another dtype than bundle.json says. Report this, with the checkpoint's config.json."
            )


def measure_ranges(
    bundle: Bundle,
    canonical: Mapping[str, ir.Model],
    loaded: LoadedCheckpoint,
    exercises: ParityCases,
    *,
    sums: bool = False,
) -> Ranges:
    """The largest absolute value of every intermediate of the FP32 graphs over the exercises.

    With ``sums`` also bounds of partial sums. ``canonical`` is consumed.
    """
    backends = {graph.name: RangeBackend(canonical[graph.name], graph, sums=sums) for graph in loaded.graphs}
    with task_class(bundle.manifest.family)(
        bundle, opener=lambda graph, read, device, threads: backends[graph.graph.name]
    ) as measured:
        for _ in exercises.runs(measured, by_row=True):
            pass
    for name, backend in backends.items():
        backend.require_runs(name)
    return Ranges(
        {name: found for backend in backends.values() for name, found in backend.largest.items()},
        {name: found for backend in backends.values() for name, found in backend.sums.items()},
    )
