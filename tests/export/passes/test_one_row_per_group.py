"""Groups of rows become single rows: names of axes change, and what the graph computes does not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from flamingo_models import config_json, random_flamingo, read_config
from transom.export.onnx_export import onnx_from_module
from transom.export.passes._match import inputs_of
from transom.export.passes.one_row_per_group import one_row_per_group
from transom.models import flamingo
from transom.runtime.graph_spec import Axis, shape_of


@pytest.fixture(scope="module")
def decoder() -> ir.Model:
    config = read_config(config_json())
    model = random_flamingo(config)
    _, spec = flamingo.graphs(config, "")
    return onnx_from_module(flamingo.parts(model)["decoder"], spec, flamingo.axes(config))


def names(model: ir.Model) -> set[str]:
    computed = [value for node in model.graph for value in node.outputs]
    shapes = [value.shape for value in (*model.graph.inputs, *computed) if value.shape is not None]
    return {size.value for shape in shapes for size in shape if isinstance(size, ir.SymbolicDim) and size.value}


def test_the_rows_of_images_are_those_of_the_tokens(decoder: ir.Model) -> None:
    """Each of the two cross-attentions has as many rows of keys as there are rows of tokens."""
    model, axes = decoder.clone(), flamingo.axes(read_config(config_json()))
    assert {"B", "G"} <= names(model)
    assert one_row_per_group(model, axes) > 4  # the inputs alone are four
    assert "G" not in names(model)
    assert "B" in names(model)
    inputs = {str(value.name): value for value in model.graph.inputs}
    assert [str(size) for size in inputs["image_key.0"].shape or ()] == ["B", "4", "I", "5", "8"]
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    keys = [str(inputs_of(node, 2)[1].shape[0]) for node in attentions]  # type: ignore[union-attr, index]
    assert keys == ["B"] * 5


def test_a_graph_without_groups_is_left(decoder: ir.Model) -> None:
    model = decoder.clone()
    assert one_row_per_group(model, {"B": Axis(1, 1, 4), "G": Axis(1, 1, 4, same_as="B")}) == 0
    assert names(model) == names(decoder)


def test_the_same_is_computed(decoder: ir.Model) -> None:
    """Three rows, the images of one repeated for them: the group's logits."""
    model, config = decoder.clone(), read_config(config_json())
    one_row_per_group(model, flamingo.axes(config))
    _, spec = flamingo.graphs(config, "")
    torch.manual_seed(0)
    sizes = {"B": 3, "S": 2, "P": 2, "C": 8, "I": 2, "G": 1}
    feeds = {t.name: torch.randn(shape_of(t, sizes)).numpy() for t in spec.inputs if t.dtype == "float32"}
    feeds |= {
        "input_ids": np.array([[1, 5], [2, 3], [7, 1]]),
        "write_indices": np.array([0, 3, 5]),
        "logits_positions": np.tile(np.arange(2), (3, 1)),
        "image_indices": np.array([[0, 1], [2, 2], [1, 2]]),
    }
    repeated = {
        name: np.repeat(value, 3, 0) if "image_" in name and value.ndim == 5 else value for name, value in feeds.items()
    }

    def logits(of: ir.Model, given: dict[str, np.ndarray]) -> np.ndarray:
        session = onnxruntime.InferenceSession(ir.to_proto(of).SerializeToString())
        return np.asarray(session.run(["logits"], given)[0])

    expected = logits(decoder, feeds)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(model, repeated), expected, atol=1e-5)
