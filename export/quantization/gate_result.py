"""The result of an accuracy gate: one quantised model's figures beside FP32, the criterion, and pooled repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil, exp, expm1, inf, isfinite, sqrt
from typing import Any, cast

from transom.export.metrics import Accuracy, Rate, Z
from transom.export.quantization.fidelity import RelativeError
from transom.runtime.errors import ExportError

SCORE, GROWTH, AGREEMENT, ERROR = "score", "perplexity", "agreement", "relative error"
ENOUGH_CASES = 1000  # of fewer, a point is less than ten of them
ENOUGH_INPUTS = 100  # that they are spread over: the tokens of a few texts say little of others
MOST_NATS = 700.0  # exp of more is no float

Measured = Accuracy | Rate


@dataclass(frozen=True)
class GateResult:
    """The outcome of the accuracy gate, and every figure measured on the way.

    criterion     SCORE lost, GROWTH of perplexity, AGREEMENT lost, or ERROR
    allowed       the most of it: 0.01 is a point of a score, or one percent
    score_fp32    FP32's task score, or of GROWTH its nats per token as a Rate; None where there is none
    score_int8    the quantised model's
    agreement     on how many held-out cases both choose the same; None of a regression
    error         relative error of the outputs
    output        the names of those outputs
    repetitions   how many measurements are pooled here
    repeated      where cases are few: this one pooled with those of other calibrations; it has to hold as well
    """

    criterion: str
    allowed: float
    score_fp32: Measured | None
    score_int8: Measured | None
    agreement: Accuracy | None
    error: RelativeError
    output: str
    repetitions: int = 1
    repeated: GateResult | None = None

    @property
    def measure(self) -> str:
        """The name of the criterion: "zero-shot accuracy", "perplexity", ..."""
        if self.criterion == SCORE and self.score_fp32 is not None:
            return self.score_fp32.name
        return {AGREEMENT: "same top-1 as FP32", ERROR: f"relative error of {self.output}"}.get(
            self.criterion, self.criterion
        )

    @property
    def found(self) -> float:
        """The value that may be at most ``allowed``; infinite where the quantised model's outputs are not finite."""
        if not isfinite(self.relative_error):
            return inf
        fp32, int8, top1 = self.score_fp32, self.score_int8, self.agreement
        if isinstance(fp32, Accuracy) and isinstance(int8, Accuracy):
            return (fp32.correct - int8.correct) / fp32.n
        if isinstance(fp32, Rate) and isinstance(int8, Rate):
            return growth(int8.value - fp32.value)
        if self.criterion == AGREEMENT and top1 is not None:
            return (top1.n - top1.correct) / top1.n
        return self.relative_error

    @property
    def n(self) -> int:
        """The number of cases that ``found`` is taken over: of perplexity tokens, of the error samples."""
        if isinstance(self.score_fp32, Accuracy):
            return self.score_fp32.n
        if isinstance(self.score_fp32, Rate):
            return sum(self.score_fp32.units)
        if self.criterion == AGREEMENT and self.agreement is not None:
            return self.agreement.n
        return self.error.n

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of ``found``; None of a single block of text or a single sample."""
        if not isfinite(self.found):
            return None
        fp32, int8, top1 = self.score_fp32, self.score_int8, self.agreement
        if isinstance(fp32, Accuracy) and isinstance(int8, Accuracy):
            return drop_interval(fp32, int8)
        if isinstance(fp32, Rate) and isinstance(int8, Rate):
            return growth_interval(fp32, int8)
        if self.criterion == AGREEMENT and top1 is not None:
            low, high = top1.interval
            return 1 - high, 1 - low
        return self.error.interval

    @property
    def inputs(self) -> int:
        """The number of held-out inputs over which the ``n`` cases are spread."""
        measured = self.score_fp32 or (self.agreement if self.criterion == AGREEMENT else None)
        if isinstance(measured, Accuracy):
            return len(measured.cases)
        return self.error.n if measured is None else measured.n

    @property
    def wanted(self) -> int:
        """The number of measurements as large as this one that make ENOUGH_CASES cases of ENOUGH_INPUTS inputs."""
        return ceil(max(ENOUGH_CASES / max(self.n, 1), ENOUGH_INPUTS / max(self.inputs, 1)))

    @property
    def holds(self) -> bool:
        return self.found <= self.allowed and (self.repeated is None or self.repeated.holds)

    @property
    def broken(self) -> GateResult:
        """The part that does not hold of a result that does not hold: this one or ``repeated``."""
        return self if self.repeated is None or self.found > self.allowed else self.repeated

    @property
    def relative_error(self) -> float:
        return self.error.value

    def to_json(self) -> dict[str, Any]:
        """Return the result for bundle.json: every figure with its n and interval."""
        interval = self.interval
        return {
            "measure": self.measure,
            "allowed": self.allowed,
            "found": self.found,
            "n": self.n,
            "interval": interval and list(interval),
            "holds": self.holds,
            "repeated": self.repeated
            and {
                "calibrations": self.repeated.repetitions,
                "found": self.repeated.found,
                "n": self.repeated.n,
                "interval": self.repeated.interval and list(self.repeated.interval),
                "relative_error": self.repeated.relative_error,
            },
            "score": None
            if self.score_fp32 is None or self.score_int8 is None
            else {
                **self.score_fp32.shared_fields(),
                "fp32": figures(self.score_fp32),
                "int8": figures(self.score_int8),
            },
            "agreement": self.agreement and {**self.agreement.shared_fields(), **self.agreement.side_fields()},
            "relative_error": {"output": self.output, **self.error.to_json()},
        }

    def summary(self) -> str:
        """Return one line: the criterion and its value, then the other figures."""
        n = f"n = {self.n}"
        parts = [{SCORE: self._score_summary, GROWTH: self._growth_summary}.get(self.criterion, self._other_summary)(n)]
        top1 = self.agreement
        if top1 is not None:
            low, high = top1.interval
            cases = top1.name.partition(", ")[2]
            parts.append(
                f"agrees with FP32 in {top1.correct} of {top1.n} {cases} (95 %: {100 * low:.1f} to {100 * high:.1f} %)"
            )
        if self.criterion != ERROR:
            parts.append(f"relative error of {self.output} {self.relative_error:.2g}")
        if self.repeated is not None:
            parts.append(f"over {self.repeated.repetitions} calibrations {self.repeated.amount}, n = {self.repeated.n}")
        return "; ".join(parts)

    @property
    def amount(self) -> str:
        """``found`` with its unit, as a reader expects its sign."""
        if self.criterion == SCORE:
            return f"{0.0 - 100 * self.found:+.2f} points"
        if self.criterion == GROWTH:
            return f"{100 * self.found:+.2f} %"
        return f"{100 * self.found:.2f} points" if self.criterion == AGREEMENT else f"{self.found:.2g}"

    def _score_summary(self, n: str) -> str:
        before, after = (figure(score) for score in (self.score_fp32, self.score_int8))
        return f"{self.measure} {before} -> {after}, {self.amount} of {100 * self.allowed:.1f} allowed, {n}"

    def _growth_summary(self, n: str) -> str:
        before, after = (figure(score) for score in (self.score_fp32, self.score_int8))
        return f"perplexity {before} -> {after}, {self.amount} of {100 * self.allowed:.1f} % allowed, {n} tokens"

    def _other_summary(self, n: str) -> str:
        if self.criterion == AGREEMENT:
            return f"{self.amount} of answers changed of {100 * self.allowed:.1f} allowed, {n}"
        return f"{self.measure} {self.amount} of {self.allowed:.2g} allowed, {n}"


def pooled(results: Sequence[GateResult], *, same_inputs: bool) -> GateResult:
    """Pool the results of one model calibrated on different samples.

    Measured on the ``same_inputs`` each, every input counts once, with its mean; measured on different ones, their
    cases add up. Raises ExportError for no results, and for results of different gates.
    """
    if not results:
        raise ExportError("there are no gate results to pool; expected at least one.")
    first = results[0]
    if any(
        (other.criterion, other.allowed, other.output) != (first.criterion, first.allowed, first.output)
        for other in results
    ):
        raise ExportError("the results are of different gates; pool those of one model and one precision.")
    return replace(
        first,
        score_fp32=together([each.score_fp32 for each in results], same_inputs),
        score_int8=together([each.score_int8 for each in results], same_inputs),
        agreement=cast("Accuracy | None", together([each.agreement for each in results], same_inputs)),
        error=RelativeError(
            per_input([each.error.differences for each in results], same_inputs),
            per_input([each.error.references for each in results], same_inputs),
        ),
        repetitions=len(results),
    )


def together(measured: Sequence[Measured | None], same_inputs: bool) -> Measured | None:
    """Pool one measure of all results; None where one is missing."""
    scores = [each for each in measured if isinstance(each, Accuracy)]
    rates = [each for each in measured if isinstance(each, Rate)]
    if len(scores) == len(measured):
        cases = [each.cases for each in scores]
        return replace(
            scores[0],
            right=per_input([each.right for each in scores], same_inputs),
            cases=cases[0] if same_inputs else tuple(chain(*cases)),
        )
    if len(rates) == len(measured):
        units = [each.units for each in rates]
        return replace(
            rates[0],
            amounts=per_input([each.amounts for each in rates], same_inputs),
            units=units[0] if same_inputs else tuple(chain(*units)),
        )
    return None


def per_input(columns: Sequence[Sequence[float]], same_inputs: bool) -> tuple[float, ...]:
    """Return the mean per input over the repetitions, or, of different inputs, all values one after another."""
    if not same_inputs:
        return tuple(chain(*columns))
    return tuple(sum(values) / len(columns) for values in zip(*columns, strict=True))


def drop_interval(fp32: Accuracy, int8: Accuracy) -> tuple[float, float]:
    """Return the 95 % interval of ``fp32`` minus ``int8``, two fractions over the same inputs.

    Agresti and Min's for matched pairs (2005, "Simple improved confidence intervals for comparing matched proportions",
    section 4): as if half a case more had gone each of the four ways, so that an interval is left where no answer
    changed. The cases of an input stay together, as in a ratio estimator.
    """
    n = fp32.n + 2
    lost = [before - after for before, after in zip(fp32.right, int8.right, strict=True)]
    drop = sum(lost) / n
    squares = sum((more - drop * cases) ** 2 for more, cases in zip(lost, fp32.cases, strict=True))
    half = Z * sqrt(squares + 1 + 2 * drop**2) / n  # of single cases: lost + won + 1 - (lost - won)^2 / n
    return drop - half, drop + half


def growth(nats: float) -> float:
    """Return the relative growth of a perplexity of ``nats`` more per token."""
    return expm1(nats) if nats < MOST_NATS else inf  # NaN is no growth that any gate allows


def growth_interval(fp32: Rate, int8: Rate) -> tuple[float, float] | None:
    """Return the 95 % interval of the growth on other texts of this kind, the blocks paired; None for one block."""
    if fp32.n < 2:
        return None
    more = tuple(after - before for after, before in zip(int8.amounts, fp32.amounts, strict=True))
    low, high = replace(fp32, amounts=more).interval
    return growth(low), growth(high)


def figures(measured: Measured) -> dict[str, Any]:
    """Return a score's figures; of nats per token the perplexity too."""
    if isinstance(measured, Rate) and measured.n < 2:  # of one block no interval is known
        found: dict[str, Any] = {"value": measured.value, "interval": None}
    else:
        found = measured.side_fields()
    return {**found, "perplexity": exp(min(measured.value, MOST_NATS))} if isinstance(measured, Rate) else found


def figure(measured: Measured | None) -> str:
    if measured is None:
        return "not finite"
    if isinstance(measured, Rate):
        return f"{exp(min(measured.value, MOST_NATS)):.2f}"
    return f"{measured.value:.4f}"
