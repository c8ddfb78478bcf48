"""Run a recurrent decoder along an output, one token a step, and collect the weights of its attention.

A generation asks for logits alone; here the bundle's own decoder graph runs again over the tokens that were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.errors import BundleError
from transom.runtime.graph_spec import token_input
from transom.runtime.tasks.encoder_decoder import EncoderDecoder

WEIGHTS = "cross_attentions"  # of a decoder's outputs: (B, T, places of the source)
GREEDY: dict[str, Any] = {"num_beams": 1, "do_sample": False, "num_return_sequences": 1}  # keywords of ``generate``


def has_weights(model: EncoderDecoder) -> bool:
    """Return whether the decoder gives the weights of its attention: without attention it has none."""
    return any(tensor.name == WEIGHTS for tensor in model.backend("decoder").graph.outputs)


def weights_along(model: EncoderDecoder, inputs: Mapping[str, Array], target: Sequence[int]) -> NDArray[np.float32]:
    """Return the attention with which each token of ``target`` was chosen, float32 (T, places of the source).

    ``inputs`` are the encoder's, of one row. The state moves with every token, from the first on.
    """
    graph = model.backend("decoder").graph
    if not has_weights(model):
        raise BundleError(f"graph {graph.name!r} has no output {WEIGHTS}; export the bundle again.")
    source = {**inputs, **model.run(inputs)}
    feeds = {tensor.name: source[tensor.name] for tensor in graph.inputs if tensor.name in source}
    rows = []
    for token in [*model.start, *target[:-1]]:
        found = model.run({**feeds, token_input(graph).name: np.array([[token]])})  # replaces the states in ``feeds``
        rows.append(found[WEIGHTS][0, -1].astype(np.float32))
    return np.stack(rows)
