"""Keep a dialogue about images: its text and its images stay in the decoder's caches from question to question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from transom.runtime.errors import BackendError, InputError
from transom.runtime.process_bound import ProcessBound
from transom.runtime.tasks.generator import PrefillResult
from transom.runtime.tasks.prompts import Prompts, Row

if TYPE_CHECKING:
    from types import TracebackType

    from transom.runtime.generation import GenerationConfig
    from transom.runtime.interleaved_decoder import InterleavedDecoder
    from transom.runtime.tasks.interleaved_prompts import MarkedPrompt


class Dialogue(ProcessBound):
    """Questions about images, one after the other, each answered as if the dialogue so far were its prompt's beginning.

    Nothing is read twice but the last answer: a question without an image runs no encoder, one with a new image runs it
    once. Use a dialogue in a ``with``, or call ``close``, which frees its caches. It belongs to one thread at a time;
    the bundle may be shared.
    """

    def __init__(self, bundle: Any) -> None:
        self._bundle = bundle  # a Flamingo
        self._decoder: InterleavedDecoder | None = bundle.new_decoder(1)
        self._ids: Row = []  # all that was said
        self._read = self._images = 0  # tokens and images that the decoder has read

    def answer(self, prompt: Any, *, images: Any = None, **keywords: Any) -> str:
        """Answer the next question: a text, or parts that end in it, with examples and images as ``Flamingo.answer``.

        Keywords are those of ``Flamingo.answer``. Raises what it raises for one prompt, and InputError where the
        dialogue with its new tokens is longer than the context, or has more images than the bundle allows. After an
        error or an interruption the dialogue is as it was before the question.
        """
        decoder = self._opened()
        asked = self._asked(prompt, images)
        ids = [*self._ids, *asked.ids]
        config = self._config({"num_return_sequences": 1, **keywords}, asked.ids, len(ids))
        pixels = self._bundle.reader().open(asked).pixels
        try:
            self._bundle.append_images(decoder, [pixels])
            logits = decoder.prefill(np.array([ids[self._read :]]))
            (new,) = self._bundle.continued(PrefillResult(decoder, [ids], logits), config)
        except BaseException:
            decoder.rewind(self._read, self._images)
            raise
        self._read, self._images = len(ids), self._images + len(pixels)
        decoder.rewind(self._read, self._images)  # beams may have ended elsewhere: the answer is read with what follows
        self._ids = [*ids, *(token for token in new if token not in config.eos_token_id)]
        answer: str = self._bundle.answer_text(new)
        return answer

    def _asked(self, prompt: Any, images: Any) -> MarkedPrompt:
        """Return the tokens and images of the next question, behind the separator where something was said."""
        bundle, reader = self._bundle, self._bundle.reader()
        single, (given, *_) = reader.batch(reader.placed(prompt, images))
        if not single:
            raise InputError("a dialogue takes one question at a time, received a list of prompts; ask one by one.")
        parts = bundle.question_parts(given)
        if not self._ids:
            first: MarkedPrompt = reader.read_batch(True, [parts]).given[0]
            return first
        asked: MarkedPrompt = reader.continuing([bundle.templates.separator, *parts])
        total = self._images + len(asked.images)
        if total > reader.most:
            raise InputError(
                f"the dialogue has {self._images} images and this question {len(asked.images)} more; the cache holds "
                f"{reader.most}. Begin another with dialogue(), or {reader.advice(total)}."
            )
        return asked

    def _config(self, keywords: dict[str, Any], ids: Row, length: int) -> GenerationConfig:
        """Return the generation config of a question of ``ids`` that makes the dialogue ``length`` tokens long."""
        config: GenerationConfig = self._bundle._config(keywords, Prompts(True, True, [ids], [len(ids)]))
        if config.num_return_sequences != 1:
            raise InputError(
                f"num_return_sequences is {config.num_return_sequences}, but a dialogue goes on from one answer. Leave "
                "it out."
            )
        self._bundle.prompts_at_once(config)
        context = self._bundle.context
        new = config.new_tokens(length, context) if length < context else 1
        if length + new > context:
            raise InputError(
                f"the dialogue is {length} tokens with this question, and {new} new ones make {length + new}; the "
                f"context holds {context}. Begin another with dialogue(), or {self._bundle.longer(length + new)}."
            )
        return config

    def _opened(self) -> InterleavedDecoder:
        self._bundle.backend("decoder")  # BackendError where the bundle is closed
        if self._decoder is None:
            raise BackendError("this dialogue is closed; begin another with dialogue().")
        return self._decoder

    def close(self) -> None:
        """Free the caches. Closing twice is fine."""
        self._decoder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
