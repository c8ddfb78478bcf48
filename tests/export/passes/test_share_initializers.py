"""Equal initializers become one; those that only look equal stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from transom.export.passes.share_initializers import share_initializers

ONES = np.ones((2, 3), np.float32)


def test_equal_contents_are_one_initializer() -> None:
    """Transposed arrays by their values; not another shape, dtype or rank of the same bytes."""
    arrays = {
        "a": ONES,
        "b": np.ones((3, 2), np.float32).T,
        "turned": np.ones((3, 2), np.float32),
        "integers": ONES.view(np.int32),
        "scalar": np.array(1, np.int64),
        "vector": np.array([1], np.int64),
        "c": ONES.copy(),
    }
    values = {name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()}
    nodes = [ir.node("Identity", [value]) for value in values.values()]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=list(values.values()), opset_imports={"": 23})
    assert share_initializers(ir.Model(graph, ir_version=10)) == 2
    assert list(graph.initializers) == ["a", "turned", "integers", "scalar", "vector"]
    assert [node.inputs[0].name for node in nodes] == ["a", "a", "turned", "integers", "scalar", "vector", "a"]
