"""Batches of encoded texts, and to how many tokens their rows are padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Encoding

ROW_STEP = 4  # tokens: kernels sum along a row four elements at a time, and the rest of a row differently


@dataclass(frozen=True)
class EncodedBatch:
    """B rows of S tokens: int64 (B, S) arrays named as the graph's inputs.

    ``rows`` are the tokenizers library's encodings without padding: ``offsets`` into the text in
    characters, ``special_tokens_mask``, ``sequence_ids``, ``word_ids``, ``tokens``. Those of a Marian
    tokenizer have ``ids`` alone, a ``CompactRow`` ``ids`` and ``type_ids``.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    rows: tuple[Any, ...]


@dataclass(frozen=True)
class CompactRow:
    """The part of an encoding that a graph reads, int32: a tenth of the memory, for rows that wait for their batch."""

    ids: NDArray[np.int32]
    type_ids: NDArray[np.int32]

    @classmethod
    def of(cls, encoding: Encoding) -> CompactRow:
        return cls(*np.array([encoding.ids, encoding.type_ids], np.int32))

    def __len__(self) -> int:
        return len(self.ids)


def row_length(longest: int, most: int) -> int:
    """Return the padded length of a batch whose longest row has ``longest`` tokens, where ``most`` are allowed.

    It is a multiple of ROW_STEP: the padding of a row, which its neighbours decide, then changes no bit of its result.
    """
    return max(longest, min(-(-longest // ROW_STEP) * ROW_STEP, most))
