"""Attention that computes a convolution: Cordonnier et al. 2020, Theorem 1, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny_graphs import operators
from transom.export.onnx_export import onnx_from_module
from transom.export.passes.fake_half import fake_half
from transom.export.passes.half_precision import convert_precision
from transom.models.convolution_attention import SHARPNESS, QuadraticAttention, attention_from_convolution
from transom.runtime.errors import InputError
from transom.runtime.graph_spec import Axis, Graph, Tensor

SIZES = [(1, 1), (1, 7), (6, 1), (2, 2), (5, 9), (12, 11)]
# in, out channels, kernel, dilation, groups
KERNELS = [(1, 1, 3, 1, 1), (3, 5, 3, 1, 1), (8, 2, 3, 1, 2), (4, 6, 3, 2, 1), (2, 3, 5, 1, 1), (3, 4, 1, 1, 1)]
AXES = {"B": Axis(1, 1, 4), "H": Axis(1, 8, 32), "W": Axis(1, 8, 32)}
UNITS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of roundoff
CHANNELS = 6, 4  # of the layer that is exported


def random_convolution(channels: int, out: int, kernel: int, dilation: int, groups: int, seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(channels, out, kernel, padding=padding, dilation=dilation, groups=groups)
    nn.init.normal_(convolution.weight)
    return convolution.requires_grad_(False)


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(convolution: nn.Conv2d, x: torch.Tensor, *, magnitudes: bool = False) -> torch.Tensor:
    """The convolution in float64; with ``magnitudes`` the sum of |w| |x|, which bounds what rounding can do."""
    bias = torch.zeros(convolution.out_channels) if convolution.bias is None else convolution.bias
    tensors = [tensor.double().abs() if magnitudes else tensor.double() for tensor in (x, convolution.weight, bias)]
    settings = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    return F.conv2d(*tensors, *settings)


def require_within_rounding(found: torch.Tensor, convolution: nn.Conv2d, x: torch.Tensor) -> None:
    """Higham 2002, section 3.1: a sum of n products, in any order, is off by n u / (1 - n u) times that of |w| |x|."""
    kernel = convolution.weight
    n, u = kernel.shape[1] * kernel.shape[2] * kernel.shape[3] + 1, UNITS[torch.float32]  # with the bias
    error = (found.double() - exact(convolution, x)).abs()
    assert (error <= n * u / (1 - n * u) * exact(convolution, x, magnitudes=True)).all(), error.max()


@pytest.mark.parametrize(("channels", "out", "kernel", "dilation", "groups"), KERNELS)
def test_any_convolution(channels: int, out: int, kernel: int, dilation: int, groups: int) -> None:
    """Both are off by no more than the rounding of one sum; another kernel's output is not that near."""
    convolution = random_convolution(channels, out, kernel, dilation, groups)
    attention = attention_from_convolution(convolution)
    other = attention_from_convolution(random_convolution(channels, out, kernel, dilation, groups, seed=5))
    for H, W in SIZES:
        x = image(2, channels, H, W)
        for found in (
            attention(x),
            F.conv2d(x, convolution.weight, convolution.bias, 1, convolution.padding, dilation, groups),
        ):
            require_within_rounding(found, convolution, x)
        with pytest.raises(AssertionError):
            require_within_rounding(other(x), convolution, x)


def test_without_a_bias() -> None:
    convolution = nn.Conv2d(2, 3, 3, padding="same", bias=False).requires_grad_(False)
    require_within_rounding(attention_from_convolution(convolution)(image(1, 2, 4, 5)), convolution, image(1, 2, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_head_is_the_image_moved_by_one_tap(dtype: torch.dtype) -> None:
    """Bit for bit: the softmax is one-hot in every format, also where halves cannot count the rows (300 > 2^8)."""
    convolution = random_convolution(2, 1, 3, 1, 1).to(dtype)
    attention = attention_from_convolution(convolution)
    attention.output = nn.Identity()  # type: ignore[assignment]  # what is left are the heads
    x = image(1, 2, 300, 2).to(dtype)
    heads = attention(x).unflatten(1, (9, 2))
    padded = F.pad(x, (1, 1, 1, 1))
    for head in range(9):
        row, column = divmod(head, 3)
        assert torch.equal(heads[:, head], padded[:, :, row : row + 300, column : column + 2]), head


def test_sharpness_is_a_limit_until_it_underflows() -> None:
    """Lemma 2 by hand, in the middle: a neighbour has exp(-alpha) of the weight, and of exp(-105) nothing is left."""
    attention = attention_from_convolution(random_convolution(1, 1, 3, 1, 1)).requires_grad_(False)
    middle, neighbours = (9 * 9) // 2, []
    for alpha in (1.0, 4.0, 16.0, 80.0, 105.0, SHARPNESS):
        nn.init.constant_(attention.alpha, alpha)
        weights = torch.softmax(attention.position_scores(9, 9), -1)[0, 4, middle]  # (11 * 11,)
        assert weights.argmax() == (11 * 11) // 2
        neighbours.append(float(weights.topk(2).values[1]))
    expected = [math.exp(-a) / (1 + 2 * sum(math.exp(-a * k * k) for k in range(1, 6))) ** 2 for a in (1, 4, 16, 80)]
    assert neighbours[:4] == pytest.approx(expected, rel=1e-5)
    assert neighbours[4:] == [0.0, 0.0]


def test_without_padding_the_border_sees_its_nearest_pixel() -> None:
    """The layer as the paper has it: inside the same, at the border another; a convolution there sees zeros."""
    convolution = random_convolution(2, 2, 3, 1, 1)
    attention, x = attention_from_convolution(convolution), image(1, 2, 6, 7)
    attention.padding = 0
    replicated = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), convolution.weight, convolution.bias)
    torch.testing.assert_close(attention(x), replicated)
    assert (attention(x) - convolution(x))[..., 0].abs().max() > 0.1


def test_content_has_a_say_where_its_weights_are_not_zero() -> None:
    """A superset: with alpha 0 it is plain self-attention over the pixels."""
    torch.manual_seed(0)
    attention, x = QuadraticAttention(4, 3, heads=2).requires_grad_(False), image(2, 4, 3, 5)
    nn.init.zeros_(attention.alpha)
    pixels = x.flatten(2).transpose(1, 2)
    q, k, v = (part(pixels).unflatten(2, (2, 4)) for part in (attention.query, attention.key, attention.value))
    weights = torch.softmax(torch.einsum("bnhc,bthc->bhnt", q, k) / 2, -1)
    expected = attention.output(torch.einsum("bhnt,bthc->bnhc", weights, v).flatten(2))
    torch.testing.assert_close(attention(x), expected.transpose(1, 2).unflatten(2, (3, 5)))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 2, "padding": 1},
        {"kernel_size": (3, 5), "padding": 1},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": 3, "padding": 1, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_convolutions_of_another_size_are_refused(settings: dict[str, Any]) -> None:
    match = r"the convolution is Conv2d\(2, 3, kernel_size=.*; expected an odd square kernel, stride 1, and padding="
    with pytest.raises(InputError, match=match):
        attention_from_convolution(nn.Conv2d(2, 3, **settings))


@pytest.mark.parametrize(
    "module",
    [nn.ConvTranspose2d(3, 3, 3, padding=1), nn.Conv1d(3, 3, 3, padding=1), nn.Linear(3, 3)],
    ids=["transposed", "of a sequence", "linear"],
)
def test_other_modules_are_refused(module: Any) -> None:
    """A transposed convolution has a Conv2d's attributes, and weights that mean something else."""
    with pytest.raises(InputError, match=r"the convolution is \w+\(.*; expected a torch\.nn\.Conv2d"):
        attention_from_convolution(module)


@pytest.fixture(scope="module")
def convolution() -> nn.Conv2d:
    return random_convolution(*CHANNELS, 3, 1, 1)


@pytest.fixture(scope="module")
def exported(convolution: nn.Conv2d) -> ir.Model:
    tensors = [(Tensor(name, "float32", ("B", c, "H", "W")),) for name, c in zip("xy", CHANNELS, strict=True)]
    return onnx_from_module(attention_from_convolution(convolution), Graph("model", *tensors), AXES)


def run(model: ir.Model, x: torch.Tensor) -> torch.Tensor:
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(found)


def test_onnx_runtime_computes_the_convolution(convolution: nn.Conv2d, exported: ir.Model) -> None:
    """One graph for every size: one Attention, no convolution."""
    found = operators(exported)
    assert found["Attention"] == 1
    assert found["Conv"] == found["Softmax"] == 0
    for H, W in SIZES:
        x = image(3, CHANNELS[0], H, W)
        require_within_rounding(run(exported, x), convolution, x)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_rounds_what_a_convolution_rounds(
    precision: str, convolution: nn.Conv2d, exported: ir.Model
) -> None:
    """With FP32 sums: the sum and, with the bias, the result, one roundoff each. Far scores are -inf in FP16."""
    model = exported.clone()
    convert_precision(model, precision)
    fake_half(model)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    rounded = random_convolution(*CHANNELS, 3, 1, 1).to(dtype)
    x = image(2, CHANNELS[0], 12, 11).to(dtype)
    error = (run(model, x.float()).double() - exact(rounded, x)).abs()
    assert (error <= 2.1 * UNITS[dtype] * exact(rounded, x, magnitudes=True)).all(), error.max()
