"""The kernel's bias path as a plugin launches it for windows of an image: relative positions and the shift's mask.

Under Triton's interpreter, with the tile sizes, the grid and the integers that TensorRT is told, against float64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")

import torch

from attention_reference import exact, require_close
from biased_attention import SHIFTED, biased_graph, mask_of, shift_mask
from emulated_driver import compile_elsewhere
from transom.export.engine import evidence
from transom.export.engine.evidence import require_close as require_small
from transom.export.passes.plugin_attention import MASKED, has_head_bias, is_attention, plugin_attention
from transom.export.plugins.interpreter import errors_of, interpret, interpreted_errors, rounded
from transom.export.plugins.kernel_spec import Variant
from transom.export.plugins.plugin_calls import PluginCall, example_inputs, plugin_calls
from transom.export.plugins.tile_sizes import SPILLED
from transom.export.plugins.trt_plugin import candidates
from transom.runtime.errors import EngineError, ParityError

DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
TORCH = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
NEVER = float("-inf")


def call(dtype: str, mask: np.ndarray, size: int) -> PluginCall:
    _, heads, tokens, _ = mask.shape
    shape = (None, heads, tokens, size)
    return PluginCall(MASKED, (dtype,) * 4, (shape, shape, shape, mask.shape), size**-0.5, "hmn", mask=mask)


def test_the_shift_mask_by_hand() -> None:
    """Two by two windows of two by two pixels: the first is whole, the second halved, the last quartered."""
    visible = shift_mask(2, 2) == 0
    assert visible[0].all()
    assert visible[1].tolist() == [[True, False, True, False], [False, True, False, True]] * 2
    assert visible[2].tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert visible[3].tolist() == np.eye(4, dtype=bool).tolist()
    assert set(np.unique(shift_mask(3, 4))) == {0.0, SHIFTED}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("side", "size", "windows", "hidden"),
    [
        (7, 32, 2, SHIFTED),
        (7, 32, 0, 0.0),
        (8, 16, 2, NEVER),
        (4, 24, 3, SHIFTED),
        (12, 32, 0, 0.0),
        (16, 16, 0, 0.0),
    ],
)
def test_biases_and_shifts_of_windows(dtype: str, side: int, size: int, windows: int, hidden: float) -> None:
    """Windows of 49, 64, 16, 144 and 256 pixels; the two kinds of hiding; each kernel that TensorRT chooses from."""
    made = call(dtype, mask_of(2 if side < 16 else 1, side, windows, hidden), size)
    inputs = [rounded(array, dtype) for array in example_inputs(made)]
    q, k, v, mask = map(torch.from_numpy, inputs)
    expected = exact(q, k, v, made.scale, added=mask)
    assert not expected.isnan().any()
    for tiles in made.tiles(89):
        found = torch.from_numpy(interpret(made, inputs, tiles)).to(TORCH[dtype])
        require_close(found, expected, scores=8.0)
    with pytest.raises(AssertionError):  # the bias of another key
        require_close(found, exact(q, k, v, made.scale, added=mask.roll(1, 3)), scores=8.0)


def test_the_kernels_of_windows_assemble(tmp_path: Path) -> None:
    """PTX without a GPU: what TensorRT may choose from for 49 pixels in heads of 32; no spills, 48 KiB at most."""
    wanted = []
    for sm in (75, 86, 120):
        variant = Variant("fp16", 32, 6, 1, 0.2, mask=2)
        for tiles in candidates(sm, variant, 49, 49):
            described = {"dtype": "fp16", "size": 32, "heads": 6, "scale": 0.2, "mask": 2}
            wanted.append(("attention", sm, described, {"mask": "hm"}, (tiles.m, tiles.n, tiles.warps, tiles.stages)))
    for kernel, (_, sm, *_) in zip(compile_elsewhere(wanted, tmp_path), wanted, strict=True):
        registers, spilled = kernel.assembled
        assert f".target sm_{sm}".encode() in kernel.ptx
        assert (registers <= 255, spilled <= SPILLED, 0 < kernel.shared <= 48 * 1024) == (True, True, True), sm


@pytest.mark.parametrize("precision", DTYPES.values())
def test_a_graph_is_described_as_the_plugin_will_be(precision: str) -> None:
    """One call for two nodes that are alike, with the graph's own bias; what is launched is what the body computes."""
    model = biased_graph(mask_of(2, 4, 2), 16, precision)
    (node,) = filter(is_attention, model.graph)
    assert has_head_bias(node)
    assert plugin_attention(model, has_head_bias) == {}
    (made,) = plugin_calls(model)
    dtype = {value: key for key, value in DTYPES.items()}[precision]
    assert made.dtypes == (dtype,) * 4
    assert made.shapes == ((None, 8, 16, 16),) * 3 + ((1, 8, 16, 16),)
    assert (made.axes, made.nodes, made.variant.mask) == ("hmn", ("attention",), 2)
    np.testing.assert_array_equal(made.mask, rounded(mask_of(2, 4, 2), dtype))
    assert max(errors_of(made, 89)) <= evidence.TOLERANCES[dtype]


def test_which_masks_are_a_bias_of_each_head() -> None:
    """Numbers with the heads' axis; neither one bias for all heads nor a boolean mask nor none."""
    shared = biased_graph(mask_of(2, 2), 16)
    (node,) = filter(is_attention, shared.graph)
    mask = node.inputs[3]
    assert has_head_bias(node)
    node.replace_input_with(3, None)
    assert not has_head_bias(node)
    for shape, dtype, found in (
        ((1, 2, 4, 4), "FLOAT", True),
        ((1, 1, 4, 4), "FLOAT", False),
        ((1, 2, 4, 4), "BOOL", False),
    ):
        assert mask is not None
        mask.shape, mask.type = type(mask.shape)(shape), type(mask.type)(type(mask.dtype)[dtype])  # type: ignore[misc, arg-type, index]
        node.replace_input_with(3, mask)
        assert has_head_bias(node) == found


def test_a_kernel_that_computes_something_else_fails_the_build() -> None:
    with pytest.raises(
        ParityError, match=r"the node a does: in Triton's interpreter it is off by 6.00e-03 of .*0\.005"
    ):
        require_small([1e-3, 6e-3], [("b", "HALF"), ("a", "HALF")])
    with pytest.raises(ParityError, match="off by nan"):
        require_small([float("nan")], [("a", "FLOAT")])


def test_a_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(EngineError, match=r"does not run in Triton's interpreter: .*Build with --no-plugin"):
        interpreted_errors([call("HALF", mask_of(1, 2), 16)], 89)


def test_inputs_without_a_shape_are_refused() -> None:
    """TensorRT's shapes are those of the graph: without them nothing can be said of the kernel."""
    model = biased_graph(mask_of(2, 2), 16, "fp16")
    plugin_attention(model, has_head_bias)
    (node,) = (node for node in model.graph if node.op_type == MASKED)
    assert node.inputs[0] is not None
    node.inputs[0].shape = None
    with pytest.raises(EngineError, match="of attention has no shape or no type for query; expected both"):
        plugin_calls(model)
