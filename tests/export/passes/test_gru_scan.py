"""A GRU written as a Scan: the numbers of ONNX Runtime's GRU, in every precision; forms that are left alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from rtx import counted, needs_rtx
from tiny_graphs import graph_of, normal, operators, weights_of
from transom.export.engine.build_log import Loop, kernels_of, loops_of
from transom.export.engine.build_process import build_engine
from transom.export.engine.profiles import Profile
from transom.export.engine.targets import find_targets
from transom.export.engine.trt_graphs import TensorRTGraph
from transom.export.passes._match import body_of
from transom.export.passes.fake_half import fake_half
from transom.export.passes.gru_scan import gru_scan
from transom.export.passes.half_precision import convert_precision
from transom.runtime.errors import EngineError

E, H = 5, 3
ATTRIBUTES = 'hidden_size = 3, direction = "bidirectional", linear_before_reset = 1'
WEIGHTS = {"W": normal(2, 3 * H, E), "R": normal(2, 3 * H, H, seed=1), "B": normal(2, 6 * H, seed=2)}
LENGTHS = [6, 1, 4]
STEP = {"MatMul": 1, "Split": 2, "Add": 5, "Sigmoid": 2, "Mul": 2, "Tanh": 1, "Sub": 1}
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def gru(
    attributes: str = ATTRIBUTES,
    inputs: str = "x, W, R, B, lengths",
    outputs: str = "y, last",
    given: str = "",
    weights: dict[str, Any] | None = None,
) -> ir.Model:
    """A graph of one GRU over x (S, B, E); ``outputs`` of the node are the graph's, where they have a name."""
    weights = WEIGHTS if weights is None else weights
    directions, hidden = weights.get("R", WEIGHTS["R"]).shape[::2]
    types = {"y": f"float[S, {directions}, B, {hidden}]", "last": f"float[{directions}, B, {hidden}]"}
    named = [name for name in outputs.replace('"', "").split(", ") if name]
    return graph_of(
        f"g (float[S, B, F] x, int32[B] lengths{given}) => ({', '.join(f'{types[name]} {name}' for name in named)}) "
        f"{{ {outputs} = GRU <{attributes}> ({inputs}) }}",
        weights,
        ["encoder.gru"],
    )


def run(model: ir.Model, x: Any, lengths: Any = LENGTHS) -> list[np.ndarray[Any, Any]]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.asarray(x, np.float32), "lengths": np.asarray(lengths, np.int32)}
    return [np.asarray(output) for output in session.run(None, {v.name: feeds[v.name] for v in session.get_inputs()})]


def step_of(model: ir.Model) -> ir.Graph:
    (body,) = filter(None, map(body_of, model.graph))
    return body


def test_numbers_that_can_be_followed() -> None:
    """One feature, update gates of a half, no reset: h' = (h + tanh x) / 2, for x of which tanh is 0.8.

    The first row has three positions; the second two, and a third that is padding.
    """
    W = np.zeros((2, 3, 1), np.float32)
    W[:, 2] = 1  # the new gate's; the update gate of no weights is the sigmoid of 0
    model = gru(
        ATTRIBUTES.replace("3", "1"), weights={"W": W, "R": np.zeros((2, 3, 1)), "B": np.zeros((2, 6), np.float32)}
    )
    assert gru_scan(model) == 1
    y, last = run(model, np.full((3, 2, 1), np.arctanh(0.8)), [3, 2])
    forward, backward = y[:, 0, :, 0].T, y[:, 1, :, 0].T
    np.testing.assert_allclose(forward, [[0.4, 0.6, 0.7], [0.4, 0.6, 0.0]], atol=1e-6)
    np.testing.assert_allclose(backward, [[0.7, 0.6, 0.4], [0.6, 0.4, 0.0]], atol=1e-6)
    np.testing.assert_allclose(last[:, :, 0], [[0.7, 0.6], [0.7, 0.6]], atol=1e-6)


@pytest.mark.parametrize(("positions", "lengths"), [(6, LENGTHS), (6, [6, 6, 6]), (1, [1]), (9, [1, 9, 8, 2, 5])])
def test_it_computes_what_the_operator_does(positions: int, lengths: list[int]) -> None:
    model, x = gru(), normal(positions, len(lengths), E, seed=3)
    expected = run(model, x, lengths)
    assert gru_scan(model) == 1
    assert (operators(model)["GRU"], operators(model)["Scan"], operators(model)["MatMul"]) == (0, 1, 1)
    assert operators_of_step(model) == STEP | {"Where": 2}
    assert {node.metadata_props["module"] for node in (*model.graph, *step_of(model))} == {"encoder.gru"}
    for found, theirs in zip(run(model, x, lengths), expected, strict=True):
        assert found.shape == theirs.shape
        assert np.abs(found - theirs).max() <= 1e-6
    for row, length in enumerate(lengths):
        assert not run(model, x, lengths)[0][length:, :, row].any()


def operators_of_step(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in step_of(model))


@pytest.mark.parametrize(("outputs", "selects"), [("y", 2), ('"", last', 1), ("y, last", 2)])
def test_an_output_that_nothing_reads_is_not_computed(outputs: str, selects: int) -> None:
    model, x = gru(outputs=outputs), normal(6, 3, E)
    expected = run(model, x)
    assert gru_scan(model) == 1
    assert operators_of_step(model)["Where"] == selects
    for found, theirs in zip(run(model, x), expected, strict=True):
        assert np.abs(found - theirs).max() <= 1e-6


def test_in_bf16_the_recurrence_stays_in_fp32() -> None:
    model = gru()
    convert_precision(model, "bf16")
    (node,) = (node for node in model.graph if node.op_type == "GRU")
    assert {value.dtype for value in (*node.inputs[:4], *node.outputs) if value is not None and value.name} == {
        ir.DataType.FLOAT
    }
    assert gru_scan(model) == 1


def test_in_fp16_products_are_half_and_the_recurrence_is_fp32() -> None:
    """With a GPU's rounding it is within some units of roundoff of FP32, and nothing else is left in half precision."""
    exact, x = run(gru(), normal(6, 3, E)), normal(6, 3, E)
    model = gru()
    convert_precision(model, "fp16")
    assert gru_scan(model) == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    step = step_of(model)
    assert [node.op_type for node in step if node.outputs[0].dtype in HALVES] == ["Cast", "MatMul"]
    assert [value.dtype in HALVES for value in step.inputs] == [False, True, False]
    assert {value.dtype for value in step.outputs} == {ir.DataType.FLOAT}
    assert fake_half(model)
    assert {value.dtype for value in (*step.inputs, *step.outputs)} & {*HALVES} == set()
    assert [node.op_type for node in step if node.outputs[0].dtype in HALVES] == ["Cast", "Cast"]  # they round
    for found, theirs in zip(run(model, x), exact, strict=True):
        assert 0 < np.abs(found - theirs).max() <= 8 * 2**-11


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_tensorrt_makes_of_the_operator_and_of_the_scan(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In FP16 its parser refuses the operator; in FP32 a step is 16 kernels, of the Scan eight are 8.

    Eight because a product of three features is a part of the gates' kernel, so that nothing shows the steps.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (target,) = find_targets(["rtx-sm86"])
    sizes = {"x": ((1, 1, E), (9, 1, E), (64, 4, E)), "lengths": ((1,), (1,), (4,))}
    model = gru()
    convert_precision(model, precision)

    def loops() -> tuple[Loop, ...]:
        built = build_engine("encoder", TensorRTGraph(model).serialized(), (Profile("all", sizes),), target)
        return loops_of(kernels_of(built.log, 1)[0])

    if precision == "fp32":
        assert loops() == (Loop(counted(16), 1),)
    else:
        with pytest.raises(EngineError, match=r"cannot read the node .*\(GRU\) of the graph 'encoder'.* same types"):
            loops()
    assert gru_scan(model) == 1
    ((kernels, steps),) = [(loop.kernels, loop.steps) for loop in loops()]
    assert (steps, kernels) == (None, counted(8))


def test_two_layers_in_one_graph() -> None:
    """The weights of both have names of their own, and those of the operators are gone."""
    text = f"""g (float[S, B, {E}] x, int32[B] lengths) => (float[2, B, 3] last) <int64[3] shape = {{0, 0, 6}}> {{
        y, none = GRU <{ATTRIBUTES}> (x, W, R, B, lengths)
        t = Transpose <perm = [0, 2, 1, 3]> (y)
        z = Reshape (t, shape)
        none2, last = GRU <{ATTRIBUTES}> (z, W2, R, B, lengths)
    }}"""
    model = graph_of(text, {**WEIGHTS, "W2": normal(2, 3 * H, 2 * H, seed=7)})
    expected, x = run(model, normal(6, 3, E)), normal(6, 3, E)
    assert gru_scan(model) == 2
    (found,) = run(model, x)
    assert np.abs(found - expected[0]).max() <= 1e-6
    assert {"W", "W2", "R", "B"} & {*weights_of(model)} == set()


ONE_DIRECTION = {name: array[:1] for name, array in WEIGHTS.items()}
FORWARD = {"attributes": ATTRIBUTES.replace("bidirectional", "forward"), "weights": ONE_DIRECTION}
FED = {"given": ", float[2, 9, 3] R", "weights": {name: array for name, array in WEIGHTS.items() if name != "R"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"attributes": ATTRIBUTES.replace(", linear_before_reset = 1", "")},
        {"attributes": ATTRIBUTES + ", clip = 3.0"},
        FORWARD,
        {"inputs": "x, W, R, B"},
        {"inputs": "x, W, R, B, lengths, first", "given": ", float[2, B, 3] first"},
        FED,
    ],
    ids=["reset before the product", "clipped", "one direction", "no lengths", "first states", "weights that are fed"],
)
def test_other_forms_are_left_alone(changes: dict[str, Any]) -> None:
    model = gru(**changes)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert gru_scan(model) == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
