"""From start and end logits to spans of a context: the arithmetic of extractive question answering."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from transom.runtime.numeric import softmax
from transom.runtime.tasks.postprocess import Answer, best

if TYPE_CHECKING:
    from tokenizers import Encoding


def best_spans(
    encoding: Encoding,
    start_logits: NDArray[np.float32],
    end_logits: NDArray[np.float32],
    context: str,
    top_k: int,
    max_tokens: int,
) -> list[Answer]:
    """The ``top_k`` best spans of one window; logits are (S,).

    Probabilities are taken over the context's tokens and the first token, which stands for "no
    answer"; a span may not use that one, must not end before it starts, and is at most
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
