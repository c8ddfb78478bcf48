"""The shapes of answers and the arithmetic every family's tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.numeric import sigmoid, softmax

Ranked = list[tuple[str, float]]


class Entity(NamedTuple):
    """A token's label in a text: ``text[start:end]``, in characters."""

    text: str
    label: str
    probability: float
    start: int
    end: int


class Answer(NamedTuple):
    """A span of the context, ``context[start:end]`` in characters, and its probability."""

    text: str
    probability: float
    start: int
    end: int


def as_list(value: Any) -> tuple[bool, list[Any]]:
    """(was it a single one, the list): a list or tuple is many, anything else is one."""
    if isinstance(value, list | tuple):
        return False, list(value)
    return True, [value]


def label_scores(logits: NDArray[np.float32], problem_type: Any) -> NDArray[np.float32]:
    """Scores of (N, L) logits as transformers' pipelines give them.

    Softmax, or sigmoid for a multi-label checkpoint or a single label, or the plain number for a regression.
    """
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification" or (problem_type is None and logits.shape[1] == 1):
        return sigmoid(logits)
    return softmax(logits)


def best(scores: NDArray[np.float32], top_k: int) -> list[int]:
    """Indices of the ``top_k`` largest, largest first; the lower index first where two are equal."""
    if type(top_k) is not int or top_k < 1:
        raise InputError(f"top_k is {top_k!r}; expected a positive integer.")
    return [int(index) for index in np.argsort(-scores, kind="stable")[:top_k]]


def ranked(scores: NDArray[np.float32], labels: Sequence[str], top_k: int) -> Ranked:
    """``[(label, score), ...]``, best first."""
    return [(labels[index], float(scores[index])) for index in best(scores, top_k)]
