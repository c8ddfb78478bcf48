"""Turn logits into answers: labels with scores, ranked indices, spans of a context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.numeric import sigmoid, softmax

if TYPE_CHECKING:
    from tokenizers import Encoding

Ranked = list[tuple[str, float]]


class Entity(NamedTuple):
    """A labelled token of a text, ``text[start:end]`` in characters, and its probability."""

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
    """Return (single, values): a list or tuple as a list, anything else as a list of it alone."""
    if isinstance(value, list | tuple):
        return False, list(value)
    return True, [value]


def label_scores(logits: NDArray[np.float32], problem_type: Any) -> NDArray[np.float32]:
    """Return the scores of logits (N, L) as transformers' pipelines compute them.

    Softmax, or sigmoid for a multi-label checkpoint or a single label, or the plain number for a regression.
    """
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification" or (problem_type is None and logits.shape[1] == 1):
        return sigmoid(logits)
    return softmax(logits)


def best(scores: NDArray[np.float32], top_k: int) -> list[int]:
    """Return the indices of the ``top_k`` highest, highest first; of two equal ones the lower index first."""
    if type(top_k) is not int or top_k < 1:
        raise InputError(f"top_k is {top_k!r}; expected a positive integer.")
    return [int(index) for index in np.argsort(-scores, kind="stable")[:top_k]]


def ranked(scores: NDArray[np.float32], labels: Sequence[str], top_k: int) -> Ranked:
    """Return ``[(label, score), ...]``, best first."""
    return [(labels[index], float(scores[index])) for index in best(scores, top_k)]


def best_spans(
    encoding: Encoding,
    start_logits: NDArray[np.float32],
    end_logits: NDArray[np.float32],
    context: str,
    top_k: int,
    max_tokens: int,
) -> list[Answer]:
    """Return the ``top_k`` best spans of one window; logits are (S,).

    Probabilities are softmax over the context's tokens and the first token, which means "no
    answer"; a span must not use that one, must not end before it starts, and is at most
    ``max_tokens`` long (Devlin et al., section 4.2).
    """
    S = len(start_logits)
    in_context = np.zeros(S, bool)
    in_context[: len(encoding.ids)] = [sequence == 1 for sequence in encoding.sequence_ids]
    considered = in_context.copy()
    considered[0] = True
    start, end = (softmax(np.where(considered, logits, np.float32(-1e4))) for logits in (start_logits, end_logits))
    joint = np.outer(start * in_context, end * in_context)  # (S, S): start, end
    joint = np.tril(np.triu(joint), max_tokens - 1)
    spans = []
    for flat in best(joint.ravel(), top_k):
        first, last = divmod(flat, S)
        if joint[first, last] > 0:
            begin, finish = encoding.offsets[first][0], encoding.offsets[last][1]
            spans.append(Answer(context[begin:finish], float(joint[first, last]), begin, finish))
    return spans
