"""Trains the reference CLIP on scikit-learn's digits with captions, and writes it as a Hugging Face checkpoint folder.

    python examples/train_clip_digits.py --out DIR       vocabulary, weights, preprocessing; scores of what was written
    python examples/train_clip_digits.py --dev           for choosing settings: held-out scans and unseen prompts stay
                                                         untouched, other scans and other prompts score instead

The scans are split as for the reference ViT (train_vit_digits.py). The prompts that score are in
export/data/digit_prompts.txt; none of them is among the templates of digit_captions.py, which train.
One thread and one seed.

CLIP's own loss (Radford et al. 2021, figure 3) takes the one caption beside an image as right and all others of the
batch as wrong. Of 64 captions here, six or so name the same digit as the image does, and it would push them away.
So the target is spread evenly over all captions of the batch that name the image's digit, and likewise for captions,
as in UniCL (Yang et al. 2022). This also draws all captions of a digit to one place, whatever their words.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from digit_captions import DEV, UNSEEN, WORDS, caption, templates
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from train_vit_digits import jitter, pixel_values, scans, split
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from transom.export.metrics import Accuracy

SEED = 20
VOCABULARY = 736
EPOCHS, BATCH = 200, 64
PEAK_LR, WARMUP, WEIGHT_DECAY = 2e-3, 0.05, 0.05  # the warm-up is a fraction of the steps
AVERAGE = 0.995  # decay of the weight average that ships, per step
LARGEST_SCALE = math.log(100)  # of the logits, as in CLIP's paper

START, END = "<|startoftext|>", "<|endoftext|>"  # the last two of the vocabulary
TOWER = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "projection_dim": 64}
CONFIG = CLIPConfig(
    projection_dim=64,
    text_config={
        **TOWER,
        "num_hidden_layers": 2,
        "max_position_embeddings": 48,
        "vocab_size": VOCABULARY,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": VOCABULARY - 1,
    },
    vision_config={**TOWER, "num_hidden_layers": 3, "image_size": 8, "patch_size": 2},
)
PREPROCESSOR = {
    "crop_size": {"height": 8, "width": 8},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 8},
}
TOKENIZER_CONFIG = {
    "bos_token": START,
    "eos_token": END,
    "model_max_length": CONFIG.text_config.max_position_embeddings,
    "pad_token": END,
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": END,
}


def train_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE of lower case, words closed by ``</w>``, on captions of every seventh template.

    The vocabulary is numbered as CLIP's: bytes, bytes that close a word, merges, START and END. The trainer breaks
    ties by the numbers of the pieces, assigned in no fixed order, except to those it is given.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [f"{letter}</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2, special_tokens=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    blank = CLIPTokenizer()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = blank.backend_tokenizer.normalizer
    trained.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    rng = np.random.RandomState(SEED)
    trained.train_from_iterator((each.format(WORDS[rng.randint(10)]) for each in templates()[::7]), trainer)
    vocabulary = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(left + right for left, right in merges), START, END]
    if len(set(tokens)) != VOCABULARY or vocabulary.keys() != set(tokens) - {START, END}:
        raise ValueError(f"the captions make a vocabulary of {len(set(tokens))}; expected {VOCABULARY}.")
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)


def train(tokenizer: CLIPTokenizer, images: Tensor, labels: Tensor, epochs: int) -> CLIPModel:
    """The averaged weights after ``epochs`` over ``images`` (N, 8, 8); the last step ships, none is picked."""
    torch.manual_seed(SEED)
    rng, image_rng = np.random.RandomState(SEED), torch.Generator().manual_seed(SEED)
    model = CLIPModel(CONFIG).train()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # the scale of the logits among them
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=epochs * steps, pct_start=WARMUP, cycle_momentum=False
    )
    began = time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images), generator=image_rng)
        for batch in order[: steps * BATCH].split(BATCH):
            text = tokenizer(captions(tokenizer, labels[batch], rng), padding=True, return_tensors="pt")
            outputs = model(pixel_values=pixel_values(jitter(images[batch], image_rng)), **text)
            loss = contrastive_loss(outputs.logits_per_image, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=LARGEST_SCALE)
            averaged.update_parameters(model)
        if epoch % 10 == 0:
            shown = f"loss {loss.item():.3f}, scale {model.logit_scale.exp().item():.1f}"
            print(f"epoch {epoch:3d}, {time.perf_counter() - began:.0f} s: {shown}", flush=True)
    model.load_state_dict(averaged.module.state_dict())
    return model.eval()


def captions(tokenizer: CLIPTokenizer, labels: Tensor, rng: np.random.RandomState) -> list[str]:
    """One for each label; those too long for the text tower are drawn again."""
    longest = CONFIG.text_config.max_position_embeddings
    found: list[str] = []
    while len(found) < len(labels):
        text = caption(int(labels[len(found)]), rng)
        if len(tokenizer.backend_tokenizer.encode(text).ids) <= longest:
            found.append(text)
    return found


def contrastive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy from images to captions and back, (B, B) -> scalar; right are all that share the digit."""
    same = (labels[:, None] == labels[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    both = nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
    return both / 2


@torch.inference_mode()
def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """(N, 3, 8, 8) -> (N, 64) of unit length."""
    return nn.functional.normalize(model.get_image_features(pixel_values=images).pooler_output, dim=-1)


@torch.inference_mode()
def embed_prompts(model: CLIPModel, tokenizer: CLIPTokenizer, templates: tuple[str, ...], names: list[str]) -> Tensor:
    """(templates, names, 64) of unit length."""
    texts = [template.format(name) for template in templates for name in names]
    text = tokenizer(texts, padding=True, return_tensors="pt")
    if text.input_ids.shape[1] > CONFIG.text_config.max_position_embeddings:
        raise ValueError(f"the longest prompt has {text.input_ids.shape[1]} tokens, more than the text tower reads.")
    vectors = nn.functional.normalize(model.get_text_features(**text).pooler_output, dim=-1)
    return vectors.view(len(templates), len(names), -1)


def report(
    model: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, labels: Tensor, prompts: tuple[str, ...]
) -> None:
    """Print the zero-shot accuracy of every prompt, and of their mean (Radford et al. 2021, section 3.1.4)."""
    pictures = embed_images(model, images)
    for kind, names in (("words", WORDS), ("numerals", [str(digit) for digit in range(10)])):
        texts = embed_prompts(model, tokenizer, prompts, names)
        mean = nn.functional.normalize(texts.mean(0), dim=-1)
        for prompt, vectors in zip((*prompts, "mean of these"), (*texts, mean), strict=True):
            right = ((pictures @ vectors.T).argmax(1) == labels).tolist()
            score = Accuracy.of_each("zero-shot accuracy", "scans", right)
            low, high = score.interval
            print(f"{kind:8s}  {score.correct} of {score.n} = {score.value:.2%} ({low:.2%} to {high:.2%})  {prompt}")


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Weights stored in FP16, to be loaded as FP32; vocab.json, merges.txt; preprocessing."""
    model.half().save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    config = {**json.loads((folder / "config.json").read_text()), "dtype": "float32"}
    contents = {
        "config.json": config,
        "preprocessor_config.json": PREPROCESSOR,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--dev", action="store_true", help="train on 4/5 of the training scans, score on the rest")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    if arguments.dev == (arguments.out is not None):
        parser.error("give either --out DIR or --dev")

    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    images, labels = scans()
    fitted, scored = split(labels)
    if arguments.dev:
        fitted, scored = np.delete(fitted, slice(0, None, 5)), fitted[::5]

    began = time.perf_counter()
    tokenizer = train_tokenizer()
    model = train(tokenizer, torch.from_numpy(images[fitted]), torch.from_numpy(labels[fitted]), arguments.epochs)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {time.perf_counter() - began:.0f} s")
    inputs = pixel_values(torch.from_numpy(images[scored]))
    if arguments.out is not None:  # as it ships
        save(model, tokenizer, arguments.out)
        model = CLIPModel.from_pretrained(arguments.out).eval()
        tokenizer = CLIPTokenizer.from_pretrained(arguments.out)
        pictures = [np.repeat(image[:, :, None], 3, axis=2) for image in images[scored]]
        inputs = CLIPImageProcessorPil.from_pretrained(arguments.out)(pictures, return_tensors="pt").pixel_values
    report(model, tokenizer, inputs, torch.from_numpy(labels[scored]), DEV if arguments.dev else UNSEEN)


if __name__ == "__main__":
    main()
