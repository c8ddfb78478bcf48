"""Which source position each output token attends to: the weights of the decoder's cross-attention.

They come out of the bundle's own graph, with its attention's probabilities added as outputs. Bahdanau et
al. (2014, arXiv:1409.0473), figure 3, is where such pictures began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.passes.attention import expose_weights
from transom.runtime.backend import Array
from transom.runtime.bundle import Bundle, GraphFile
from transom.runtime.inputs import checked_feeds
from transom.runtime.ort import open_session
from transom.runtime.tasks.transformer import Transformer

CROSS = "encoder_attn"  # what the definitions call attention over the source


@dataclass(frozen=True)
class Alignment:
    """``weights`` float32 (layers, H, T, S): how much of its attention target token t gives to source token s."""

    source: list[str]
    target: list[str]
    weights: NDArray[np.float32]


def alignments(bundle: Bundle, texts: Sequence[str], **keywords: Any) -> list[Alignment]:
    """Translate ``texts`` and read off the attention behind every token of the answers.

    ``keywords`` are those of ``translate``.
    """
    with Transformer(bundle) as model:
        decoder = next(file for file in bundle.manifest.graphs if file.graph.name == "decoder")
        exposed = Exposed(bundle, decoder)
        return [alignment(model, exposed, text, keywords) for text in texts]


def alignment(model: Transformer, exposed: Exposed, text: str, keywords: dict[str, Any]) -> Alignment:
    """The weights for one text, its answer fed at once."""
    encoder, target_encoder = model.encoder(), model.target_encoder()
    source = encoder.encode([text], truncate=False).rows[0].ids
    target = model.generate(source, **keywords)
    inputs = {"input_ids": np.array([source]), "attention_mask": np.ones((1, len(source)), np.int64)}
    encoded = model.run(inputs)
    graph = model.backend("decoder").graph
    given = {
        "decoder_input_ids": np.array([[*model.start, *target[:-1]]]),
        "attention_mask": inputs["attention_mask"],
        **{tensor.name: encoded[tensor.name] for tensor in graph.inputs if tensor.name in encoded},
    }
    feeds, _ = checked_feeds(graph, model.manifest.axes, given)
    return Alignment(
        [encoder.token(token) or str(token) for token in source],
        [target_encoder.token(token) or str(token) for token in target],
        exposed.weights(feeds),
    )


class Exposed:
    """The bundle's decoder with the weights of every cross-attention as outputs.

    Run without bound outputs: ONNX Runtime infers a wrong shape for these, which binding would hold it to.
    """

    def __init__(self, bundle: Bundle, decoder: GraphFile) -> None:
        name = decoder.file_for("cpu")
        model = ir.from_proto(onnx.load_from_string(bundle.read(name)))
        self._names = expose_weights(model, CROSS)
        data = ir.to_proto(model).SerializeToString()
        self._session = open_session(
            decoder, lambda wanted: data if wanted == name else bundle.read(wanted), "cpu", None
        )

    def weights(self, feeds: Mapping[str, Array]) -> NDArray[np.float32]:
        """Of one row: (layers, H, T, S)."""
        found = self._session.run(self._names, dict(feeds))
        return np.stack([layer[0].astype(np.float32) for layer in found])
