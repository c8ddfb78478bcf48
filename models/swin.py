"""Swin (Liu et al., 2021, arXiv:2103.14030): attention within windows that shift, over maps that halve.

Shape letters as in attention.py and windows.py; C channels, E width of a stage, L labels. The image size is fixed at
export, and with it every stage's windows: what depends on them and on weights alone is computed when weights are loaded
and is constant in the graph.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.models.family import Family, Source
from transom.models.layers import Dense, TokenMean
from transom.models.patches import grid, resized_map
from transom.models.swin_config import Stage, SwinConfig, require_masks, swin_fields
from transom.models.windows import relative_index
from transom.runtime.errors import CheckpointError
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec

NORM_EPS = 1e-5  # of the LayerNorms of patches and of merged patches, whatever layer_norm_eps is


class Embeddings(nn.Module):
    """Patches by a strided convolution, normalised, learned positions added where the checkpoint has them."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        rows, columns = config.image_size
        self.pad = (0, -columns % config.patch_size[1], 0, -rows % config.patch_size[0])  # to whole patches
        projection = nn.Conv2d(
            config.num_channels, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.patch_embeddings = nn.ModuleDict({"projection": projection})
        self.norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        positions = config.stages[0].tokens if config.use_absolute_embeddings else 0
        self.position_embeddings = nn.Parameter(torch.zeros(1, positions, config.embed_dim)) if positions else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        if any(self.pad):
            pixel_values = F.pad(pixel_values, self.pad)
        x: Tensor = self.norm(self.patch_embeddings["projection"](pixel_values).flatten(2).transpose(1, 2))  # (B, S, E)
        return x if self.position_embeddings is None else x + self.position_embeddings


class WindowAttention(nn.Module):
    """Multi-head self-attention in each window, a bias for each relative position: section 3.2, equation 4.

    Windows are rows of the batch. Where masks differ between them, after a shift, they are heads instead, so that one
    mask serves the batch; so also where there is one head, for TensorRT's masked attention takes two or more.
    """

    APART: ClassVar = -100.0  # added to the scores of tokens that a shift made neighbours
    SCALE: ClassVar[float | None] = None  # of the scores: 1 / sqrt(D)
    order: Tensor  # what prepare computes
    places: Tensor
    mask: Tensor

    def __init__(self, config: SwinConfig, stage: Stage, shifted: bool) -> None:
        super().__init__()
        E, self.num_heads, self.windows = stage.width, stage.heads, stage.windows(shifted)
        self.folded = self.windows.count > 1 and (self.windows.shift > 0 or self.num_heads == 1)
        self.query, self.key, self.value = (nn.Linear(E, E, bias=biased) for biased in self.biased(config.qkv_bias))
        for name in ("order", "places", "mask"):
            self.register_buffer(name, None, persistent=False)
        self.register_load_state_dict_post_hook(lambda module, keys: module.prepare())  # type: ignore[no-untyped-call]
        self.init_bias(config, stage)

    def biased(self, qkv_bias: bool) -> tuple[bool, bool, bool]:
        """Return which of the projections have a bias."""
        return qkv_bias, qkv_bias, qkv_bias

    def init_bias(self, config: SwinConfig, stage: Stage) -> None:
        """Make the parameters of ``bias``."""
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * stage.side - 1) ** 2, stage.heads))

    def bias(self) -> Tensor:
        """Return what is added to the scores of each query and key: (H, N, N)."""
        return self.relative_position_bias_table[relative_index(self.windows.side)].permute(2, 0, 1)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the order of tokens and the mask, which depend on the image size and on weights alone.

        Each query's largest bias becomes 0, which no softmax sees: those of Swin v2 lie around 8, where BF16 has steps
        of 1/16. Now the biases that count most are the closest to 0, where the steps are the finest.
        """
        self.order, self.places = self.windows.order(), self.windows.places()
        bias = self.bias()
        mask = (bias - bias.amax(-1, keepdim=True)).unsqueeze(0)  # (1, H, N, N)
        if self.windows.shift:
            mask = mask + self.windows.apart().unsqueeze(1) * self.APART  # (W, H, N, N)
        elif self.folded:
            mask = mask.expand(self.windows.count, -1, -1, -1)
        self.mask = mask.flatten(0, 1).unsqueeze(0).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x`` (B, S, E): (B, S, E)."""
        x = self.to_windows(x)
        q, k, v = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        q, k = self.scored(q, k)
        return self.from_windows(self.join_heads(F.scaled_dot_product_attention(q, k, v, self.mask, scale=self.SCALE)))

    def scored(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as they are multiplied."""
        return q, k

    def to_windows(self, x: Tensor) -> Tensor:
        """Pad, shift and cut a map: (B, S, E) -> (B, W * N, E)."""
        if self.windows.padded != self.windows.size:
            x = F.pad(x, (0, 0, 0, 1))  # a token of zeros, which stands wherever padding is
        return x if self.windows.whole else x.index_select(1, self.order)

    def from_windows(self, x: Tensor) -> Tensor:
        """Put the tokens of a map back to their places: (B, W * N, E) -> (B, S, E)."""
        return x if self.windows.whole else x.index_select(1, self.places)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split the heads: (B, W * N, E) -> (B * W, H, N, D), or (B, W * H, N, D) where windows are heads."""
        W, N, H = self.windows.count, self.windows.side**2, self.num_heads
        if self.folded:
            return x.view(-1, W, N, H, x.shape[-1] // H).transpose(2, 3).flatten(1, 2)
        return x.view(-1, N, H, x.shape[-1] // H).transpose(1, 2)

    def join_heads(self, y: Tensor) -> Tensor:
        """Undo ``split_heads``: (B, W * N, E)."""
        W, N, H = self.windows.count, self.windows.side**2, self.num_heads
        if self.folded:
            y = y.view(-1, W, H, N, y.shape[-1])
        return y.transpose(-3, -2).reshape(-1, W * N, H * y.shape[-1])


class SelfAttention(nn.Module):
    """Window attention and its output projection; the parts are called ``self`` and ``output`` in checkpoints."""

    def __init__(self, attention: WindowAttention, stage: Stage) -> None:
        super().__init__()
        self.self = attention
        self.output = Dense(stage.width, stage.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.self(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm: x + Attention(LayerNorm(x)), then x + FeedForward(LayerNorm(x)): equation 3."""

    ATTENTION: ClassVar = WindowAttention

    def __init__(self, config: SwinConfig, stage: Stage, shifted: bool) -> None:
        super().__init__()
        E, wide = stage.width, int(config.mlp_ratio * stage.width)
        self.layernorm_before = nn.LayerNorm(E, eps=config.layer_norm_eps)
        self.attention = SelfAttention(self.ATTENTION(config, stage, shifted), stage)
        self.layernorm_after = nn.LayerNorm(E, eps=config.layer_norm_eps)
        self.intermediate = Dense(E, wide, config.hidden_act)
        self.output = Dense(wide, E)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(self.intermediate(self.layernorm_after(x)))  # type: ignore[no-any-return]


class PatchMerging(nn.Module):
    """Each square of 2 x 2 tokens becomes one, of twice the width: section 3.1. Odd maps are padded with zeros."""

    NORM_WIDTH: ClassVar = 4  # widths that are normalised: the four tokens, before the reduction

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.size = stage.size
        self.reduction = nn.Linear(4 * stage.width, 2 * stage.width, bias=False)
        self.norm = nn.LayerNorm(self.NORM_WIDTH * stage.width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Merge a map: (B, S, E) -> (B, S / 4, 2 E)."""
        return self.reduction(self.norm(self.squares(x)))  # type: ignore[no-any-return]

    def squares(self, x: Tensor) -> Tensor:
        """Join the tokens of each square, down before across: (B, S, E) -> (B, S / 4, 4 E)."""
        (rows, columns), E = self.size, x.shape[-1]
        if rows % 2 or columns % 2:
            x = F.pad(x.view(-1, rows, columns, E), (0, 0, 0, columns % 2, 0, rows % 2))
        x = x.view(-1, (rows + 1) // 2, 2, (columns + 1) // 2, 2, E)
        return x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)


class StageLayers(nn.Module):
    """The layers of a stage, every second one shifted, and the merging after it, called ``downsample``."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Swin(nn.Module):
    """The stages and, for classification, a linear head on the mean of the last map.

    ``forward(pixel_values)``, float32 (B, C, height, width), returns the outputs of ``graphs`` in order: ``logits``
    (B, L) where there is a head, ``pooler_output`` (B, E), ``last_hidden_state`` (B, S, E) of the last stage.
    """

    LAYER: ClassVar = Layer
    MERGING: ClassVar = PatchMerging

    def __init__(self, config: SwinConfig, task: str) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        *_, last = stages = config.stages
        layers = [
            StageLayers(
                [self.LAYER(config, stage, shifted=index % 2 == 1) for index in range(stage.depth)],
                None if stage is last else self.MERGING(stage),
            )
            for stage in stages
        ]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.layernorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mean_pooling = TokenMean()
        self.classifier = nn.Linear(config.width, config.num_labels) if task == "image-classification" else None

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        x = self.layernorm(self.encoder["layers"](self.embeddings(pixel_values)))
        pooled = self.mean_pooling(x)
        return (pooled, x) if self.classifier is None else (self.classifier(pooled), pooled, x)


def convert(name: str, stored: Tensor, config: SwinConfig) -> Tensor:
    """Resize learned positions (1, S, E) from the trained grid to the exported one, bicubic; keep the rest."""
    if name != "embeddings.position_embeddings" or stored.ndim != 3:
        return stored
    return resized_map(stored[0], grid(config.trained_image_size, config.patch_size), config.stages[0].size)[None]


# transformers 5 renamed v1's modules but writes files with the older names, which are used here; both load.
NEWER_NAMES = (
    *((rf"attention\.{name[0]}_proj\.", f"attention.self.{name}.") for name in ("query", "key", "value")),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"attention\.relative_position_bias\.", "attention.self."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)
COMPUTED = ("relative_position_index", "relative_coords_table", ".attn_mask")  # buffers that older versions stored


def rename(name: str, config: SwinConfig, task: str) -> str | None:
    """Return the module's name of a stored weight, the same but for prefixes; None for what ``task`` does not use."""
    name = re.sub(r"^swin(v2)?\.", "", name)
    for newer, older in NEWER_NAMES:
        name = re.sub(newer, older, name)
    if name.endswith(COMPUTED) or name.startswith("decoder.") or name == "embeddings.mask_token":  # masked modelling
        return None
    return None if name.startswith("classifier.") and task != "image-classification" else name


def config_from_source(source: Source) -> SwinConfig:
    """Read config.json; the image size is the checkpoint's unless the user asked for another.

    Raises CheckpointError for an image size at which a stage's map is smaller than one window: transformers shrinks
    the window and then fails, since the table of biases has another size.
    """
    config = SwinConfig(**swin_fields(source))
    side = config.window_size
    for index, stage in enumerate(config.stages):
        if min(stage.size) < side:
            whole = [side * patch * 2 ** (len(config.depths) - 1) for patch in config.patch_size]
            raise CheckpointError(
                f"the image size {config.image_size} gives stage {index + 1} of swin {stage.size} tokens, fewer than "
                f"one window of {side} x {side}, whose biases then fit nothing. Ask for a larger one: --image-size "
                f"{'x'.join(map(str, whole))} fits every stage."
            )
    require_masks(config)
    require_positions(config)
    return config


def require_positions(config: SwinConfig) -> None:
    """Raise CheckpointError where learned positions of the trained grid cannot be used on the exported one.

    transformers adds them as they are where there are as many as patches, and with ``interpolate_pos_encoding``
    resizes them, from a square grid and to whole patches alone.
    """
    trained = grid(config.trained_image_size, config.patch_size)
    if not config.use_absolute_embeddings or trained == config.stages[0].size:
        return
    whole = not any(size % patch for size, patch in zip(config.image_size, config.patch_size, strict=True))
    if trained[0] != trained[1] or not whole:
        raise CheckpointError(
            f"the absolute position embeddings are of {trained} patches, the image size {config.image_size} has "
            f"{config.stages[0].size}. They can be resized from a square grid to whole patches of "
            f"{config.patch_size}: leave --image-size out, or ask for a multiple of the patch size."
        )


def graphs(config: SwinConfig, task: str) -> tuple[Graph, ...]:
    """Return the one graph, with transformers' tensor names; the image size is fixed at export."""
    pixels = TensorSpec("pixel_values", "float32", ("B", config.num_channels, *config.image_size))
    outputs = [
        TensorSpec("pooler_output", "float32", ("B", config.width)),
        TensorSpec("last_hidden_state", "float32", ("B", config.stages[-1].tokens, config.width)),
    ]
    if task == "image-classification":
        outputs.insert(0, TensorSpec("logits", "float32", ("B", config.num_labels)))
    return (Graph("model", (pixels,), tuple(outputs)),)


def axes(config: SwinConfig) -> dict[str, Axis]:
    """Return the bounds of B."""
    return {"B": Axis(1, 1, 16)}


STAGES = "gives the maps of several stages, each with a norm of its own"  # a Backbone
MASKED = "gives back pixels that were masked"

FAMILY = Family(
    name="swin",
    model_types=("swin",),
    prefix="swin.",
    unprefixed_heads=("classifier.",),
    architectures={"SwinModel": "feature-extraction", "SwinForImageClassification": "image-classification"},
    tasks=("image-classification", "feature-extraction"),
    config=config_from_source,
    build=Swin,
    rename=rename,
    convert=convert,
    graphs=graphs,
    axes=axes,
    undefined={"SwinBackbone": STAGES},
    unread_heads={"SwinForMaskedImageModeling": MASKED},
)
