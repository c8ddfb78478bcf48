"""Parity: a bundle's outputs compared with PyTorch's in FP32, case by case. Beyond tolerance is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from transom.export.parity.cases import ParityCases, Run
from transom.export.parity.results import CaseResult, Golden
from transom.runtime.backends.base import Array
from transom.runtime.compare import compare_outputs, largest_scales, on_scales
from transom.runtime.errors import ParityError
from transom.runtime.golden import GENERATION
from transom.runtime.golden_reference import BUNDLE, NATIVE, PYTORCH
from transom.runtime.greedy_check import (
    Divergence,
    GreedyGeneration,
    greedy,
    logits_along,
    prompts_to_arrays,
    require_same_tokens,
)
from transom.runtime.manifest import QUANTIZED
from transom.runtime.manifest_graphs import SIMULATED
from transom.runtime.progress import Counter
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt
from transom.runtime.tasks.prompts import Prompt

AT_ONCE = 1 << 13  # elements of an encoder's inputs that PyTorch reads at once: 5 texts of BERT's 512 tokens

# max|ours - theirs| / max|theirs| per output tensor. The unit roundoff u is 2^-24 for FP32, 2^-11 for FP16
# and 2^-8 for BF16; errors of n roundings grow between sqrt(n) and n.
TOLERANCES = {
    "fp32": 2e-5,  # 335 u: other summation orders over up to some thousand terms; 2e-6 is usual
    "fp16": 1e-2,  # 20 u: every tensor rounded, a dozen layers deep; 2e-3 is usual
    "bf16": 8e-2,  # 20 u, as above; 1.5e-2 is usual
    # Integers are no rounding of every tensor alike: inputs unlike the calibration data are clipped, single elements
    # may be far off. How accurate a model is the gate measures. This catches one that computes something else: outputs
    # that are all zero have an error of 1.
    "int8": 0.5,
    "int4": 0.8,
}


@dataclass(frozen=True)
class Limit:
    """The error from which on parity fails, on each output's scale, and the advice of that error's message."""

    tolerance: float
    advice: str


def export_limit(precision: str) -> Limit:
    """Return the limit of an export in ``precision``."""
    more = "try more calibration data like what the model will see, or --activations dynamic" * (precision in QUANTIZED)
    advice = f"Nothing was written. If the model is sound, report it; {more or 'if it is badly scaled'}, or"
    return Limit(TOLERANCES[precision], f"{advice} a wider precision.")


def check_parity(
    ours: LoadedBundle,
    theirs: LoadedBundle,
    simulated: LoadedBundle | None,
    parity_cases: ParityCases,
    golden: Golden,
    limit: Limit,
    report: Callable[[str], None],
    native: LoadedBundle | None = None,
) -> list[CaseResult]:
    """Compare ``ours`` with ``theirs``, PyTorch, in every case; offer each case to ``golden``.

    ``simulated`` is a third side, where there is one: the bundle's graphs for other devices as those would compute
    them; ``native`` a fourth: its lists of fused operators. Errors are taken on each output's scale over all cases.
    ``report`` gets each case in words. Raises ParityError where any error is beyond ``limit``, and as ``in_step`` does.
    """
    results: list[CaseResult] = []
    sides = in_step([parity_cases.runs(theirs, most=AT_ONCE), parity_cases.runs(ours)], len(parity_cases))
    third = None if simulated is None else in_step([parity_cases.runs(simulated, by_row=True)], len(parity_cases))
    fourth = None if native is None else in_step([parity_cases.runs(native)], len(parity_cases))
    counter = Counter(report, "parity", len(parity_cases))
    for expected, found in sides:
        shown = " ".join(f"{axis}={size}" for axis, size in expected.sizes.items())
        counter.next(f" at {shown.partition(' chunk=')[0]}")
        compared = compare_outputs(found.graph, found.feeds, found.outputs, expected.outputs)
        results.append(CaseResult(expected.sizes, compared))
        kept = {PYTORCH: small(expected, golden), BUNDLE: small(found, golden)}
        del found  # outputs at the maximum can be gigabytes
        if third is not None:
            (run,) = next(third)
            require_outputs([expected, run])
            compared = compare_outputs(run.graph, run.feeds, run.outputs, expected.outputs)
            results.append(CaseResult(run.sizes, compared, emulated=True))
            if ours.manifest.precision in QUANTIZED:
                kept[SIMULATED] = small(run, golden)
            del run
        if fourth is not None:
            (run,) = next(fourth)
            require_outputs([expected, run])
            compared = compare_outputs(run.graph, run.feeds, run.outputs, expected.outputs)
            results.append(CaseResult(run.sizes, compared, native=True))
            kept[NATIVE] = small(run, golden)
            del run
        if expected.feeds and all(kept.values()):
            golden.offer(shown, expected.feeds, kept)
    for other in (third, fourth):
        if other is not None:
            next(other, None)  # which has no more cases either
    scales = largest_scales(comparison for result in results for comparison in result.comparisons)
    results = [replace(result, comparisons=on_scales(result.comparisons, scales)) for result in results]
    require_parity(results, limit.tolerance, f"{ours.manifest.name} in {ours.manifest.precision}", limit.advice)
    return results


def small(run: Run, golden: Golden) -> dict[str, Array]:
    """Return the outputs that golden values may keep: none of a large case, and no state, which later cases show."""
    read = {t.name: run.outputs[t.name] for t in run.graph.outputs if not t.state and t.name in run.outputs}
    return read if golden.fits(sum(array.nbytes for array in read.values())) else {}


def in_step(sides: Sequence[Iterator[Run]], cases: int) -> Iterator[list[Run]]:
    """Yield the runs of each case, one of each side.

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
            yield [runs.pop(0) for _ in sides]  # no reference is kept here: outputs can be gigabytes


def require_outputs(runs: Sequence[Run]) -> None:
    """Raise ParityError where the runs of one case give different outputs or none: a missing output cannot differ."""
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
    parity_cases: ParityCases,
    results: Sequence[CaseResult],
    golden: Golden,
    native: LoadedBundle | None = None,
) -> list[Divergence]:
    """Compare greedy generations of both sides token by token; return the rows that diverge at a near tie of PyTorch.

    An empty list where the family does not generate. ``results`` are those of ``check_parity``. Raises ParityError for
    any other difference, except in a quantised bundle, whose tokens the accuracy gate judges. ``simulated`` generates
    only for the golden values of such a bundle; ``native`` is compared like ``ours``.
    """
    if not (isinstance(ours, Generator) and isinstance(theirs, Generator)):
        return []
    quantized = ours.manifest.precision in QUANTIZED
    sides: dict[str, Generator] = {PYTORCH: theirs, BUNDLE: ours}
    if quantized and isinstance(simulated, Generator):
        sides[SIMULATED] = simulated
    if isinstance(native, Generator):
        sides[NATIVE] = native
    prompts, new_tokens = parity_cases.greedy_prompts, parity_cases.greedy_tokens
    if new_tokens == 0:  # a context of one token: nothing to generate, and one token's logits to remember
        tokens = ours.prompt_tokens()
        if tokens in ours.backend("decoder").graph.inputs:
            row = prompts[0].ids if isinstance(prompts[0], InterleavedPrompt) else prompts[0]
            feeds = {tokens.name: np.array([row[:1]])}
            runs = {name: side.run(feeds, ["logits"]) for name, side in sides.items()}
            golden.offer("one token", feeds, runs, always=True)
        return []
    found = {name: greedy(side, prompts, new_tokens) for name, side in sides.items()}
    expected = found[PYTORCH].chosen
    near_ties = []
    if not quantized:
        scale = largest_scales(comparison for result in results for comparison in result.comparisons)["logits"]
        tolerance = TOLERANCES[ours.manifest.precision] * scale
        compared = [found[side] for side in (BUNDLE, NATIVE) if side in found]
        near_ties = [tie for generation in compared for tie in require_same_tokens(generation, expected, tolerance)]
    steps = golden.steps(found[PYTORCH].logits[:, :1].nbytes, len(sides))
    golden.offer(
        GENERATION,
        prompts_to_arrays(prompts),
        {
            name: {
                **generation.chosen.to_arrays(),
                "logits": first_logits(sides[name], prompts, generation, expected.tokens[:, :steps]),
            }
            for name, generation in found.items()
        },
        always=True,  # nothing else runs the decoder
    )
    return near_ties


def first_logits(
    side: Generator, prompts: Sequence[Prompt], generation: GreedyGeneration, tokens: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the logits that a side chooses the first ``tokens`` (R, n) from: (R, n, V).

    They are known where its own ``generation`` begins with those tokens.
    """
    steps = tokens.shape[1]
    if np.array_equal(generation.chosen.tokens[:, :steps], tokens):
        return generation.logits[:, :steps]
    return logits_along(side, prompts, tokens)


def require_parity(results: Iterable[CaseResult], tolerance: float, what: str, advice: str) -> None:
    """Raise ParityError naming the worst element if the error of any case is ``tolerance`` or more.

    Raises it for no cases at all, too. ``advice`` ends the message.
    """
    results = list(results)
    if not results:
        raise ParityError(f"{what} was compared with PyTorch in no case at all. Report this, with its config.json.")
    worst = max(results, key=lambda result: result.worst.error)
    if not worst.worst.error < tolerance:
        shape = " ".join(f"{name}={size}" for name, size in worst.shape.items())
        simulated = ", simulated as another device computes it," if worst.emulated else ""
        simulated = ", computed by its list of fused operators," if worst.native else simulated
        raise ParityError(
            f"{what}{simulated} differs from PyTorch at {shape}: {worst.worst}; the error must be below "
            f"{tolerance:g}. {advice}"
        )
