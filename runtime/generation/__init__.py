"""Generation: from the logits of a decoder to rows of tokens, meaning what transformers' keywords mean."""

from __future__ import annotations

from transom.runtime.generation.calls import generate, stream
from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.sequences import DecoderProtocol
from transom.runtime.generation.stopping import Decode

__all__ = ["Decode", "DecoderProtocol", "GenerationConfig", "generate", "stream"]
