"""BiT's ResNet (Kolesnikov et al., 2020, arXiv:1912.11370) as a backbone: an image to the feature map of one stage.

Convolutions with standardised weights (Qiao et al., 2019, arXiv:1903.10520) and group normalisation (Wu and He, 2018,
arXiv:1803.08494) in place of batch normalisation. Weights are standardised once, when they are loaded, so that a graph
has plain convolutions.

Shape letters: B batch, C channels, G groups, H and W rows and columns of a feature map, which are fixed at export.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.models.layers import ACTIVATIONS
from transom.models.patches import Size

STEM_KERNEL, STEM_STRIDE = 7, 2
POOL_KERNEL, POOL_STRIDE = 3, 2
BOTTLENECK = 4  # a layer's width over that of its 3x3 convolution
WIDTH_MULTIPLE = 8  # of every width, as transformers' ``make_div`` rounds it
STANDARDISED_EPS, NORM_EPS = 1e-8, 1e-5
SAME = "SAME"
LAYER_TYPES = ("preactivation", "bottleneck")


@dataclass(frozen=True)
class BitConfig:
    """BiT-50 by default; names as in transformers' BitConfig. ``stages`` is how many are computed: 0 is the stem."""

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "preactivation"
    hidden_act: str = "relu"
    global_padding: str | None = None
    num_groups: int = 32
    embedding_dynamic_padding: bool = False
    output_stride: int = 32
    width_factor: int = 1
    stages: int = 4


@dataclass(frozen=True)
class Window:
    """The window that a convolution or a pooling moves over an image: its sizes, and how the image is padded."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    same: bool = False  # so that ``size`` becomes ceil(size / stride), as in TensorFlow

    def padding(self, size: int) -> tuple[int, int]:
        """Return the padding before and after ``size`` rows or columns; the larger half comes after."""
        reach = self.dilation * (self.kernel - 1)
        if not self.same:
            both = (self.stride - 1 + reach) // 2
            return both, both
        total = max((-(-size // self.stride) - 1) * self.stride + reach + 1 - size, 0)
        return total // 2, total - total // 2

    def output(self, size: int) -> int:
        """Return how many rows or columns the result has."""
        return (size + sum(self.padding(size)) - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


@dataclass(frozen=True)
class Layer:
    """The sizes of one residual layer: ``window`` is that of its 3x3 convolution."""

    inputs: int
    middle: int
    outputs: int
    window: Window
    first: bool  # of its stage: its shortcut is a convolution


def rounded_width(width: float) -> int:
    """Round a width to a multiple of WIDTH_MULTIPLE that is not below 90 % of it."""
    rounded = max(WIDTH_MULTIPLE, int(width + WIDTH_MULTIPLE / 2) // WIDTH_MULTIPLE * WIDTH_MULTIPLE)
    return rounded + WIDTH_MULTIPLE if rounded < 0.9 * width else rounded


def stages_of(config: BitConfig) -> Iterator[list[Layer]]:
    """Yield the layers of each computed stage. Past ``output_stride`` a stage dilates its windows instead of moving."""
    inputs, reduced, dilation = config.embedding_size, STEM_STRIDE * POOL_STRIDE, 1
    for stage in range(config.stages):
        outputs = rounded_width(config.hidden_sizes[stage] * config.width_factor)
        stride = 1 if stage == 0 else 2
        if reduced >= config.output_stride:
            dilation, stride = dilation * stride, 1
        reduced *= stride
        layers = []
        for place in range(config.depths[stage]):
            first = place == 0
            dilated = dilation if not first else (1 if dilation <= 2 else 2)
            if config.layer_type == "preactivation":
                dilated = 1  # as in transformers, whose layers of this type leave the dilation out
            window = Window(3, stride if first else 1, dilated, config.global_padding == SAME)
            layers.append(Layer(inputs, rounded_width(outputs / BOTTLENECK), outputs, window, first))
            inputs = outputs
        yield layers


def feature_map(config: BitConfig, image_size: Size) -> tuple[int, int, int]:
    """Return the channels, rows and columns of the feature map of an image; below 1 where the image is too small."""
    windows, channels = [stem_window(config)], config.embedding_size
    for layers in stages_of(config):
        windows += [layer.window for layer in layers]
        channels = layers[-1].outputs
    sides = []
    for size in image_size:
        for place, window in enumerate(windows):
            size = window.output(size)
            if place == 0:
                size = pooled_size(config, size)
        sides.append(size)
    return channels, sides[0], sides[1]


def norm_widths(config: BitConfig) -> Iterator[int]:
    """Yield the widths that are normalised in groups, as often as they occur."""
    before = config.layer_type == "preactivation"
    if not before:
        yield config.embedding_size
    for layers in stages_of(config):
        for layer in layers:
            yield from (layer.middle, layer.inputs if before else layer.outputs)


def stem_window(config: BitConfig) -> Window:
    return Window(STEM_KERNEL, STEM_STRIDE, same=config.global_padding == SAME)


def pooled_size(config: BitConfig, size: int) -> int:
    """Return how many rows or columns the stem's pooling leaves of ``size``."""
    size += 0 if config.global_padding == SAME else 2  # see Embedder
    if config.embedding_dynamic_padding:
        return Window(POOL_KERNEL, POOL_STRIDE, same=True).output(size)
    return (size - POOL_KERNEL) // POOL_STRIDE + 1


def converted_weight(weight: Tensor) -> Tensor:
    """Return a stored weight as the module has it.

    Each output channel of a convolution's (out, in, height, width) gets mean 0 and variance 1. Those of a
    normalisation, (C,), become (C, 1, 1).
    """
    if weight.ndim == 1:
        return weight[:, None, None]
    if weight.ndim != 4:
        return weight
    flat = weight.double().flatten(1)
    variance = flat.var(1, correction=0, keepdim=True)
    flat = (flat - flat.mean(1, keepdim=True)) / torch.sqrt(variance + STANDARDISED_EPS)
    return flat.view_as(weight).float()


class Convolution(nn.Conv2d):
    """A convolution without bias, padded by its ``window``; its weight is standardised."""

    def __init__(self, inputs: int, outputs: int, window: Window) -> None:
        super().__init__(inputs, outputs, window.kernel, window.stride, dilation=window.dilation, bias=False)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.window.padding(size) for size in x.shape[2:])
        if rows[0] == rows[1] and columns[0] == columns[1]:
            both = (rows[0], columns[0])
            return F.conv2d(x, self.weight, None, self.stride, both, self.dilation)
        return F.conv2d(F.pad(x, (*columns, *rows)), self.weight, None, self.stride, 0, self.dilation)


class GroupNorm(nn.Module):
    """Group normalisation of ``x`` (B, C, H, W), and an activation.

    Written by instance normalisation over (B, G, C / G * H * W), for which ONNX Runtime has a kernel that adds up each
    row by itself. Of ONNX's GroupNormalization it makes a dozen operators, which take twice as long.
    """

    def __init__(self, groups: int, channels: int, activation: str | None) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.activation = ACTIVATIONS[activation] if activation else None

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        grouped = x.reshape(B, self.groups, C // self.groups * H * W)
        x = F.instance_norm(grouped, eps=NORM_EPS).reshape(B, C, H, W)
        x = x * self.weight + self.bias
        return x if self.activation is None else self.activation(x)


class Embedder(nn.Module):
    """The stem: a 7x7 convolution and a pooling, each of which halves the image.

    What is padded is padded with zeros, for the pooling too: where nothing precedes it that makes all values positive,
    its maxima at the border are not those of the image alone. Without "same" padding a border of zeros is added before
    the normalisation, which counts them.
    """

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.config = config
        self.convolution = Convolution(config.num_channels, config.embedding_size, stem_window(config))
        self.norm = None
        if config.layer_type == "bottleneck":
            self.norm = GroupNorm(config.num_groups, config.embedding_size, config.hidden_act)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.convolution(pixel_values)
        if self.config.global_padding != SAME:
            x = F.pad(x, (1, 1, 1, 1))
        if self.norm is not None:
            x = self.norm(x)
        if self.config.embedding_dynamic_padding:
            rows, columns = (Window(POOL_KERNEL, POOL_STRIDE, same=True).padding(size) for size in x.shape[2:])
            x = F.pad(x, (*columns, *rows))
        return F.max_pool2d(x, POOL_KERNEL, POOL_STRIDE)


class Downsample(nn.Module):
    """The shortcut of a stage's first layer: a 1x1 convolution, normalised unless the layer is of "preactivation"."""

    def __init__(self, config: BitConfig, layer: Layer) -> None:
        super().__init__()
        window = Window(1, layer.window.stride, same=layer.window.same)
        self.conv = Convolution(layer.inputs, layer.outputs, window)
        self.norm = GroupNorm(config.num_groups, layer.outputs, None) if config.layer_type == "bottleneck" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class PreActivationLayer(nn.Module):
    """Normalised before each convolution (He et al., 2016, arXiv:1603.05027): x + conv3(conv2(conv1(x)))."""

    def __init__(self, config: BitConfig, layer: Layer) -> None:
        super().__init__()
        same, groups, activation = layer.window.same, config.num_groups, config.hidden_act
        self.downsample = Downsample(config, layer) if layer.first else None
        self.norm1 = GroupNorm(groups, layer.inputs, activation)
        self.conv1 = Convolution(layer.inputs, layer.middle, Window(1, same=same))
        self.norm2 = GroupNorm(groups, layer.middle, activation)
        self.conv2 = Convolution(layer.middle, layer.middle, layer.window)
        self.norm3 = GroupNorm(groups, layer.middle, activation)
        self.conv3 = Convolution(layer.middle, layer.outputs, Window(1, same=same))

    def forward(self, x: Tensor) -> Tensor:
        normalised = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(normalised)
        x = self.norm2(self.conv1(normalised))
        return self.conv3(self.norm3(self.conv2(x))) + shortcut  # type: ignore[no-any-return]


class BottleneckLayer(nn.Module):
    """Normalised after each convolution, activated after the sum: the layer of the hybrid ViT."""

    def __init__(self, config: BitConfig, layer: Layer) -> None:
        super().__init__()
        same, groups, activation = layer.window.same, config.num_groups, config.hidden_act
        self.downsample = Downsample(config, layer) if layer.first else None
        self.conv1 = Convolution(layer.inputs, layer.middle, Window(1, same=same))
        self.norm1 = GroupNorm(groups, layer.middle, activation)
        self.conv2 = Convolution(layer.middle, layer.middle, layer.window)
        self.norm2 = GroupNorm(groups, layer.middle, activation)
        self.conv3 = Convolution(layer.middle, layer.outputs, Window(1, same=same))
        self.norm3 = GroupNorm(groups, layer.outputs, None)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.activation(self.norm3(self.conv3(x)) + shortcut)


class Stage(nn.Module):
    """Residual layers of one width; the first changes it, and the size of the feature map."""

    def __init__(self, config: BitConfig, layers: list[Layer]) -> None:
        super().__init__()
        kind = BottleneckLayer if config.layer_type == "bottleneck" else PreActivationLayer
        self.layers = nn.Sequential(*(kind(config, layer) for layer in layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Bit(nn.Module):
    """The stem and the stages: ``forward(pixel_values)``, float32 (B, C, height, width), returns the feature map."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.embedder = Embedder(config)
        stages = nn.ModuleList(Stage(config, layers) for layers in stages_of(config))
        self.encoder = nn.ModuleDict({"stages": stages})

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embedder(pixel_values)
        for stage in self.encoder["stages"]:  # type: ignore[attr-defined]
            x = stage(x)
        return x  # type: ignore[no-any-return]
