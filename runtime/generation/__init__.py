"""Generation: from a decoder's logits to sequences of tokens, with the names and meaning of transformers' keywords."""

from __future__ import annotations

from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.sequences import DecoderProtocol
from transom.runtime.generation.stopping_criteria import Decode
from transom.runtime.generation.strategy import generate, stream
from transom.runtime.generation.validation import check_for_model, with_keywords

__all__ = ["Decode", "DecoderProtocol", "GenerationConfig", "check_for_model", "generate", "stream", "with_keywords"]
