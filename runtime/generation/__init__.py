"""Generation: from the logits of a decoder to rows of tokens, meaning what transformers' keywords mean."""

from __future__ import annotations

from transom.runtime.generation.calls import generate, stream
from transom.runtime.generation.config import GenerationSettings
from transom.runtime.generation.sequences import Continuation
from transom.runtime.generation.stopping import Decode

__all__ = ["Continuation", "Decode", "GenerationSettings", "generate", "stream"]
