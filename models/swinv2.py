"""Swin v2 (Liu et al., 2022, arXiv:2111.09883): Swin with cosine attention, biases of an MLP, and norms after layers.

Shape letters as in swin.py. Windows follow the image size of config.json, whatever size is exported, as in
transformers: a stage whose map was smaller than a window in training has windows of that map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from transom.models import swin
from transom.models.family import Family, Source
from transom.models.layers import UnitLength
from transom.models.patches import grid
from transom.models.swin_config import Stage, SwinConfig, per_stage, require_masks, swin_fields
from transom.models.windows import relative_index
from transom.runtime.errors import CheckpointError

HIDDEN = 512  # units of the MLP that makes biases
MAX_SCALE = 100.0  # of the cosines: 1 / 0.01, section 3.2
MAX_BIAS = 16.0  # of a sigmoid
MAX_OFFSET = 8.0  # of relative coordinates before their logarithm: section 3.3


@dataclass(frozen=True)
class Swinv2Config(SwinConfig):
    """Swin v2-T by default; names as in transformers' config.json."""

    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)

    @property
    def stages(self) -> list[Stage]:
        """Return the stages; sides and shifts are those of the trained image's rows."""
        rows = grid(self.trained_image_size, self.patch_size)[0]
        stages = []
        for index, pretrained in enumerate(self.pretrained_window_sizes):
            trained = rows // 2**index
            side = min(trained, self.window_size)
            shift = 0 if trained <= side else self.window_size // 2
            stages.append(replace(self.stage(index, side, shift), pretrained_side=pretrained))
        return stages


class CosineAttention(swin.WindowAttention):
    """Window attention by cosines, scaled by head, with a continuous bias: sections 3.2 and 3.3."""

    APART: ClassVar = -200.0  # transformers adds its -100 twice
    SCALE: ClassVar[float | None] = 1.0
    head_scale: Tensor

    def init_bias(self, config: SwinConfig, stage: Stage) -> None:
        """Make the parameters of ``bias``, and of the scale."""
        self.pretrained_side = stage.pretrained_side or stage.side
        self.logit_scale = nn.Parameter(torch.zeros(stage.heads, 1, 1))
        self.continuous_position_bias_mlp = nn.Sequential(
            nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, stage.heads, bias=False)
        )
        self.unit_length = UnitLength()
        self.register_buffer("head_scale", None, persistent=False)

    def biased(self, qkv_bias: bool) -> tuple[bool, bool, bool]:
        """Return which of the projections have a bias: never the keys'."""
        return qkv_bias, False, qkv_bias

    def bias(self) -> Tensor:
        """Return the bias of each query and key, from log-spaced coordinates: (H, N, N)."""
        M = self.windows.side
        offsets = torch.arange(1 - M, M, dtype=torch.float32)
        table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)  # (2M - 1, 2M - 1, 2)
        table = table / max(self.pretrained_side - 1, 1) * MAX_OFFSET
        table = table.sign() * (table.abs() + 1).log2() / math.log2(MAX_OFFSET)
        bias: Tensor = self.continuous_position_bias_mlp(table).flatten(0, 1)[relative_index(M)].permute(2, 0, 1)
        return MAX_BIAS * bias.sigmoid()

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the scale of each head, too."""
        super().prepare()
        scale = self.logit_scale.clamp(max=math.log(MAX_SCALE)).exp()
        self.head_scale = scale.repeat(self.windows.count if self.folded else 1, 1, 1)

    def scored(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries of the scale's length and keys of length 1; a padded key, of zeros, stays zero."""
        return self.unit_length(q) * self.head_scale, self.unit_length(k)


class Layer(swin.Layer):
    """Residual post-norm: x + LayerNorm(Attention(x)), then x + LayerNorm(FeedForward(x)): section 3.2."""

    ATTENTION: ClassVar = CosineAttention

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layernorm_before(self.attention(x))
        return x + self.layernorm_after(self.output(self.intermediate(x)))  # type: ignore[no-any-return]


class PatchMerging(swin.PatchMerging):
    """Merging normalised after the reduction, as layers are."""

    NORM_WIDTH: ClassVar = 2

    def forward(self, x: Tensor) -> Tensor:
        """Merge a map: (B, S, E) -> (B, S / 4, 2 E)."""
        return self.norm(self.reduction(self.squares(x)))  # type: ignore[no-any-return]


class Swinv2(swin.Swin):
    """Swin of these layers; inputs and outputs as there."""

    LAYER: ClassVar = Layer
    MERGING: ClassVar = PatchMerging


def config_from_source(source: Source) -> Swinv2Config:
    """Read config.json; refuse what transformers 5.23 cannot compute either."""
    fields = swin_fields(source)
    if fields["use_absolute_embeddings"]:
        raise CheckpointError(
            "config.json: use_absolute_embeddings is set. transformers gives Swin v2 one position more than there are "
            "patches and cannot add them, so that no checkpoint shows what they mean. Use one without, or a Swin."
        )
    stages = len(fields["depths"])
    pretrained = per_stage(source.config_json, "pretrained_window_sizes", (0,) * stages, least=0)[:stages]
    if len(pretrained) != stages or 1 in pretrained:
        raise CheckpointError(
            f"config.json: pretrained_window_sizes are {list(pretrained)}; expected one for each of the {stages} "
            "stages: 0, or 2 or more, for coordinates are divided by one less. Correct them."
        )
    config = Swinv2Config(**fields, pretrained_window_sizes=pretrained)
    for index, stage in enumerate(config.stages):
        if stage.side < 1:
            raise CheckpointError(
                f"config.json: image_size {config.trained_image_size} leaves no row of tokens to stage {index + 1}, "
                "whose windows follow it. Use a checkpoint of larger images, or of fewer stages."
            )
    require_masks(config)
    return config


FAMILY = Family(
    name="swinv2",
    model_types=("swinv2",),
    prefix="swinv2.",
    unprefixed_heads=("classifier.",),
    architectures={"Swinv2Model": "feature-extraction", "Swinv2ForImageClassification": "image-classification"},
    tasks=swin.FAMILY.tasks,
    config=config_from_source,
    build=Swinv2,
    rename=swin.rename,
    convert=swin.convert,
    graphs=swin.graphs,
    axes=swin.axes,
    undefined={"Swinv2Backbone": swin.STAGES},
    unread_heads={"Swinv2ForMaskedImageModeling": swin.MASKED},
)
