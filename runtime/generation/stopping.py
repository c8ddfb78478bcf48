"""When a row is finished: its length, an end-of-sequence token, or a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.generation.config import GenerationConfig

Decode = Callable[[Sequence[int]], str]


class StoppingCriteria:
    """The criteria of ``settings``; ``decode`` gives the text of ids, special tokens included.

    A row stops with the token that ends it, which stays in the output. A stop string counts where the
    newest token completes it, though it may begin in earlier tokens, the prompt's too, and end within
    the newest one ("stop" in "st" + "opera"); where it stands wholly before, it is over. As
    StopStringCriteria of transformers 5.23, by looking at the text instead of at tables of tokens.
    """

    def __init__(self, settings: GenerationConfig, decode: Decode | None) -> None:
        self.eos = np.array(settings.eos_token_id, dtype=np.int64)
        self.strings = settings.stop_strings
        self.decode = decode
        # tokens before the newest: each is at least a byte, and the leftmost may lose its space in decoding
        self.window = max((len(string.encode()) for string in self.strings), default=0)

    def ends(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the tokens (N,) are end-of-sequence tokens."""
        if len(self.eos) == 0:
            return np.zeros(len(tokens), dtype=np.bool_)
        return np.asarray((tokens[:, None] == self.eos).any(axis=1))

    def completes(self, before: NDArray[np.int64], token: int) -> bool:
        """Whether ``token`` after the tokens ``before`` completes a stop string."""
        if not self.strings or self.decode is None:
            return False
        tail = before[-self.window :].tolist()
        text = self.decode([*tail, token])
        if not any(string in text for string in self.strings):
            return False
        old = common_prefix(self.decode(tail) if tail else "", text)
        return any(text.find(string, max(0, old - len(string) + 1)) >= 0 for string in self.strings)


def common_prefix(one: str, other: str) -> int:
    """Number of characters with which both begin; a character cut in its bytes is no common one."""
    length = min(len(one), len(other))
    return next((index for index in range(length) if one[index] != other[index]), length)
