"""Tasks of the encoder-decoder Transformer: the encoder runs once, then the decoder token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from transom.runtime.errors import BundleError
from transom.runtime.feeds import LOGITS_POSITIONS, WRITE_INDICES
from transom.runtime.graph_spec import shape_of
from transom.runtime.tasks.generator import Generator, PrefillResult
from transom.runtime.tasks.generator_task import ask_generator, generated_lines
from transom.runtime.tasks.prompts import Row, padded
from transom.runtime.tasks.task import FamilyTasks, Task
from transom.runtime.text.batch import row_length

if TYPE_CHECKING:
    from transom.runtime.graph_spec import Tensor
    from transom.runtime.text.tokenizer import TextTokenizer


class Transformer(Generator):
    """A loaded encoder-decoder: ``translate``; ``generate`` and ``stream`` take source ids as well."""

    GRAPHS: ClassVar = {
        "encoder": ("input_ids", "attention_mask"),
        "decoder": ("decoder_input_ids", "attention_mask", WRITE_INDICES, LOGITS_POSITIONS),
    }

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._target_tokenizer = self.open_tokenizer(self.manifest.target_tokenizer)
        start = self._defaults.start_token
        if start is None:
            raise BundleError("bundle.json: generation has no decoder_start_token_id; export the bundle again.")
        self.start = [start]  # the decoder's first ids

    def translate(self, texts: str | Sequence[str], **keywords: Any) -> Any:
        """Translate texts: the target text of each; a str for a str, a list for a list.

        Keywords are those of ``generate``: ``num_beams``, ``max_new_tokens``, ...
        """
        self.tokenizer()  # texts need one
        return self.generate(texts, **keywords)

    def prefill(self, rows: Sequence[Row]) -> PrefillResult:
        ids, lengths = padded(rows, row_length(max(map(len, rows)), self.max_size("S")))
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        return self.prefill_masked(ids, mask)

    def prefill_masked(self, ids: Any, mask: Any) -> PrefillResult:
        """Encode ``ids`` and ``mask``, int64 (R, S), and prefill a decoder with the start token."""
        encoder = self.backend("encoder")
        R, S = ids.shape
        read_by_decoder = {tensor.name for tensor in self.backend("decoder").graph.inputs}
        shapes = {
            tensor.name: shape_of(tensor, {"B": R, "S": S})
            for tensor in encoder.graph.outputs
            if tensor.name in read_by_decoder
        }
        encoded = encoder.run({"input_ids": ids, "attention_mask": mask}, shapes)
        decoder = self.new_decoder(R, {**encoded, "attention_mask": mask})
        starts = [list(self.start) for _ in range(R)]
        return PrefillResult(decoder, starts, decoder.prefill(np.array(starts, np.int64)))

    def decoder_length(self, row: Sequence[int]) -> int:
        return 1  # the start token

    def target_tokenizer(self) -> TextTokenizer:
        return self._target_tokenizer or self.tokenizer()

    def prompt_tokens(self) -> Tensor:
        return self.backend("encoder").graph.inputs[0]


FAMILY = FamilyTasks(
    Transformer,
    {"translation": Task(ask_generator, generated_lines, generates=True, example="'3 May 1921'")},
)
