"""Open an untrusted tokenizer.json of the tokenizers library, and read its decoder and special tokens."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from transom.runtime.errors import BundleError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_GROWTH = 256  # of real ones the largest is about 6: a space becomes U+2581, then bytes as characters
SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")  # where a Sequence keeps its steps
TEMPLATES = ("single", "pair")
PROBE = "A 1 \u00e9 \u4e2d \u2603 \ufffd"  # letters, digits, accents, CJK and what no vocabulary has


def parse_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """Open a tokenizer.json without its stored truncation and padding, and try it on a line of text.

    Raises BundleError when the file is damaged, or its parts do not fit together.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        check_growth(tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if tokenizer.post_processor is None:
            tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
        tokenizer.encode(PROBE, PROBE)
        tokenizer.decode(tokenizer.encode(PROBE).ids)
    except BundleError:
        raise
    except BaseException as error:
        raise_unless_tokenizers(error)
        raise BundleError(
            f"the tokenizer cannot be used ({one_line(error)}). Copy or export the bundle again."
        ) from None
    return tokenizer


def check_growth(tokenizer: Tokenizer) -> None:
    """Raise BundleError where the steps could make a text so much longer that it fills the memory."""
    for parts in (
        (tokenizer.normalizer, tokenizer.pre_tokenizer),
        (tokenizer.post_processor,),
        (tokenizer.decoder,),
    ):
        factor = math.prod(growth(json.loads(part.__getstate__())) for part in parts if part is not None)
        if factor > MAX_GROWTH:
            raise BundleError(
                f"the tokenizer makes a text up to {factor:.3g} times as long, expected {MAX_GROWTH} at most. Export "
                "the bundle again."
            )


def growth(step: Any) -> int:
    """Estimate how many times as long a step of tokenizer.json may make its input."""
    if not isinstance(step, dict):
        return 1
    kind = step.get("type")
    if kind == "Sequence":
        inner: list[Any] = next((step[name] for name in SEQUENCES if name in step), [])
        return math.prod(map(growth, inner))
    if kind == "TemplateProcessing":
        counts = [Counter(piece["Sequence"]["id"] for piece in step[name] if "Sequence" in piece) for name in TEMPLATES]
        return max(1, *(count for counted in counts for count in counted.values()), 1)
    text = step.get("content") if kind == "Replace" else step.get("prepend") if kind == "Prepend" else ""
    return 2 if kind == "ByteLevel" else max(1, len(str(text).encode(errors="replace")))


def raise_unless_tokenizers(error: BaseException) -> None:
    """Re-raise what is no error of the library, as Ctrl-C: its errors are Exception, its Rust panics BaseException."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the decoder's steps as in tokenizer.json, [{"type": "ByteLevel", ...}, ...]; [{}] without a decoder."""
    stored = {} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = stored["decoders"] if stored.get("type") == "Sequence" else [stored]
    return steps


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of the tokens that decoded text leaves out."""
    return frozenset(number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)
