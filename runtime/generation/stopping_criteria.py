"""Stopping criteria of a row: an end-of-sequence token or a stop string. (Its length limit is in ``Sequences``.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.generation.config import GenerationConfig

Decode = Callable[[Sequence[int]], str]


class StoppingCriteria:
    """The stopping criteria of ``config``; ``decode`` gives the text of ids, special tokens included.

    A row stops with the token that ends it, which stays in the output. A stop string counts where the
    newest token completes it, though it may begin in earlier tokens, the prompt's too, and end within
    the newest one ("stop" in "st" + "opera"); one that ended before the newest token does not count. As
    StopStringCriteria of transformers 5.23, by searching the text instead of tables of tokens.
    """

    def __init__(self, config: GenerationConfig, decode: Decode | None) -> None:
        self.eos = frozenset(config.eos_token_id)  # each ends its row
        self.strings = config.stop_strings
        self.decode = decode
        # tokens before the newest: each is at least a byte, and the leftmost may lose its space in decoding
        self.window = max((len(string.encode()) for string in self.strings), default=0)

    def completes_stop_string(self, before: NDArray[np.int64], token: int) -> bool:
        """Return whether ``token`` after the tokens ``before`` completes a stop string."""
        if not self.strings or self.decode is None:
            return False
        tail = before[-self.window :].tolist()
        text = self.decode([*tail, token])
        if not any(string in text for string in self.strings):
            return False
        old = common_prefix(self.decode(tail) if tail else "", text)
        return any(text.find(string, max(0, old - len(string) + 1)) >= 0 for string in self.strings)


def common_prefix(one: str, other: str) -> int:
    """Return the number of characters that both begin with; a character cut in its bytes is not common."""
    length = min(len(one), len(other))
    return next((index for index in range(length) if one[index] != other[index]), length)
