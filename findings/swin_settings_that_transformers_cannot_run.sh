#!/usr/bin/env bash
# transformers 5.23.0: two settings of Swin that its own definitions take and then cannot run.
#
# Swin v2 with use_absolute_embeddings has one position more than there are patches, and adding them raises
# RuntimeError, with and without interpolate_pos_encoding. Swin shrinks its window where a map is smaller than one, but
# not the table of position biases that belongs to it: RuntimeError as well. With use_absolute_embeddings off, and with
# maps of a window or more, both run.
#
# Needs python3 and the package registries. Leaves nothing behind. Exit status 1 where the behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0
cat >"$folder/swin.py" <<'PYTHON'
import sys

import torch
from transformers import SwinConfig, SwinModel, Swinv2Config, Swinv2Model

SIZES = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}


def outcome(model, size, **options):
    try:
        return str(tuple(model.eval()(torch.zeros(1, 3, size, size), **options).last_hidden_state.shape))
    except RuntimeError as error:
        return f"RuntimeError: {error}"


def swinv2(absolute):
    return Swinv2Model(
        Swinv2Config(image_size=32, use_absolute_embeddings=absolute, pretrained_window_sizes=[0, 0], **SIZES)
    )


swin = SwinModel(SwinConfig(image_size=32, **SIZES))
found = {
    "Swin v2, absolute positions": outcome(swinv2(True), 32),
    "Swin v2, absolute positions, interpolated": outcome(swinv2(True), 32, interpolate_pos_encoding=True),
    "Swin, windows of 4, then a map of 3 x 3": outcome(swin, 12),
    "Swin v2, no absolute positions": outcome(swinv2(False), 32),
    "Swin, windows of 4, then a map of 4 x 4": outcome(SwinModel(SwinConfig(image_size=32, **SIZES)), 16),
}
for name, what in found.items():
    print(f"{name}: {what}")
sys.exit(["RuntimeError" in what for what in found.values()] != [True, True, True, False, False])
PYTHON
"$folder/venv/bin/python" "$folder/swin.py"
