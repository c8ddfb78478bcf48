"""Stage 1 of the reference Flamingo: a ViT learns which digit each patch and each quarter of an image shows.

Its two heads are thrown away; what stays reads the images from then on and is never changed again.
"""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np
import torch
from digit_questions import QUARTER, composed, training_scans
from numpy.typing import NDArray
from torch import Tensor, nn
from train_vit_digits import jitter
from training_schedules import Updates

from transom.calib.digit_compositions import CANVAS, SCAN, Place
from transom.models.vit import ViT, ViTConfig

SEED = 20
STEPS, BATCH, WARMUP = 1300, 64, 60
LABEL_SMOOTHING = 0.05
PATCH = 4
EMPTY = 10  # the class of what shows no digit
CONFIG = ViTConfig(
    image_size=(CANVAS, CANVAS),
    trained_image_size=(CANVAS, CANVAS),
    patch_size=(PATCH, PATCH),
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    pooler_output_size=64,  # as a checkpoint without a pooler is read
)
CONFIG_JSON = {
    "model_type": "vit",
    "image_size": CANVAS,
    "patch_size": PATCH,
    **{
        name: value
        for name, value in asdict(CONFIG).items()
        if name.startswith(("num_channels", "hidden", "num_hidden", "num_att", "inter", "layer_norm", "qkv"))
    },
}


class Reader(nn.Module):
    """The ViT and the heads of its training: the digit of each patch, and from the class token of each quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = ViT(CONFIG, "feature-extraction")
        self.patches = nn.Linear(CONFIG.hidden_size, EMPTY + 1)
        self.quarters = nn.Linear(CONFIG.hidden_size, 4 * (EMPTY + 1))
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.05)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of patches (B, P, 11) and of quarters (B, 4, 11) for ``pixels`` (B, 3, CANVAS, CANVAS)."""
        (x,) = self.vit(pixels)
        return self.patches(x[:, 1:]), self.quarters(x[:, 0]).unflatten(1, (4, -1))


def draw(images: list[tuple[Place, ...]], scans: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Pixels (B, 3, CANVAS, CANVAS) in -1..1, as the image processor gives them; ``rng`` jitters each scan."""
    numbers = torch.tensor([number for places in images for number, _, _ in places])
    chosen = scans[numbers].float() if rng is None else jitter(scans[numbers], rng)
    canvas = torch.zeros(len(images), CANVAS, CANVAS)
    spots = ((row, place) for row, places in enumerate(images) for place in places)
    for scan, (row, (_, top, left)) in zip(chosen, spots, strict=True):
        canvas[row, top : top + SCAN, left : left + SCAN] = scan
    return ((canvas / 255 - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


def targets(images: list[tuple[Place, ...]], labels: NDArray[np.integer]) -> tuple[Tensor, Tensor]:
    """The digit that covers the middle of each patch (B, P) and that of each quarter (B, 4); EMPTY where none does."""
    covered = np.full((len(images), CANVAS, CANVAS), EMPTY)
    quarters = np.full((len(images), 2, 2), EMPTY)
    for row, places in enumerate(images):
        for number, top, left in places:
            covered[row, top : top + SCAN, left : left + SCAN] = labels[number]
            quarters[row, top // QUARTER, left // QUARTER] = labels[number]
    middles = covered[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    return torch.from_numpy(middles.reshape(len(images), -1)), torch.from_numpy(quarters.reshape(len(images), 4))


def train_vision(scans: Tensor, labels: NDArray[np.integer], steps: int = STEPS) -> Reader:
    """The averaged weights after ``steps``; the last step ships, none is picked."""
    torch.manual_seed(SEED)
    rng, jitters = np.random.RandomState(SEED), torch.Generator().manual_seed(SEED)
    pick = training_scans(labels, rng)
    model = Reader().train()
    updates = Updates(model, model.vit.encoder.parameters(), WARMUP, steps)
    began = time.process_time()
    for step in range(1, steps + 1):
        images = [composed(pick, rng)[1] for _ in range(BATCH)]
        of_patches, of_quarters = model(draw(images, scans, jitters))
        patches, quarters = targets(images, labels)
        loss = sum(
            nn.functional.cross_entropy(found.flatten(0, 1), wanted.flatten(), label_smoothing=LABEL_SMOOTHING)
            for found, wanted in ((of_patches, patches), (of_quarters, quarters))
        )
        updates.apply(loss)
        if step % 200 == 0:
            seconds = time.process_time() - began
            right = (of_quarters.argmax(-1) == quarters).float().mean()
            print(
                f"stage 1, step {step} of {steps}, {seconds:.0f} s: loss {loss:.3f}, quarters {right:.1%}", flush=True
            )
    updates.finish()
    return model


@torch.inference_mode()
def quarters_right(model: Reader, images: list[tuple[Place, ...]], scans: Tensor, labels: NDArray[np.integer]) -> float:
    """The share of the quarters of ``images`` that are read right, empty ones among them."""
    return float((model(draw(images, scans))[1].argmax(-1) == targets(images, labels)[1]).float().mean())
