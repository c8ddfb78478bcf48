"""Trains the reference Perceiver on the pixels of scikit-learn's digits and writes its checkpoint folder.

    python examples/train_perceiver_digits.py --out DIR        config, weights and preprocessing
    python examples/train_perceiver_digits.py --dev            how its settings were chosen

The scans, their split, the augmentation and the training are those of train_vit_digits.py. What differs is the model:
it sees 64 single pixels with Fourier features of their place, and no patches.
"""

from __future__ import annotations

from train_vit_digits import run
from transformers import PerceiverConfig, PerceiverForImageClassificationFourier

CONFIG = PerceiverConfig(
    num_latents=16,
    d_latents=64,
    num_blocks=2,
    num_self_attends_per_block=2,
    num_self_attention_heads=4,
    num_cross_attention_heads=4,
    qk_channels=64,
    v_channels=64,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.1,  # 1/sqrt(width), roughly: with 0.02 a model this narrow begins too flat
    image_size=8,
    id2label={i: str(i) for i in range(10)},
    label2id={str(i): i for i in range(10)},
)
PREPROCESSOR = {
    "crop_size": {"height": 8, "width": 8},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "PerceiverImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
    "size": {"height": 8, "width": 8},
}


def main() -> None:
    run(__doc__, lambda: PerceiverForImageClassificationFourier(CONFIG), PREPROCESSOR)


if __name__ == "__main__":
    main()
