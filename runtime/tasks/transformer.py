"""Tasks of the encoder-decoder Transformer: texts are translated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from transom.runtime.feeds import LOGITS_POSITIONS, WRITE_INDICES
from transom.runtime.tasks.encoder_decoder import EncoderDecoder
from transom.runtime.tasks.generator import PrefillResult
from transom.runtime.tasks.generator_task import ask_generator, generated_lines, prompt_of
from transom.runtime.tasks.prompts import Row, padded
from transom.runtime.tasks.task import FamilyTasks, Task
from transom.runtime.text.batch import row_length

if TYPE_CHECKING:
    from transom.runtime.graph_spec import Tensor


class Transformer(EncoderDecoder):
    """A loaded encoder-decoder: ``translate``; ``generate`` and ``stream`` take source ids as well."""

    GRAPHS: ClassVar = {
        "encoder": ("input_ids", "attention_mask"),
        "decoder": ("decoder_input_ids", "attention_mask", WRITE_INDICES, LOGITS_POSITIONS),
    }

    def translate(self, texts: str | Sequence[str], **keywords: Any) -> Any:
        """Translate texts: the target text of each; a str for a str, a list for a list.

        Keywords are those of ``generate``: ``num_beams``, ``max_new_tokens``, ...
        """
        self.tokenizer()  # texts need one
        return self.generate(texts, **keywords)

    def prefill(self, prompts: Sequence[Row]) -> PrefillResult:
        ids, lengths = padded(prompts, row_length(max(map(len, prompts)), self.max_size("S")))
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        return self.prefill_masked(ids, mask)

    def prefill_masked(self, ids: Any, mask: Any) -> PrefillResult:
        """Encode ``ids`` and ``mask``, int64 (R, S), and prefill a decoder with the start token."""
        R, S = ids.shape
        return self.prefill_encoded({"input_ids": ids, "attention_mask": mask}, {"B": R, "S": S})

    def prompt_tokens(self) -> Tensor:
        return self.backend("encoder").graph.inputs[0]


FAMILY = FamilyTasks(
    Transformer,
    {"translation": Task(ask_generator, generated_lines, generates=True, prompt=prompt_of, example="'3 May 1921'")},
)
