"""Base class of encoder-decoders: the encoder runs once, then the decoder token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.runtime.errors import BundleError
from transom.runtime.graph_spec import shape_of
from transom.runtime.tasks.generator import Generator, PrefillResult

if TYPE_CHECKING:
    from transom.runtime.backends.base import Array
    from transom.runtime.text.tokenizer import TextTokenizer


class EncoderDecoder(Generator):
    """A loaded bundle of the graphs ``encoder`` and ``decoder``. A family defines ``prefill``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._target_tokenizer = self.open_tokenizer(self.manifest.target_tokenizer)
        start = self._defaults.start_token
        if start is None:
            raise BundleError("bundle.json: generation has no decoder_start_token_id; export the bundle again.")
        self.start = [start]  # the decoder's first ids

    def prefill_encoded(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> PrefillResult:
        """Encode ``feeds``, all inputs of the encoder, of axes of ``sizes``; prefill a decoder with the start token."""
        encoder = self.backend("encoder")
        read = {tensor.name for tensor in self.backend("decoder").graph.inputs}
        shapes = {tensor.name: shape_of(tensor, sizes) for tensor in encoder.graph.outputs if tensor.name in read}
        encoded = {**feeds, **encoder.run(feeds, shapes)}
        R = sizes["B"]
        decoder = self.new_decoder(R, {name: array for name, array in encoded.items() if name in read})
        starts = [list(self.start) for _ in range(R)]
        return PrefillResult(decoder, starts, decoder.prefill(np.array(starts, np.int64)))

    def decoder_length(self, prompt: Sequence[Any]) -> int:
        return 1  # the start token

    def target_tokenizer(self) -> TextTokenizer:
        return self._target_tokenizer or self.tokenizer()
