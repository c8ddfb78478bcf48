"""Check that what tasks read from a model is finite; an error names the output.

Every task checks here what it reads, and only that; raw runs are handed out as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from transom.runtime.backends.base import Array
from transom.runtime.errors import NotFiniteError


def check_finite(
    values: Array, output: str, row_name: Callable[[int], str], *, when: str = "", ruled_out: bool = False
) -> None:
    """Raise NotFiniteError where ``values``, float32 (R, ...) read from ``output``, hold NaN or infinity.

    ``row_name`` gives the caller's name of a row of ``values``, ``when`` follows it in the message. With
    ``ruled_out``, for logits over a vocabulary, -inf among others may be: a token that is never chosen. Extremes are
    taken instead of a mask of all elements, which would cost memory; NaN is an extreme of its row.
    """
    rows = values.reshape(len(values), -1)
    highest = rows.max(axis=1)
    finite = np.isfinite(highest)
    if not ruled_out:
        finite &= np.isfinite(rows.min(axis=1))
    if not finite.all():
        row = int(finite.argmin())
        kind = "NaN" if np.isnan(highest[row]) else "infinite"
        raise NotFiniteError(
            f"the model's {output} for {row_name(row)} are {kind}{when}, expected finite numbers. Run `transom "
            "selftest` on the bundle: where it fails, load it on another device or export it again; where it passes, "
            "this input is too much for the bundle's precision: export with --precision fp32."
        )
