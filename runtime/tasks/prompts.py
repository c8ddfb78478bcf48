"""Check the prompts of one call, texts or token ids, and turn them into ids batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError

if TYPE_CHECKING:
    from transom.runtime.text.tokenizer import TextTokenizer

Row = list[int]
Prompt = Any  # one row of a batch that is ready for the graphs: a Row, or an image's pixels, float32 (C, H, W)


@dataclass(frozen=True)
class Prompts:
    """The checked prompts of one call; ``lengths`` are their tokens.

    ``text`` says whether ``given`` are texts or images, which get texts for an answer; else they are ids or pixels.

    ``single``: the caller gave one prompt, not a list of them.
    """

    single: bool
    text: bool
    given: Sequence[Any]
    lengths: Sequence[int]

    def name(self, place: int) -> str:
        """Return the name of a prompt in errors."""
        return f"{'text' if self.text else 'prompt'} {place}"


class Reader(Protocol):
    """Reader of a family's prompts: PromptReader, or ImagePromptReader."""

    def read(self, prompts: Any) -> Prompts: ...

    def rows(self, prompts: Prompts, places: Sequence[int]) -> Sequence[Prompt]: ...


class PromptReader:
    """Reads prompts for a model of ``vocabulary`` tokens; without a tokenizer, prompts of ids alone."""

    def __init__(self, vocabulary: int, tokenizer: TextTokenizer | None) -> None:
        self.vocabulary, self._tokenizer = vocabulary, tokenizer

    def tokenizer(self) -> TextTokenizer:
        """Return the tokenizer of prompts; InputError where the checkpoint had none."""
        if self._tokenizer is None:
            raise InputError("this bundle has no tokenizer, since its checkpoint had none; give and take token ids.")
        return self._tokenizer

    def read(self, prompts: Any) -> Prompts:
        """Check the prompts and count their tokens; InputError for anything but texts or ids of the vocabulary.

        They become ids batch by batch (``rows``): the ids of a long list would take many times the memory of its texts.
        """
        given = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
        if not isinstance(given, str | list | tuple):
            raise InputError(f"prompts is a {type(given).__name__}; expected a str, a list of ids, or a list of those.")
        single = isinstance(given, str) or not any(isinstance(part, str | list | tuple | np.ndarray) for part in given)
        batch = [given] if single else list(given)
        empty = [place for place, prompt in enumerate(batch) if is_empty(prompt)]
        if empty or not batch:
            which = "a prompt" if single or not batch else f"prompt {empty[0]}"
            raise InputError(f"{which} is empty; expected at least one token. Begin with the token a text begins with.")
        kinds = {isinstance(prompt, str) for prompt in batch}
        if len(kinds) == 2:
            raise InputError("prompts holds both texts and ids; give one kind in one call.")
        lengths = [len(self._row(prompt, place)) for place, prompt in enumerate(batch)]
        return Prompts(single, kinds == {True}, batch, lengths)

    def rows(self, prompts: Prompts, places: Sequence[int]) -> list[Row]:
        """Return the ids of the prompts at these places."""
        return [self._row(prompts.given[place], place) for place in places]

    def _row(self, prompt: Any, place: int) -> Row:
        """Return a prompt as ids; a text's ids are checked too: added tokens may lie past the model's."""
        if isinstance(prompt, str):
            return self._checked(self.tokenizer().row(prompt, truncate=False, name=f"text {place}").ids)
        return self._checked(prompt)

    def _checked(self, prompt: Any) -> Row:
        """Return one prompt of ids as a list of ints of the vocabulary; InputError for anything else."""
        ids = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        if not isinstance(ids, list | tuple):
            raise InputError(f"a prompt is a {type(ids).__name__}; expected a str or a list of ids.")
        wrong = [token for token in ids if isinstance(token, bool) or not isinstance(token, int | np.integer)]
        if wrong:
            raise InputError(f"a prompt of ids holds {str(wrong[0])[:40]!r}; expected integers.")
        outside = [token for token in ids if not 0 <= token < self.vocabulary]
        if outside:
            raise InputError(
                f"a prompt holds the id {outside[0]}; expected 0..{self.vocabulary - 1}. Is this the tokenizer of "
                "this model?"
            )
        return [int(token) for token in ids]


def is_empty(prompt: Any) -> bool:
    """Return whether a prompt is a text or a list without anything in it; what is neither is another error."""
    return isinstance(prompt, str | list | tuple | np.ndarray) and len(prompt) == 0


def padded(rows: Sequence[Row], length: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad rows on the right: int64 (R, S), and their lengths (R,). S is ``length``, or that of the longest.

    The padding is a row's own last token: results at padding are masked, but NaN and infinity pass
    through every mask, and a row must not get them from a token that it does not hold.
    """
    lengths = np.array([len(row) for row in rows])
    size = int(lengths.max()) if length is None else length
    return np.array([[*row, *row[-1:] * (size - len(row))] for row in rows], np.int64), lengths
