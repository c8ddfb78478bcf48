"""Tasks of Perceiver: labels of images or of texts, gaps of single bytes, and the latents themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from transom.runtime.tasks import bert, vit
from transom.runtime.tasks.bert import TextHeads, ask_fill_mask
from transom.runtime.tasks.postprocess import Ranked, as_list, best
from transom.runtime.tasks.task import FamilyTasks, Result, Task, each, ranked_lines, subject
from transom.runtime.tasks.vit import ViT
from transom.runtime.text.detokenizer import byte_of_character

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource
    from transom.runtime.text.tokenizer import TextTokenizer

Floats = NDArray[np.float32]
FIRST_OF_MANY = 0x80  # bytes from here on are characters only together


class PerceiverOfImages(ViT):
    """A loaded Perceiver that classifies images: paths, bytes, PIL images or uint8 arrays (height, width, 3).

    Every method takes one image, or a list of them: a list gets a list.
    """

    def features(self, images: ImageSource | Sequence[ImageSource]) -> Floats:
        """Return the latents behind the last layer: float32 (latents, width) for one image, (N, ...) for a list."""
        single, batch = as_list(images)
        rows = self.image_rows(batch, "last_hidden_state")
        return cast(Floats, rows[0] if single else rows)


class PerceiverOfBytes(TextHeads):
    """A loaded Perceiver that reads texts byte by byte. Methods take one text or a list of them: a list gets a list."""

    def features(self, texts: str | Sequence[str], *, truncate: bool = False) -> Floats:
        """Return the latents behind the last layer: float32 (latents, width) for one text, (N, ...) for a list."""
        single, batch = as_list(texts)
        rows = self.text_rows(batch, "last_hidden_state", truncate=truncate)
        return cast(Floats, rows[0] if single else rows)

    def _words(self, probabilities: Floats, top_k: int) -> Ranked:
        """Return the ``top_k`` most probable bytes of (V,), as ``byte_text`` has them."""
        tokenizer = self.tokenizer()
        return [(byte_text(tokenizer, token), float(probabilities[token])) for token in best(probabilities, top_k)]


def byte_text(tokenizer: TextTokenizer, token: int) -> str:
    """Return the text of a token: of a byte that is part of a character beyond ASCII its number, ``<0xE2>``."""
    byte = byte_of_character().get(tokenizer.token(token) or "")
    if byte is not None and byte >= FIRST_OF_MANY:
        return f"<0x{byte:02X}>"
    return tokenizer.decode([token], skip_special_tokens=False)


def byte_lines(result: Result) -> Iterator[str]:
    """Yield the text and the bytes of each gap; what prints as nothing, like a space, in quotes."""
    yield subject(result)
    for number, tokens in enumerate(result["masks"], start=1):
        if len(result["masks"]) > 1:
            yield f"  mask {number}"
        shown = [{**token, "token": visible(token["token"])} for token in tokens]
        yield from ranked_lines("token", shown)


def visible(text: str) -> str:
    """Return the text, or its repr where it would print as nothing or break the line."""
    return text if text.isprintable() and text.strip() else repr(text)


FAMILY = FamilyTasks(
    PerceiverOfBytes,
    {
        "image-classification": vit.FAMILY.tasks["image-classification"],
        "fill-mask": Task(ask_fill_mask, each(byte_lines), ranks=True, example="'one byte is missi[MASK]g here'"),
        "text-classification": bert.FAMILY.tasks["text-classification"],
    },
    by_task={"image-classification": PerceiverOfImages},
)
