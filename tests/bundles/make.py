"""Make a small bundle of every family and precision, with the transom that is installed.

    python tests/bundles/make.py tests/bundles/0.2.0              # all of them: one for each family and precision
    python tests/bundles/make.py tests/bundles/0.2.0 gpt-int8     # these alone
    python tests/bundles/make.py tests/bundles/0.1.0 vit-int8-exact gpt-int8-fused gpt-fp32-native

Checkpoints have random weights and are made here. The reference ViT, in INT8 alone, is made where it is named.
``-fused`` and ``-native`` are in the name alone. With the first, a bundle's file for the CPU has operators of
com.microsoft; with the second, its graphs also have lists of fused operators. All that are made now have both.
bundle.json records where the checkpoint was; ``forget_folder`` takes the path of the machine out of it again. README.md
beside this file describes the bundles and says when to make new ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import string
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from transom.cli.main import app
from transom.runtime.families import FAMILIES
from transom.runtime.host import instruction_set
from transom.runtime.manifest import MANIFEST, PRECISIONS, QUANTIZED, manifest_sha256

TESTS = Path(__file__).resolve().parents[1]
SAMPLES = 12  # for calibration, a quarter of them held out; at least 8 are asked for
LENGTH = 7  # bound of S, and the number of token ids in a sample
VOCABULARY = 32  # tokens, where there is no tokenizer
LABELS = ("bad", "good", "mixed")
WORDS = ("the", "a", "of", "in", "is", "man", "city", "paris", "water", "day", "eats", "sees", "red", "green", "blue")

FUSED, NATIVE = "fused", "native"
HIDDEN, INTERMEDIATE, SIDE = 16, 40, 8  # 40: two INT4 blocks of 32, the second one padded. SIDE in pixels
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = {**SIZES, "image_size": SIDE, "patch_size": 4}
WINDOWS = {
    "image_size": SIDE,
    "patch_size": 2,
    "embed_dim": HIDDEN,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 2,
    "mlp_ratio": INTERMEDIATE / HIDDEN,
}
HEAD = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}

# The reference ViT in INT8: options of its export, and whether sums of 8-bit products saturate on the processor that
# makes it. They did in version 0.1.0 on the instruction sets SATURATING; later versions add them up exactly.
SATURATING = ("avx512", "avx2")
REFERENCE: dict[str, tuple[list[str], bool]] = {
    "vit-int8-exact": ([], False),
    "vit-int8-saturated": ([], True),
    "vit-int8-7bits": (["--weight-bits", "7"], True),
}


def bert(folder: Path) -> None:
    """Write a classifier of texts with a WordPiece vocabulary of 23 tokens."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", ".", "!"]
    save(folder, "BertForSequenceClassification", vocab_size=len(tokens), max_position_embeddings=8, **SIZES, **HEAD)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')


def clip(folder: Path) -> None:
    """Write both towers with a BPE vocabulary of letters: each alone, and each at the end of a word."""
    letters = string.ascii_lowercase
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    last = len(tokens) - 1
    special = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    text = {**SIZES, **special, "vocab_size": len(tokens), "max_position_embeddings": LENGTH}
    save(folder, "CLIPModel", projection_dim=8, text_config=text, vision_config=VISION)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH}))
    pixels = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    write_processor(folder, {"image_processor_type": "CLIPImageProcessor", **pixels})


def electra(folder: Path) -> None:
    """Write a discriminator of tokens with BERT's vocabulary of 23 tokens, its embeddings half as wide."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", ".", "!"]
    sizes = {**SIZES, "embedding_size": HIDDEN // 2, "max_position_embeddings": 8}
    save(folder, "ElectraForPreTraining", vocab_size=len(tokens), kind=("ElectraConfig", {}), **sizes)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')


def flamingo(folder: Path) -> None:
    """Write a ViT of images of 8x8 pixels and a GPT-2 with one gated block between them, and a tokenizer of words."""
    sys.path[:0] = [str(TESTS / "support"), str(TESTS)]
    from flamingo_models import write_flamingo

    write_flamingo(
        folder,
        gates=1.0,
        seed=8,
        text_config={"n_embd": HIDDEN, "n_inner": INTERMEDIATE, "n_layer": 1, "n_positions": 16},
        vision_config={"image_size": [SIDE, SIDE], "num_hidden_layers": 1},
        resampler_config={"depth": 1},
        cross_attention_every_n_layers=1,
        max_images=2,
    )


def gpt(folder: Path) -> None:
    """Write a GPT-2 without a tokenizer: it takes token ids."""
    sizes = {"n_embd": HIDDEN, "n_inner": INTERMEDIATE, "n_layer": 1, "n_head": 2, "n_positions": 16}
    save(folder, "GPT2LMHeadModel", vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=VOCABULARY - 1, **sizes)


PERCEIVER = {
    "num_latents": 4,
    "d_latents": HIDDEN,
    "d_model": HIDDEN,
    "num_self_attends_per_block": 1,
    "num_blocks": 2,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "qk_channels": HIDDEN,
    "v_channels": HIDDEN,
    "max_position_embeddings": 8,
}


def perceiver(folder: Path) -> None:
    """Write a classifier of the pixels of images of 8x8, with Fourier features."""
    kind = ("PerceiverConfig", PERCEIVER)
    save(folder, "PerceiverForImageClassificationFourier", kind=kind, **HEAD)
    size = {"height": SIDE, "width": SIDE}
    write_processor(folder, {"image_processor_type": "PerceiverImageProcessor", "size": size, "crop_size": size})


def perceiver_bytes(folder: Path) -> None:
    """Write a masked language model on bytes, whose tokenizer has no files."""
    save(folder, "PerceiverForMaskedLM", kind=("PerceiverConfig", PERCEIVER))


def seq2seq(folder: Path) -> None:
    """Write one with attention and without a tokenizer: it takes token ids."""
    sys.path[:0] = [str(TESTS / "support"), str(TESTS)]
    from recurrent_models import write_seq2seq

    sizes = {"vocab_size": VOCABULARY, "decoder_vocab_size": VOCABULARY, "max_target_positions": 16}
    write_seq2seq(folder, encoder_layers=1, decoder_layers=1, max_source_positions=16, **sizes)


def show_attend_tell(folder: Path) -> None:
    """Write a captioner of images of 8x8 pixels, with its tokenizer of words."""
    sys.path[:0] = [str(TESTS / "support"), str(TESTS)]
    from recurrent_models import write_captioner

    write_captioner(folder, image_size=(SIDE, SIDE), max_target_positions=16)


def swin(folder: Path) -> None:
    """Write a classifier of images of 8x8 pixels: 4x4 patches in windows of 2, one layer of them shifted, then 2x2."""
    save(folder, "SwinForImageClassification", kind=("SwinConfig", {}), **WINDOWS, **HEAD)
    write_processor(folder, {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}})


def swinv2(folder: Path) -> None:
    """Write the same of Swin v2."""
    sizes = {**WINDOWS, "pretrained_window_sizes": [0, 0]}
    save(folder, "Swinv2ForImageClassification", kind=("Swinv2Config", {}), **sizes, **HEAD)
    write_processor(folder, {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}})


def transformer(folder: Path) -> None:
    """Write a Marian without a tokenizer: it takes token ids."""
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": HIDDEN, "encoder_ffn_dim": INTERMEDIATE, "decoder_ffn_dim": INTERMEDIATE}
    last = {"pad_token_id": VOCABULARY - 1, "decoder_start_token_id": VOCABULARY - 1}
    save(folder, "MarianMTModel", vocab_size=VOCABULARY, max_position_embeddings=16, **layers, **sizes, **last)


def vit(folder: Path) -> None:
    """Write a classifier of images of 8x8 pixels in four patches."""
    save(folder, "ViTForImageClassification", **VISION, **HEAD)
    write_processor(folder, {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}})


def vit_hybrid(folder: Path) -> None:
    """Write a classifier of images of 8x8 pixels, whose feature map of 2x2 makes four patches.

    The 3x3 convolution of the one stage has 32 channels: INT8 takes it.
    """
    sys.path[:0] = [str(TESTS / "support"), str(TESTS)]
    from vit_hybrid_models import save_hybrid

    backbone = {"embedding_size": 8, "hidden_sizes": [128], "depths": [1], "out_features": ["stage1"]}
    sizes = {**SIZES, **HEAD, "image_size": SIDE}
    save_hybrid(folder, "ViTHybridForImageClassification", backbone_config=backbone, **sizes)


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "bert": bert,
    "clip": clip,
    "electra": electra,
    "flamingo": flamingo,
    "gpt": gpt,
    "perceiver": perceiver,
    "perceiver-bytes": perceiver_bytes,
    "seq2seq": seq2seq,
    "show_attend_tell": show_attend_tell,
    "swin": swin,
    "swinv2": swinv2,
    "transformer": transformer,
    "vit": vit,
    "vit_hybrid": vit_hybrid,
}
IMAGES = ("vit", "vit_hybrid", "show_attend_tell", "swin", "swinv2", "perceiver")
BOUNDS = {name: ["B=2"] for name in (*IMAGES, "flamingo")}  # of axes; the others' are B=2 and S
DATA = {  # files of ``write_data``
    "bert": ["sentences.txt"],
    "clip": ["words.txt", "pixels.npz"],
    "electra": ["sentences.txt"],
    "flamingo": ["questions.npz"],
    "gpt": ["ids.npz"],
    "perceiver": ["pixels.npz"],
    "perceiver-bytes": ["words.txt"],
    "seq2seq": ["ids.npz"],
    "show_attend_tell": ["pixels.npz"],
    "swin": ["pixels.npz"],
    "swinv2": ["pixels.npz"],
    "transformer": ["ids.npz"],
    "vit": ["pixels.npz"],
    "vit_hybrid": ["pixels.npz"],
}


def save(folder: Path, architecture: str, **config: Any) -> None:
    """Write a checkpoint with random weights as the tests do, then raise them.

    In layers this narrow, weights of deviation 0.2 would make outputs that hardly depend on the inputs: matrices are
    doubled, the weights of LayerNorm are around one, and CLIP's cosines count e^2 times.
    """
    from safetensors.numpy import load_file, save_file

    sys.path[:0] = [str(TESTS / "support"), str(TESTS)]
    from conftest import save_checkpoint

    save_checkpoint(folder, architecture, tokenizer=False, **config)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, array in weights.items():
        if array.ndim == 0:
            weights[name] = np.asarray(2.0, array.dtype)
        elif array.ndim > 1:
            weights[name] = 2 * array
        elif name.endswith(".weight"):
            weights[name] = 1 + array
    save_file(weights, file, metadata={"format": "pt"})


def write_processor(folder: Path, settings: dict[str, object]) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def write_data(folder: Path) -> None:
    """Write SAMPLES calibration samples of each kind; neighbouring pixels are alike, as those of photographs are."""
    random = np.random.default_rng(0)
    places = ("city", "water")
    sentences = [f"the {who} {does} the {where}" for who in WORDS[5:8] for does in WORDS[10:12] for where in places]
    assert len(sentences) == SAMPLES
    (folder / "sentences.txt").write_text("\n".join(sentences))
    words = ("cat", "dog", "cow", "fox", "hen", "owl", "pig", "rat", "bat", "bee", "ant", "elk")
    assert len(words) == SAMPLES
    (folder / "words.txt").write_text("\n".join(words))
    pixels = random.standard_normal((SAMPLES, 3, SIDE, SIDE)).cumsum(3) / 2
    np.savez(folder / "pixels.npz", pixel_values=pixels.astype(np.float32))
    np.savez(folder / "ids.npz", input_ids=random.integers(2, VOCABULARY - 1, (SAMPLES, LENGTH)))
    questions = np.concatenate([np.ones((SAMPLES, 1), int), random.integers(3, VOCABULARY - 1, (SAMPLES, 3))], axis=1)
    np.savez(folder / "questions.npz", input_ids=questions, pixel_values=pixels.astype(np.float32))  # 1 marks the image


def export(source: str, out: Path, *options: str) -> None:
    """Run ``transom export`` in this process; raise SystemExit where it fails."""
    done = CliRunner().invoke(app, ["export", source, "--out", str(out), *options], prog_name="transom")
    if done.exit_code != 0:
        sys.exit(f"{out.name}: {done.output}")
    print(out.name, sum(path.stat().st_size for path in out.iterdir()), "bytes", flush=True)


def forget_folder(bundle: Path, folder: Path) -> None:
    """Make source.checkpoint of a bundle relative to ``folder``; all else in bundle.json but its hash stays."""
    text = (bundle / MANIFEST).read_text(encoding="utf-8")
    before = json.loads(text)
    text = text.replace(f"{folder.resolve().as_posix()}/", "")
    text = text.replace(before["manifest_sha256"], manifest_sha256(json.loads(text)))
    (bundle / MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def plain(name: str) -> str:
    """Return the name of a bundle without what it says of the form of its files."""
    return name.removesuffix(f"-{FUSED}").removesuffix(f"-{NATIVE}")


def make(name: str, out: Path) -> None:
    """Make a bundle; the current folder holds the calibration data and receives the checkpoint."""
    if name in REFERENCE:
        options, saturates = REFERENCE[name]
        if (instruction_set() in SATURATING) != saturates:
            kind = f"one of {', '.join(SATURATING)}" if saturates else f"none of {', '.join(SATURATING)}"
            sys.exit(f"{name}: this processor has {instruction_set()}, expected {kind}; make it on such a one.")
        export("vit", out, "--max", "B=2", "--precision", "int8", "--calibration-data", "digits", *options)
        return
    family, precision, *form = plain(name).split("-")
    kind = "-".join([family, *form])
    checkpoint = Path("checkpoints", kind)
    if not checkpoint.exists():
        CHECKPOINTS[kind](checkpoint)
    options = [word for bound in BOUNDS.get(kind, ["B=2", f"S={LENGTH}"]) for word in ("--max", bound)]
    if precision in QUANTIZED:
        options += [word for file in DATA[kind] for word in ("--calibration-data", file)] + ["--no-gate"]
    export(checkpoint.as_posix(), out, "--precision", precision, *options)
    forget_folder(out, Path())


def main() -> None:
    kinds = [kind.partition("-") for family in FAMILIES for kind in CHECKPOINTS if kind.partition("-")[0] == family]
    small = [f"{family}-{precision}{dash}{form}" for family, dash, form in kinds for precision in PRECISIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the bundles, called like the version: tests/bundles/0.2.0")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([*small, *REFERENCE])}")
    arguments = parser.parse_args()
    unknown = sorted(name for name in {*arguments.names} - {*REFERENCE} if plain(name) not in small)
    if unknown:
        parser.error(f"unknown bundles: {', '.join(unknown)}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        write_data(Path())
        for name in arguments.names or small:
            make(name, out / name)


if __name__ == "__main__":
    main()
