"""The generation config: the fields of transformers' GenerationConfig that this runtime follows.

The source followed is transformers 5.23: GenerationConfig, and in GenerationMixin
``_prepare_generation_config``, ``_prepare_generated_length`` and ``_validate_generated_length``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transom.runtime.errors import InputError
from transom.runtime.generation.field_specs import FIELD_SPECS
from transom.runtime.json_reader import Fields

DEFAULT_NEW_TOKENS = 20  # transformers' max_length where none is set: counted from the prompt's end


@dataclass(frozen=True)
class GenerationConfig:
    """The object ``generation`` of bundle.json, or that with a call's keywords on top.

    The fields are transformers' keywords, with its defaults where a checkpoint says nothing. A value
    that switches a step off is stored as its neutral number: ``top_k`` 0, ``top_p`` and ``temperature``
    1.0. ``max_length`` None is the default of 20 new tokens. Without ``eos_token_id`` nothing but the
    length and ``stop_strings`` ends a sequence. ``early_stopping`` is False, True or "never".

    ``seed`` belongs to a call and is never stored; nor are ``keywords``, the names that the caller gave.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    renormalize_logits: bool = False
    stop_strings: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    seed: int | None = None
    keywords: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def from_json(cls, obj: object) -> GenerationConfig:
        """Read and check the JSON object; BundleError lists everything that is wrong with it."""
        taken = Fields(obj, "generation")
        values = {}
        for name, spec in FIELD_SPECS.items():
            value = taken.take(name, spec.accepts_json, spec.expected, default=None)
            if value is not None:
                values[name] = spec.parse(value)
        taken.done()
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return what differs from the defaults, as JSON that ``from_json`` reads back to an equal value."""
        stored = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in FIELD_SPECS and value != entry.default:
                stored[entry.name] = _json(value)
        return stored

    @property
    def start_token(self) -> int | None:
        """The first token of an encoder-decoder's decoder."""
        return self.bos_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id

    @property
    def candidates(self) -> int:
        """Continuations of a prompt that beam search scores in a step: enough to go on after every EOS."""
        return max(2, 1 + len(self.eos_token_id)) * self.num_beams

    def rows(self, prompts: int) -> int:
        """Return the most rows that generation from ``prompts`` prompts keeps at once."""
        return prompts * max(self.num_beams, self.num_return_sequences)

    def new_tokens(self, prompt_length: int, positions: int | None = None) -> int:
        """Return the most tokens that may follow a prompt of ``prompt_length`` tokens; all but the last are fed back.

        In an encoder-decoder the prompt is the decoder's, one token as a rule. ``positions`` is how many
        the context holds: the checkpoint's own length, and the default of 20 new tokens, stop there. Raises
        InputError when no token may follow, or fewer than the keywords' minimum.
        """
        if self.max_new_tokens is not None:
            most = self.max_new_tokens
        elif self.max_length is not None:
            most = self.max_length - prompt_length
        else:
            most = DEFAULT_NEW_TOKENS
        if most < 1:
            raise InputError(
                f"the prompt is {prompt_length} tokens, but max_length is {self.max_length}: no room for a new one. "
                "Pass max_new_tokens, or shorten the prompt."
            )
        if positions is not None and not self.keywords & {"max_new_tokens", "max_length"}:
            most = min(most, positions - prompt_length)
        if most < 1:
            raise InputError(
                f"the prompt is {prompt_length} tokens, but the context holds {positions}: no room for a new one. "
                "Shorten the prompt."
            )
        least = self.shortest(prompt_length) - prompt_length
        if least > most and self.keywords & {"min_new_tokens", "min_length"}:
            raise InputError(
                f"at least {least} new tokens are asked for after a prompt of {prompt_length}, at most {most}. "
                "Lower min_new_tokens or min_length, or raise max_new_tokens."
            )
        return most

    def shortest(self, prompt_length: int) -> int:
        """Return the length, prompt included, before which no end-of-sequence token is chosen."""
        return self.min_length if self.min_new_tokens is None else prompt_length + self.min_new_tokens


def _json(value: Any) -> Any:
    return [_json(item) for item in value] if isinstance(value, tuple) else value
