"""Tasks of sequence to sequence with GRUs: texts are translated, as by the Transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from transom.runtime.backends.base import Array
from transom.runtime.errors import InputError
from transom.runtime.tasks import transformer
from transom.runtime.tasks.task import FamilyTasks
from transom.runtime.tasks.transformer import Transformer

MASK = "attention_mask"


class Seq2Seq(Transformer):
    """A loaded seq2seq model, with attention or without: ``translate``, ``generate`` and ``stream``."""

    GRAPHS: ClassVar = {"encoder": ("input_ids", MASK), "decoder": ("decoder_input_ids",)}

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Execute the graph that has these inputs, as every bundle does.

        Raises InputError too for a mask that is no row of ones before zeros: a recurrence reads from a row's beginning
        to its end, and back.
        """
        if isinstance(inputs, Mapping) and isinstance(inputs.get(MASK), np.ndarray):
            check_mask(inputs[MASK])
        return super().run(inputs, outputs)


def check_mask(mask: Array) -> None:
    """Raise InputError for a row without a token, and for one with padding before or between its tokens."""
    if mask.ndim != 2 or mask.dtype.kind not in "iu":
        return  # an error of its own
    lengths = (mask != 0).sum(1)
    wrong = np.flatnonzero((lengths == 0) | (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any(1))
    if wrong.size:
        row = int(wrong[0])
        others = mask[row][(mask[row] != 0) & (mask[row] != 1)]
        if others.size:  # the graph adds them up
            found = f"holds {int(others[0])}"
        else:
            found = "has no token" if lengths[row] == 0 else "has padding before a token"
        raise InputError(
            f"input {MASK!r}: row {row} of {len(mask)} {found}; expected at least one 1, then zeros for padding. Pad "
            "on the right, and leave empty rows out."
        )


FAMILY = FamilyTasks(Seq2Seq, transformer.FAMILY.tasks)
