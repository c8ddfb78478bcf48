"""Inject outlier channels into checkpoints: the same function in FP32, activations that INT8 cannot represent.

    python benchmarks/outliers.py --work DIR [NAME...]        make them, export both in FP32, compare

Trained Transformers of some size have a few channels that are 20 to 60 times as loud as the others (Dettmers et al.,
2022, "LLM.int8()", arXiv:2208.07339); one scale for the whole tensor then leaves the others a handful of steps. The
small reference models have none, so some are made here, by what SmoothQuant (Xiao et al., 2022, arXiv:2211.10438)
does backwards: a few channels of a tensor times 20 to 60, the rows of the next weights that read them divided by as
much.

- Pre-norm models (ViT, GPT-2, CLIP): gain and bias of each LayerNorm before a Linear.
- Post-norm models (BERT, MiniLM, Transformer): a LayerNorm's output is the residual stream as well, so nothing after
  it can take the factor back. Here it is the value projection's output channels, and the output projection that reads
  them: attention mixes tokens and leaves channels alone. A substitute: the loud tensor is another one, and it is no
  LayerNorm's output, which is all that SmoothQuant as published can smooth.

The channels are those that are loudest already, over all layers of a width together, and so the same in every layer, as
in the wild: a quiet channel times 20 would be no outlier.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from transom.export.reference_models import reference_folders
from transom.models.checkpoint import open_checkpoint

LEAST, MOST = 20.0, 60.0  # times as loud; the channels are spread between, geometrically
CHANNELS = 3  # of each tensor


@dataclass(frozen=True)
class Pair:
    """Modules of a layer by the ends of their names: the one whose output gets outliers, and the Linears that read it.

    ``norm``: the first is a LayerNorm, whose weight is a gain per channel. ``columns``: Linears store (in, out), as
    GPT-2's do, instead of (out, in).
    """

    loud: str
    readers: tuple[str, ...]
    norm: bool
    columns: bool = False


PAIRS = {  # model_type of config.json -> where outliers go
    "vit": (
        Pair("layernorm_before", tuple(f"attention.attention.{part}" for part in ("query", "key", "value")), norm=True),
        Pair("layernorm_after", ("intermediate.dense",), norm=True),
    ),
    "gpt2": (
        Pair("ln_1", ("attn.c_attn",), norm=True, columns=True),
        Pair("ln_2", ("mlp.c_fc",), norm=True, columns=True),
    ),
    "clip": (
        Pair("layer_norm1", tuple(f"self_attn.{part}_proj" for part in "qkv"), norm=True),
        Pair("layer_norm2", ("mlp.fc1",), norm=True),
    ),
    "bert": (Pair("attention.self.value", ("attention.output.dense",), norm=False),),
    "transformer": (
        Pair("self_attn.v_proj", ("self_attn.out_proj",), norm=False),
        Pair("encoder_attn.v_proj", ("encoder_attn.out_proj",), norm=False),
    ),
}
PAIRS["marian"] = PAIRS["transformer"]


def inject(source: str, out: Path, *, channels: int = CHANNELS, least: float = LEAST, most: float = MOST) -> list[str]:
    """Copy the checkpoint SOURCE to the folder ``out`` with outliers; return the names of the changed modules.

    Weights are stored as float32: in float16 a factor and its inverse would not cancel. Raises KeyError for a
    model_type that PAIRS does not have, ValueError where a checkpoint has none of the parts or is sharded.
    """
    checkpoint = open_checkpoint(source, reference_folders())
    if len(checkpoint.weight_files) != 1:
        raise ValueError(f"{source} has {len(checkpoint.weight_files)} weight files; expected one model.safetensors.")
    weights = {
        name: array.astype(np.float32) if array.dtype == np.float16 else array
        for name, array in load_file(checkpoint.weight_files[0]).items()
    }
    found = [
        (name.removesuffix(f"{pair.loud}.weight"), pair)
        for pair in PAIRS[checkpoint.config_json["model_type"]]
        for name in sorted(weights)
        if name.endswith(f".{pair.loud}.weight")
    ]
    if not found:
        raise ValueError(
            f"{source} has none of the parts {[pair.loud for pair in PAIRS[checkpoint.config_json['model_type']]]}."
        )
    sums: dict[int, NDArray[np.float32]] = {}  # by width: CLIP's towers may differ
    for layer, pair in found:
        channel = loudness(weights, layer, pair)
        sums[len(channel)] = sums.get(len(channel), np.zeros_like(channel)) + channel / channel.mean()
    factors = {width: factors_for(total, channels, least, most) for width, total in sums.items()}
    for layer, pair in found:
        make_loud(weights, layer, pair, factors[len(weights[f"{layer}{pair.loud}.bias"])])
    shutil.copytree(checkpoint.folder, out, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "README.md"))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return [layer + pair.loud for layer, pair in found]


def loudness(weights: dict[str, NDArray[Any]], layer: str, pair: Pair) -> NDArray[np.float32]:
    """Return the size of a module's output channels, (width,), by gain, or norm of a row, and bias."""
    weight, bias = (weights[f"{layer}{pair.loud}.{part}"] for part in ("weight", "bias"))
    gain = np.abs(weight) if pair.norm else np.linalg.norm(weight, axis=1)
    return np.asarray(np.hypot(gain, bias), np.float32)


def factors_for(loud: NDArray[np.float32], channels: int, least: float, most: float) -> NDArray[np.float32]:
    """Return factors (width,): from ``most`` for the largest channel to ``least``, for ``channels``; 1 for the rest."""
    factors = np.ones_like(loud)
    factors[np.argsort(-loud)[:channels]] = np.geomspace(most, least, channels)
    return factors


def make_loud(weights: dict[str, NDArray[Any]], layer: str, pair: Pair, factors: NDArray[np.float32]) -> None:
    """Multiply the output channels of one module by ``factors`` and divide the weights that read them."""
    loud = layer + pair.loud
    weights[f"{loud}.weight"] = weights[f"{loud}.weight"] * (factors if pair.norm else factors[:, None])
    weights[f"{loud}.bias"] = weights[f"{loud}.bias"] * factors
    for reader in pair.readers:
        name = f"{layer}{reader}.weight"
        weights[name] = weights[name] / (factors[:, None] if pair.columns else factors)


def outlier_checkpoint(name: str, work: Path) -> Path:
    """Return the folder of a reference model with outliers, made unless it exists."""
    folder = work / f"{name}-outliers-checkpoint"
    if not folder.exists():
        inject(name, folder)
    return folder


def main() -> None:
    from int8_cases import CASES, HeldOut, bundle_of, open_side

    from transom.export.reference_models import REFERENCE_MODELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and bundles go")
    options = parser.parse_args()
    print("| model | greatest difference in FP32 | on a scale of | score | with outliers |\n|---|---|---|---|---|")
    for case in (CASES[name] for name in options.names):
        paths = [bundle_of(case, options.work, outliers=outliers) for outliers in (False, True)]
        with open_side(case, paths[0]) as plain, open_side(case, paths[1]) as loud:
            held_out = HeldOut(plain)
            pairs = list(zip(held_out.answers(loud), held_out.reference, strict=True))
            difference = max(float(np.abs(a - b).max()) for a, b in pairs)
            scale = max(float(np.abs(b).max()) for _, b in pairs)
            scores = [REFERENCE_MODELS[case.name].score(side.loaded).value for side in (plain, loud)]
        print(f"| {case.name} | {difference:.1e} | {scale:.3g} | {scores[0]:.4f} | {scores[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
