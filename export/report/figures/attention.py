"""The attention weights inside a bundle's own graph, brought out as outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.bundle_graphs import parse_graph
from transom.export.passes.expose_attention import expose_weights
from transom.export.report.graphs import DEVICE
from transom.runtime.backends.base import Array
from transom.runtime.backends.ort import open_session
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError, BundleError, one_line
from transom.runtime.manifest_graphs import GraphFile

Weights = NDArray[np.float32]


class Exposed:
    """A graph of the bundle with the weights of its attention as outputs.

    ``module`` is what the definitions call the attention that is wanted: the end of its path. Run without bound
    outputs: ONNX Runtime infers a wrong shape for these, which binding would hold it to.
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
        """Of one row: (layers, H, queries, keys)."""
        return self.with_outputs(feeds, [])[0]

    def with_outputs(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> tuple[Weights, dict[str, Array]]:
        """The weights of one row, and ``outputs`` of the graph beside them."""
        found = self._run([*self.names, *outputs], feeds)
        layers = [layer[0].astype(np.float32) for layer in found[: len(self.names)]]
        if len({layer.shape for layer in layers}) != 1 or layers[0].ndim != 3:
            raise BundleError("the layers of the graph differ in their heads; there is no picture of that.")
        return np.stack(layers), dict(zip(outputs, found[len(self.names) :], strict=True))

    def _run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        try:
            found: list[Array] = self._session.run(list(names), dict(feeds))
        except Exception as error:  # the library raises bare RuntimeError and its own types alike
            raise BackendError(
                f"ONNX Runtime failed on a graph with its attention exposed: {one_line(error)}"
            ) from None
        return found
