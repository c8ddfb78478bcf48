"""Trains the reference ViT on scikit-learn's digits and writes it as a Hugging Face checkpoint folder.

    python examples/train_vit_digits.py --out DIR        config, weights, preprocessing and the held-out scans
    python examples/train_vit_digits.py --dev            how its settings were chosen: held-out scans stay untouched

1,797 scans of 8x8 pixels are split once: 54 per digit (540) are held out, 1,257 train. ``--dev`` trains on four
fifths of the 1,257 and scores on the last fifth. One thread and one seed, so a run repeats itself on one machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

SEED = 20  # of the split, the first weights and the augmentation alike
HELD_OUT_PER_DIGIT = 54
EPOCHS = 200
BATCH = 64
PEAK_LR = 2e-3
WARMUP_EPOCHS = 10
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
AVERAGE = 0.995  # decay of the weight average that ships, per step: about ten epochs long

CONFIG = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=3,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    id2label={i: str(i) for i in range(10)},
    label2id={str(i): i for i in range(10)},
)
PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,  # bilinear
    "rescale_factor": 1 / 255,
    "size": {"height": 8, "width": 8},
}


def scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's digits in its own order: uint8 (1797, 8, 8) of 0..255, labels (1797,)."""
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def split(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training and of the held-out scans, each ascending; equally many held out of every digit."""
    rng = np.random.RandomState(SEED)  # the legacy generator: its stream is frozen across numpy versions
    held_out = np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(labels == d))[:HELD_OUT_PER_DIGIT] for d in range(10)])
    )
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def pixel_values(images: Tensor) -> Tensor:
    """Grey 0..255 (B, 8, 8) -> float32 (B, 3, 8, 8) in -1..1, as the image processor does."""
    return ((images.float() / 255 - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


def jitter(images: Tensor, rng: torch.Generator) -> Tensor:
    """Four scans in five turned by up to 9 degrees, stretched by up to 10 % and shifted by up to half a pixel."""
    B = len(images)
    random = (torch.rand(B, 5, generator=rng) * 2 - 1) * (torch.rand(B, 1, generator=rng) < 0.8)
    angle, width, height = random[:, 0] * 0.15, 1 + random[:, 1] * 0.1, 1 + random[:, 2] * 0.1
    x, y = random[:, 3:].T * (0.5 * 2 / 8)  # a pixel is 2/8 wide where the scan spans -1..1
    rows = [angle.cos() * width, -angle.sin() * height, x, angle.sin() * width, angle.cos() * height, y]
    grid = nn.functional.affine_grid(torch.stack(rows, 1).view(B, 2, 3), [B, 1, 8, 8], align_corners=False)
    return nn.functional.grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0]


def train(images: Tensor, labels: Tensor, make: Callable[[], PreTrainedModel], epochs: int = EPOCHS) -> PreTrainedModel:
    """The averaged weights of a new model after ``epochs`` passes over ``images`` (N, 8, 8); the last step ships."""
    torch.manual_seed(SEED)
    rng = torch.Generator().manual_seed(SEED)
    model = make().train()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=epochs * steps, pct_start=WARMUP_EPOCHS / epochs, cycle_momentum=False
    )
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=rng)
        for batch in order[: steps * BATCH].split(BATCH):
            logits = model(pixel_values=pixel_values(jitter(images[batch], rng))).logits
            loss = nn.functional.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
        if (epoch + 1) % 20 == 0:
            print(f"epoch {epoch + 1:3d}  last loss {loss.item():.3f}", flush=True)
    model.load_state_dict(averaged.module.state_dict())
    return model.eval()


@torch.no_grad()
def correct(model: PreTrainedModel, images: Tensor, labels: Tensor) -> int:
    return int((model(pixel_values=pixel_values(images)).logits.argmax(-1) == labels).sum())


def run(
    description: str | None,
    make: Callable[[], PreTrainedModel],
    preprocessor: dict[str, object],
    epochs: int = EPOCHS,
) -> Path | None:
    """Train and score what ``make`` returns as the command line asks; return the folder of its checkpoint, if any."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--dev", action="store_true", help="train on 4/5 of the training scans, score on the rest")
    arguments = parser.parse_args()
    if arguments.dev == (arguments.out is not None):
        parser.error("give either --out DIR or --dev")

    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    images, labels = scans()
    training, held_out = split(labels)
    fitted, scored = training, held_out
    if arguments.dev:
        fitted, scored = np.delete(training, slice(0, None, 5)), training[::5]

    began = time.perf_counter()
    model = train(torch.from_numpy(images[fitted]), torch.from_numpy(labels[fitted]), make, epochs)
    seconds = time.perf_counter() - began
    right = correct(model, torch.from_numpy(images[scored]), torch.from_numpy(labels[scored]))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(fitted)} scans, {seconds:.0f} s: {right} of {len(scored)} right")

    if arguments.out is not None:
        model.save_pretrained(arguments.out)
        (arguments.out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    out: Path | None = arguments.out
    return out


def main() -> None:
    out = run(__doc__, lambda: ViTForImageClassification(CONFIG), PREPROCESSOR)
    if out is not None:
        images, labels = scans()
        _, held_out = split(labels)
        save_file(
            {
                "images": images[held_out],
                "labels": labels[held_out].astype(np.uint8),
                "indices": held_out.astype(np.int16),
            },
            out / "digits_heldout.safetensors",
        )


if __name__ == "__main__":
    main()
