"""Generation: from the logits of a decoder to rows of tokens, meaning what transformers' keywords mean."""

from __future__ import annotations

from transom.runtime.generate.calls import generate, stream
from transom.runtime.generate.rows import Continuation
from transom.runtime.generate.settings import GenerationSettings
from transom.runtime.generate.stopping import Decode

__all__ = ["Continuation", "Decode", "GenerationSettings", "generate", "stream"]
