"""Expose the attention weights inside a bundle's own graph as outputs, and draw every head of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.bundle_graphs import parse_graph
from transom.export.passes.expose_attention import WEIGHTS_NAME, expose_weights
from transom.export.report.graphs import DEVICE
from transom.export.report.svg import shade, thumbnail
from transom.runtime.backends.base import Array
from transom.runtime.backends.ort import open_session
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError, BundleError, InputError, one_line
from transom.runtime.manifest_graphs import GraphFile

MOST_TOKENS = 64  # of a text whose attention is drawn: a larger matrix cannot be read
SHADES = tuple((weight, shade(weight)) for weight in (0.01, 0.1, 0.25, 0.5, 1.0))  # of the legend: weight, opacity

Weights = NDArray[np.float32]


class ExposedAttention:
    """A graph of the bundle with the weights of its attention as outputs.

    ``module`` is the end of the path of the attention's module in the definitions. Runs without bound outputs: ONNX
    Runtime infers a wrong shape for these, and binding would insist on it.
    """

    def __init__(self, bundle: Bundle, file: GraphFile, module: str = "") -> None:
        self.graph = file.graph
        name = file.file_for(DEVICE)
        model = parse_graph(bundle.read(name), name)
        self.names = expose_weights(model, module)
        if not self.names:
            raise BundleError(f"{name} has no Attention of a module {module!r}; export the bundle again.")
        data = ir.to_proto(model).SerializeToString()
        self._session = open_session(file, lambda wanted: data if wanted == name else bundle.read(wanted), DEVICE, None)

    def weights(self, feeds: Mapping[str, Array]) -> Weights:
        """Return the weights of one row, float32 (layers, H, queries, keys)."""
        return self.with_outputs(feeds, [])[0]

    def with_outputs(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> tuple[Weights, dict[str, Array]]:
        """Return the weights of one row, and ``outputs`` of the graph beside them."""
        arrays = self._run([*self.names, *outputs], feeds)
        layers = [layer[0].astype(np.float32) for layer in arrays[: len(self.names)]]
        if len({layer.shape for layer in layers}) != 1 or layers[0].ndim != 3:
            raise BundleError("the layers of the graph differ in their heads, which cannot be drawn.")
        return np.stack(layers), dict(zip(outputs, arrays[len(self.names) :], strict=True))

    def by_layer(self, feeds: Mapping[str, Array]) -> dict[str, Weights]:
        """Return the weights of all rows by the path of their layer's module, float32 (B, H, queries, keys) each."""
        arrays = self._run(self.names, feeds)
        paths = [name.removesuffix(WEIGHTS_NAME) for name in self.names]
        return {path: array.astype(np.float32) for path, array in zip(paths, arrays, strict=True)}

    def _run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        try:
            arrays: list[Array] = self._session.run(list(names), dict(feeds))
        except Exception as error:  # the library raises RuntimeError and its own types
            raise BackendError(
                f"ONNX Runtime failed on a graph with its attention exposed: {one_line(error)}"
            ) from None
        return arrays


def require_few_tokens(text: str, tokens: int, verb: str = "has") -> None:
    """Raise InputError for a text that has, or gets, more tokens than can be drawn."""
    if tokens > MOST_TOKENS:
        raise InputError(
            f"the text {text[:40]!r} {verb} {tokens} tokens; attention over at most {MOST_TOKENS} is drawn. Shorten it."
        )


def small_multiples(weights: Weights, chosen: tuple[int, int] | None = None) -> dict[str, Any]:
    """Draw ``weights`` (layers, H, queries, keys) as a row per layer, a column per head, ``chosen`` outlined."""
    layers, heads = weights.shape[:2]

    def drawing(layer: int, head: int) -> str:
        kind = "chosen" if (layer, head) == chosen else ""
        return thumbnail(weights[layer, head], f"layer {layer + 1}, head {head + 1}", kind)

    return {"heads": heads, "layers": [[drawing(layer, head) for head in range(heads)] for layer in range(layers)]}
