"""Task metrics: a fraction of cases answered right, or a rate per unit; each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any, Self

Z = 1.959963984540054  # standard normal quantile of 0.975: a 95 % interval leaves 2.5 % on either side


@dataclass(frozen=True)
class Accuracy:
    """Fraction of cases answered right: ``right`` of ``cases`` per input of the data set, of a text 3 of 5 gaps.

    ``by_length`` is the same for the inputs of each length apart; empty where length is not the subject.
    """

    name: str
    data: str
    right: tuple[float, ...]
    cases: tuple[int, ...]
    by_length: tuple[LengthAccuracy, ...] = ()

    @classmethod
    def of_each(cls, name: str, data: str, right: Iterable[bool]) -> Self:
        """Make the accuracy of inputs with one case each."""
        outcomes = tuple(int(outcome) for outcome in right)
        return cls(name, data, outcomes, (1,) * len(outcomes))

    @property
    def n(self) -> int:
        return sum(self.cases)

    @property
    def correct(self) -> float:
        return sum(self.right)

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def design_effect(self) -> float:
        """Return the number of cases that are worth one independent case: the gaps of a text are correlated.

        The variance between inputs over that of independent cases, Kish (1965); at least 1, and 1 where all cases came
        out alike, from which it cannot be estimated.
        """
        n, p, inputs = self.n, self.value, len(self.cases)
        if max(self.cases) == 1 or not 0 < p < 1:
            return 1.0
        if inputs == 1:
            return float(n)
        pairs = zip(self.right, self.cases, strict=True)
        between = sum((right - p * cases) ** 2 for right, cases in pairs) * inputs / (inputs - 1)
        return max(1.0, between / (n * p * (1 - p)))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the true fraction, over other inputs of this kind. Wilson (1927)."""
        n, p = self.n / self.design_effect, self.value
        middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
        return middle - half, middle + half

    def shared_fields(self) -> dict[str, Any]:
        """Return the fields that two sides of one comparison share."""
        return {"name": self.name, "data": self.data, "n": self.n}

    def side_fields(self) -> dict[str, Any]:
        """Return the fields of one side."""
        found = {"correct": self.correct, "value": self.value, "interval": list(self.interval)}
        return {**found, "by_length": [each.to_json() for each in self.by_length]} if self.by_length else found


@dataclass(frozen=True)
class LengthAccuracy:
    """The accuracy on the inputs of one length, which ``name`` says: "3 dates".

    ``characters`` are those of the inputs: fewest, mean and most.
    """

    name: str
    characters: tuple[int, float, int]
    accuracy: Accuracy

    def to_json(self) -> dict[str, Any]:
        """Return the entry of bundle.json."""
        counts = {"name": self.name, "characters": list(self.characters), "n": self.accuracy.n}
        return counts | self.accuracy.side_fields()


@dataclass(frozen=True)
class Rate:
    """Sum of ``amounts`` over sum of ``units``, such as bits and bytes, one of each per block. Less is better."""

    name: str
    data: str
    amounts: tuple[float, ...]
    units: tuple[int, ...]

    @property
    def n(self) -> int:
        return len(self.amounts)

    @property
    def value(self) -> float:
        return sum(self.amounts) / sum(self.units)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate on other blocks of this kind: a ratio estimator's, the blocks independent.

        Cochran, "Sampling Techniques" (1977), section 6.4.
        """
        n, rate = self.n, self.value
        residuals = (amount - rate * unit for amount, unit in zip(self.amounts, self.units, strict=True))
        variance = sum(residual**2 for residual in residuals) / (n - 1)
        half = Z * sqrt(variance / n) / (sum(self.units) / n)
        return rate - half, rate + half

    def shared_fields(self) -> dict[str, Any]:
        """Return the fields that two sides of one comparison share."""
        return {"name": self.name, "data": self.data, "n": self.n, "lower_is_better": True}

    def side_fields(self) -> dict[str, Any]:
        """Return the fields of one side."""
        return {"value": self.value, "interval": list(self.interval)}
