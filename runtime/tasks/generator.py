"""What every bundle that generates shares: prompts in, batches of rows, tokens or text out."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Generator as Pieces
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.decoder import Decoder
from transom.runtime.errors import BundleError, InputError
from transom.runtime.feeds import WRITE_INDICES
from transom.runtime.generation import GenerationConfig, generate, stream
from transom.runtime.process_bound import ProcessBound
from transom.runtime.session import LoadedBundle
from transom.runtime.text.tokenizer import TextTokenizer, TokenizerSpec, lowered

if TYPE_CHECKING:
    from transom.runtime.backends.base import Array
    from transom.runtime.graph_spec import Tensor

Row = list[int]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PrefillResult:
    """A batch whose prompts are read: what goes on, each row's first ids, and the logits (R, V) behind them."""

    decoder: Decoder
    starts: list[Row]
    logits: Floats


@dataclass(frozen=True)
class Prompts:
    """The prompts of one call, checked, and how many tokens each has; ``given`` are texts or ids, as ``text`` says.

    ``single``: one prompt was handed in, not a list of them.
    """

    single: bool
    text: bool
    given: Sequence[Any]
    lengths: Sequence[int]

    def name(self, place: int) -> str:
        """What errors call a prompt."""
        return f"{'text' if self.text else 'prompt'} {place}"


class Stream(ProcessBound, Iterator[Any]):
    """The pieces of one generation, each made when it is asked for; ``close`` frees the cache early."""

    def __init__(self, pieces: Pieces[Any]) -> None:
        self._pieces = pieces

    def __next__(self) -> Any:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()


class Generator(LoadedBundle, ABC):
    """A loaded bundle with a decoder. Families say how a batch of prompts is begun.

    Prompts are texts, or token ids: one (``"..."``, ``[1, 2, 3]``) or a list of them. Answers come in
    kind, and hold what is new alone.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._defaults = GenerationConfig.from_json(self.manifest.generation or {})
        below = self.prompt_tokens().exclusive_max
        if below is None:
            raise BundleError("bundle.json: the input that takes prompts is not bounded (below); export it again.")
        self.vocabulary = below  # of prompts
        self._text = self.open_tokenizer(self.manifest.tokenizer)
        self.context = min(self.max_size("C"), self.max_size(str(self._decoder_tokens().shape[1])))

    def generate(self, prompts: Any, **keywords: Any) -> Any:
        """What comes after the prompts: text for text, ids for ids, a list for a list.

        Keywords have the names and the meaning of transformers' GenerationConfig: ``max_new_tokens``,
        ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty``, ``num_beams``,
        ``length_penalty``, ``early_stopping``, ``stop_strings``, ``num_return_sequences`` and more
        (``transom.runtime.generation.GenerationConfig``); ``seed`` makes sampling repeatable. What is left
        out is as the checkpoint's generation_config.json says. With ``num_return_sequences`` above 1 each
        prompt gets a list.

        Prompts of different lengths may be in one call; each gets the tokens it would get alone. Raises
        InputError, before the first step, for keywords that contradict each other, ids outside the
        vocabulary, an empty prompt, and a prompt that with the new tokens is longer than the context.
        """
        asked = self._prompts(prompts)
        settings = self._settings(keywords, asked)
        each = settings.rows(1)
        if each > self.max_size("B"):
            raise InputError(
                f"num_beams or num_return_sequences asks for {each} rows; this bundle allows {self.max_size('B')}. "
                f"{self.wider(B=each)}."
            )
        size = self.max_size("B") // each
        answers: list[Any] = []
        for first in range(0, len(asked.given), size):
            prefilled = self.prefill(self._ids(asked, first, first + size))
            found = generate(
                prefilled.starts,
                prefilled.logits,
                prefilled.decoder,
                settings,
                decode=self._decode_all if self._text else None,
                positions=self.context,
                first=first,
            )
            answers += [self.target_tokenizer().decode(row) for row in found] if asked.text else found
        return in_kind(answers, single=asked.single, each=settings.num_return_sequences)

    def stream(self, prompt: Any, **keywords: Any) -> Stream:
        """``generate`` for one prompt, piece by piece as it is made: whole characters, or ids where ids were given.

        The pieces joined are what ``generate`` returns. The call itself checks everything; leaving the
        loop early frees the cache.
        """
        asked = self._prompts(prompt)
        if not asked.single:
            raise InputError(f"stream takes one prompt, received a list of {len(asked.given)}; call it once for each.")
        settings = self._settings(keywords, asked, streaming=True)
        tokens = self._tokens(self._ids(asked, 0, 1), settings)
        return Stream(self._pieces(tokens) if asked.text else tokens)

    def _tokens(self, rows: list[Row], settings: GenerationConfig) -> Pieces[int]:
        prefilled = self.prefill(rows)
        yield from stream(
            prefilled.starts[0],
            prefilled.logits,
            prefilled.decoder,
            settings,
            decode=self._decode_all if self._text else None,
            positions=self.context,
        )

    def _pieces(self, tokens: Iterator[int]) -> Pieces[str]:
        text = self.target_tokenizer().detokenizer()
        for token in tokens:
            piece = text.add(token)
            if piece:
                yield piece
        rest = text.end()
        if rest:
            yield rest

    @abstractmethod
    def prefill(self, rows: Sequence[Row]) -> PrefillResult:
        """Read a batch of prompts, ids of different lengths."""

    def new_decoder(self, rows: int, encoder_outputs: Mapping[str, Array] | None = None) -> Decoder:
        """An empty cache for ``rows`` rows, within this bundle's bounds; ``encoder_outputs`` as in Decoder."""
        return Decoder(self.backend("decoder"), rows, self.context, encoder_outputs, most_logits=self.max_size("P"))

    @abstractmethod
    def decoder_length(self, row: Sequence[int]) -> int:
        """Tokens that a prompt takes of the decoder's context."""

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of prompts; InputError where the checkpoint had none."""
        if self._text is None:
            raise InputError("this bundle has no tokenizer, since its checkpoint had none; give and take token ids.")
        return self._text

    def target_tokenizer(self) -> TextTokenizer:
        """The tokenizer of what is generated."""
        return self.tokenizer()

    def open_tokenizer(self, words: Any) -> TextTokenizer | None:
        """The tokenizer that an object of bundle.json describes."""
        if words is None:
            return None
        # Of any length: scores read windows, and prompts are checked where prompts of ids are
        spec = replace(TokenizerSpec.from_json(words), max_length=sys.maxsize)
        return TextTokenizer(self._bundle.read(spec.file), spec, max_tokens=sys.maxsize)

    def _prompts(self, prompts: Any) -> Prompts:
        """Check the prompts and measure them; InputError for anything but texts or ids.

        They become ids batch by batch (``_ids``): those of all of a long list would be many times what it holds.
        """
        given = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
        if not isinstance(given, str | list | tuple):
            raise InputError(f"prompts is a {type(given).__name__}; expected a str, a list of ids, or a list of those.")
        single = isinstance(given, str) or not any(isinstance(part, str | list | tuple | np.ndarray) for part in given)
        batch = [given] if single else list(given)
        if not batch or not all(len(prompt) if isinstance(prompt, str | list | tuple) else 1 for prompt in batch):
            raise InputError("a prompt is empty; expected at least one token. Begin with the token a text begins with.")
        kinds = {isinstance(prompt, str) for prompt in batch}
        if len(kinds) == 2:
            raise InputError("prompts holds both texts and ids; give one kind in one call.")
        lengths = [len(self._row(prompt, place)) for place, prompt in enumerate(batch)]
        return Prompts(single, kinds == {True}, batch, lengths)

    def _ids(self, prompts: Prompts, start: int, stop: int) -> list[Row]:
        """The prompts from ``start`` on, ``stop`` excluded, as ids."""
        return [self._row(prompt, start + index) for index, prompt in enumerate(prompts.given[start:stop])]

    def _row(self, prompt: Any, place: int) -> Row:
        """A prompt as ids; a text's are checked too: added tokens may lie past the model's."""
        if isinstance(prompt, str):
            return self._checked(self.tokenizer().row(prompt, truncate=False, name=f"text {place}").ids)
        return self._checked(prompt)

    def _checked(self, prompt: Any) -> Row:
        """One prompt of ids."""
        ids = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        below = self.vocabulary
        if not isinstance(ids, list | tuple):
            raise InputError(f"a prompt is a {type(ids).__name__}; expected a str or a list of ids.")
        wrong = [token for token in ids if isinstance(token, bool) or not isinstance(token, int | np.integer)]
        if wrong:
            raise InputError(f"a prompt of ids holds {str(wrong[0])[:40]!r}; expected integers.")
        outside = [token for token in ids if not 0 <= token < below]
        if outside:
            raise InputError(
                f"a prompt holds the id {outside[0]}; expected 0..{below - 1}. Is this the tokenizer of this model?"
            )
        return [int(token) for token in ids]

    def _settings(self, keywords: dict[str, Any], prompts: Prompts, *, streaming: bool = False) -> GenerationConfig:
        """Keywords over the checkpoint's own settings, checked against this bundle and these prompts."""
        settings = self._defaults.with_keywords(**keywords)
        settings.check(
            int(self.backend("decoder").graph.outputs[0].shape[2]), text=self._text is not None, streaming=streaming
        )
        axis = str(self.prompt_tokens().shape[1])
        alone = len(prompts.lengths) == 1
        for index, tokens in enumerate(prompts.lengths):
            length = self.decoder_length(range(tokens))
            if length < tokens > self.max_size(axis):  # a source, which the context does not bound
                which = "a source" if alone else f"source {index}"
                raise InputError(
                    f"{which} is {tokens} tokens; axis {axis} allows {self.max_size(axis)}. Shorten it, or "
                    f"{self._longer(tokens, axis)}."
                )
            new = settings.new_tokens(length, self.context)
            if length + new > self.context:
                which = "a prompt" if alone else f"prompt {index}"
                room = f" Ask for max_new_tokens={self.context - length} at most," if length < self.context else ""
                axes = "C", str(self._decoder_tokens().shape[1])
                raise InputError(
                    f"{which} of {length} tokens and {new} new ones make {length + new}; the context holds "
                    f"{self.context}.{room or ' Shorten the prompt,'} or {self._longer(length + new, *axes)}."
                )
        return settings

    def _longer(self, tokens: int, *axes: str) -> str:
        """What makes room for ``tokens``: other bounds of the axes, or a model that has seen as many positions."""
        graph = self.backend("decoder").graph
        positions = next(tensor.exclusive_max for tensor in graph.inputs if tensor.name == WRITE_INDICES)
        if positions is None or tokens > positions:
            return "export a model with a longer context"
        words = self.wider(**{axis: tokens for axis in dict.fromkeys(axes) if self.max_size(axis) < tokens})
        return lowered(words)

    def _decoder_tokens(self) -> Tensor:
        return self.backend("decoder").graph.inputs[0]

    def prompt_tokens(self) -> Tensor:
        """The graph input that prompts go to."""
        return self._decoder_tokens()

    def _decode_all(self, ids: Sequence[int]) -> str:
        """With special tokens: a stop string may be one."""
        return self.target_tokenizer().decode(ids, skip_special_tokens=False)


def in_kind(answers: list[Any], *, single: bool, each: int) -> Any:
    """``each`` answers per prompt: lists of them where there are several, the first where the prompt was single."""
    grouped = answers if each == 1 else [answers[i : i + each] for i in range(0, len(answers), each)]
    return grouped[0] if single else grouped


def padded(rows: Sequence[Row], length: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows filled up on the right: int64 (R, S), and their lengths (R,). S is ``length``, or that of the longest.

    With a row's own last token: what is computed for padding is masked, but NaN and infinity pass
    through every mask, and a row must not get them from a token that it does not hold.
    """
    lengths = np.array([len(row) for row in rows])
    size = int(lengths.max()) if length is None else length
    return np.array([[*row, *row[-1:] * (size - len(row))] for row in rows], np.int64), lengths
