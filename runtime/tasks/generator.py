"""Base class of bundles that generate: texts, ids or images in, batches of rows, tokens or text out."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Generator as Pieces
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.decoder import Decoder, context_length
from transom.runtime.errors import BundleError, InputError
from transom.runtime.feeds import WRITE_INDICES, exported
from transom.runtime.generation import GenerationConfig, check_for_model, generate, stream, with_keywords
from transom.runtime.graph_spec import CACHE
from transom.runtime.process_bound import ProcessBound
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.batches import batches
from transom.runtime.tasks.prompts import Prompt, PromptReader, Prompts, Reader, Row
from transom.runtime.text.tokenizer import TextTokenizer, lowered
from transom.runtime.text.tokenizer_spec import TokenizerSpec

if TYPE_CHECKING:
    from transom.runtime.backends.base import Array
    from transom.runtime.graph_spec import Tensor

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PrefillResult:
    """A prefilled batch: its decoder, each row's first ids, and the logits (R, V) of the next token."""

    decoder: Decoder
    starts: list[Row]
    logits: Floats


class Stream(ProcessBound, Iterator[Any]):
    """The pieces of one generation, each made when it is asked for; ``close`` frees the cache early."""

    def __init__(self, pieces: Pieces[Any]) -> None:
        self._pieces = pieces

    def __next__(self) -> Any:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()


class Generator(LoadedBundle, ABC):
    """A loaded bundle with a decoder. A family defines ``prefill`` and ``decoder_length``.

    Prompts are texts, or token ids: one (``"..."``, ``[1, 2, 3]``) or a list of them. Results are of the
    same kind, and hold the new tokens alone. Where prompts are images, their answers are texts.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._defaults = GenerationConfig.from_json(self.manifest.generation or {})
        self._writes_text = bool(self.manifest.tokenizer or self.manifest.target_tokenizer)
        self._prompt_reader = self.open_prompt_reader()
        self.context = context_length(self.backend("decoder").graph, self.axes, self.manifest.options)

    def open_prompt_reader(self) -> Reader:
        """Return the reader of prompts: of texts and ids, where the family has no other."""
        below = self.prompt_tokens().exclusive_max
        if below is None:
            raise BundleError("bundle.json: the input that takes prompts is not bounded (below); export it again.")
        return PromptReader(below, self.open_tokenizer(self.manifest.tokenizer))

    def _token_reader(self) -> PromptReader:
        if not isinstance(self._prompt_reader, PromptReader):
            raise InputError(f"a {self.manifest.family} reads images and has no tokens of prompts; give images.")
        return self._prompt_reader

    @property
    def vocabulary(self) -> int:
        """The number of different tokens that prompts may hold."""
        return self._token_reader().vocabulary

    def generate(self, prompts: Any, **keywords: Any) -> Any:
        """Continue the prompts: text for text, ids for ids, a list for a list.

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
        read = self._prompt_reader.read(prompts)
        config = self._config(keywords, read)
        each = config.num_return_sequences
        answers: list[Any] = [None] * (len(read.given) * each)
        for batch in batches(read.lengths, self.prompts_at_once(config)):  # a row is padded to the longest beside it
            places = batch.tolist()
            found = self._generated(self._prompt_reader.rows(read, places), config, places, text=read.text)
            for index, place in enumerate(places):
                answers[place * each : (place + 1) * each] = found[index * each : (index + 1) * each]
        return in_kind(answers, single=read.single, each=each)

    def prompts_at_once(self, config: GenerationConfig) -> int:
        """Return how many prompts the bundle takes in one batch; InputError where one has too many rows."""
        each = config.rows(1)
        if each > self.max_size("B"):
            raise InputError(
                f"num_beams or num_return_sequences asks for {each} rows; this bundle allows {self.max_size('B')}. "
                f"{self.wider(B=each)}."
            )
        return self.max_size("B") // each

    def _generated(
        self, prompts: Sequence[Prompt], config: GenerationConfig, numbers: Sequence[int], *, text: bool
    ) -> list[Any]:
        """Return ids, or with ``text`` texts, for a batch of prompts of these ``numbers`` in the whole list."""
        found = self.continued(self.prefill(prompts), config, numbers)
        return [self.target_tokenizer().decode(row) for row in found] if text else list(found)

    def continued(
        self, prefilled: PrefillResult, config: GenerationConfig, numbers: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Return the new ids of a prefilled batch, as ``generation.generate`` does."""
        prefilled.decoder.reuse_logits()
        return generate(
            prefilled.starts,
            prefilled.logits,
            prefilled.decoder,
            config,
            decode=self._decode_all if self._writes_text else None,
            positions=self.context,
            numbers=numbers,
        )

    def stream(self, prompt: Any, **keywords: Any) -> Stream:
        """Yield what ``generate`` returns for one prompt, piece by piece: whole characters, or ids for ids.

        The pieces joined are what ``generate`` returns. The call itself checks everything; leaving the
        loop early frees the cache.
        """
        read = self._prompt_reader.read(prompt)
        if not read.single:
            raise InputError(f"stream takes one prompt, received a list of {len(read.given)}; call it once for each.")
        config = self._config(keywords, read, streaming=True)
        tokens = self._tokens(self._prompt_reader.rows(read, [0]), config)
        return Stream(self._pieces(tokens) if read.text else tokens)

    def _tokens(self, rows: Sequence[Prompt], config: GenerationConfig) -> Pieces[int]:
        prefilled = self.prefill(rows)
        prefilled.decoder.reuse_logits()
        yield from stream(
            prefilled.starts[0],
            prefilled.logits,
            prefilled.decoder,
            config,
            decode=self._decode_all if self._writes_text else None,
            positions=self.context,
        )

    def _pieces(self, tokens: Iterator[int]) -> Pieces[str]:
        detokenizer = self.target_tokenizer().detokenizer()
        for token in tokens:
            piece = detokenizer.add(token)
            if piece:
                yield piece
        rest = detokenizer.end()
        if rest:
            yield rest

    @abstractmethod
    def prefill(self, prompts: Sequence[Prompt]) -> PrefillResult:
        """Prefill a decoder with a batch of prompts: ids of different lengths, or pixels."""

    def new_decoder(self, rows: int, encoder_outputs: Mapping[str, Array] | None = None) -> Decoder:
        """Return a decoder with an empty cache for ``rows`` rows, within this bundle's bounds."""
        most = self.max_size("P") if "P" in self.axes else None
        return Decoder(self.backend("decoder"), rows, self.context, encoder_outputs, most_logits=most)

    @abstractmethod
    def decoder_length(self, prompt: Sequence[Any]) -> int:
        """Return how many tokens of the decoder's context a prompt takes."""

    def tokenizer(self) -> TextTokenizer:
        """Return the tokenizer of prompts; InputError where the checkpoint had none."""
        return self._token_reader().tokenizer()

    def target_tokenizer(self) -> TextTokenizer:
        """Return the tokenizer of generated tokens."""
        return self.tokenizer()

    def open_tokenizer(self, stored: Any) -> TextTokenizer | None:
        """Open the tokenizer that an object of bundle.json describes; None for None."""
        if stored is None:
            return None
        # Of any length: ``score`` reads windows, and prompts are checked like those of ids
        spec = replace(TokenizerSpec.from_json(stored), max_length=sys.maxsize)
        return self._bundle.open_tokenizer(spec, sys.maxsize)

    def _config(self, keywords: dict[str, Any], prompts: Prompts, *, streaming: bool = False) -> GenerationConfig:
        """Return the checkpoint's generation config with the keywords on top, checked for this bundle and prompts."""
        config = with_keywords(self._defaults, **keywords)
        vocabulary = int(self.backend("decoder").graph.outputs[0].shape[2])
        check_for_model(config, vocabulary, text=self._writes_text, streaming=streaming)
        axis = self.prompt_axis()
        alone = len(prompts.lengths) == 1
        for index, tokens in enumerate(prompts.lengths):
            length = self.decoder_length(range(tokens))
            if axis is not None and length < tokens > self.max_size(axis):  # a source, which the context does not bound
                which = "a source" if alone else f"source {index}"
                raise InputError(
                    f"{which} is {tokens} tokens; axis {axis} allows {self.max_size(axis)}. Shorten it, or "
                    f"{self._longer(tokens, axis)}."
                )
            new = config.new_tokens(length, self.context)
            if length + new > self.context:
                which = "a prompt" if alone else f"prompt {index}"
                room = f" Ask for max_new_tokens={self.context - length} at most," if length < self.context else ""
                raise InputError(
                    f"{which} of {length} tokens and {new} new ones make {length + new}; the context holds "
                    f"{self.context}.{room or ' Shorten the prompt,'} or {self.longer(length + new)}."
                )
        return config

    def longer(self, tokens: int) -> str:
        """Return advice that makes room for ``tokens`` in the context: ``export again with --max C=512``."""
        return self._longer(tokens, CACHE, str(self._decoder_tokens().shape[1]))

    def _longer(self, tokens: int, *axes: str) -> str:
        """Return advice that makes room for ``tokens``: other bounds of the axes, or a model with as many positions.

        A cache's axis is absent where the state is recurrent: what such a model writes is bounded by its config alone.
        """
        graph = self.backend("decoder").graph
        positions = [tensor.exclusive_max for tensor in graph.inputs if tensor.name == WRITE_INDICES]
        positions = positions or [exported(self.axes[axis]).ceiling for axis in axes if axis in self.axes]
        if positions[0] is None or tokens > positions[0]:
            return "export a model with a longer context"
        words = self.wider(**{axis: tokens for axis in dict.fromkeys(axes) if self.max_size(axis) < tokens})
        return lowered(words)

    def _decoder_tokens(self) -> Tensor:
        return self.backend("decoder").graph.inputs[0]

    def prompt_tokens(self) -> Tensor:
        """Return the graph input that takes prompts."""
        return self._decoder_tokens()

    def prompt_axis(self) -> str | None:
        """Return the axis of a prompt's tokens; None where prompts are images."""
        return str(self.prompt_tokens().shape[1])

    def prefill_call(self, prompts: Sequence[Prompt]) -> Callable[[], PrefillResult]:
        """Return ``prefill`` of these prompts as a call, which a benchmark times; what comes before it is done here."""
        return partial(self.prefill, prompts)

    def random_prompts(self, rng: np.random.Generator, rows: int, length: int, images: int = 0) -> list[Prompt]:
        """Make prompts of random tokens, ``rows`` of ``length`` each, for a benchmark.

        ``images`` of the tokens stand for random images where the family reads images among its text.
        """
        ids: list[Prompt] = rng.integers(0, self.prompt_tokens().exclusive_max or 1, (rows, length)).tolist()
        return ids

    def _decode_all(self, ids: Sequence[int]) -> str:
        """Decode with special tokens: a stop string may be one."""
        return self.target_tokenizer().decode(ids, skip_special_tokens=False)


def in_kind(answers: list[Any], *, single: bool, each: int) -> Any:
    """Group ``each`` answers per prompt: a list where there are several; of a single prompt its own alone."""
    grouped = answers if each == 1 else [answers[i : i + each] for i in range(0, len(answers), each)]
    return grouped[0] if single else grouped
