"""Trains the reference Show, Attend and Tell to caption images of digits, and writes its checkpoint folder.

    python examples/train_caption_digits.py --out DIR       tokenizer, weights, image processor, scores
    python examples/train_caption_digits.py --dev           how its settings were chosen: scored on a fifth of the
                                                            training scans; the held-out ones stay untouched

The model is transom.models.show_attend_tell, the paper's; digit_compositions.py makes the images and their captions.
Every step draws new images, whose scans are jittered as the reference ViT's. One thread and one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from digit_compositions import CAPTIONS, NAMES, UNSEEN, training
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from train_vit_digits import PREPROCESSOR as PREPROCESSOR_OF_VIT
from train_vit_digits import jitter, scans, split

from transom.calib.digit_compositions import CANVAS, SCAN, Composition
from transom.export.datasets import heldout_compositions
from transom.models.show_attend_tell import ShowAttendTell, ShowAttendTellConfig, doubly_stochastic_penalty

SEED = 20
STEPS, BATCH = 6000, 64
PEAK_LR, WARMUP, WEIGHT_DECAY = 2e-3, 300, 0.01
AVERAGE = 0.995  # decay of the weight average that ships, per step
LAMBDA = 0.003  # of the doubly stochastic penalty
CASES = 1000  # of each score of --dev

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
VOCABULARY = {token: number for number, token in enumerate([PAD, END, UNKNOWN, *WORDS])}
CONFIG = ShowAttendTellConfig(
    image_size=(CANVAS, CANVAS),
    depths=(1, 1, 1),
    hidden_sizes=(16, 32, 64),
    decoder_vocab_size=len(VOCABULARY),
    embedding_size=64,
    decoder_hidden_size=96,
    attention_size=64,
    max_target_positions=16,
)
CONFIG_JSON = {
    "architectures": ["ShowAttendTellForImageToText"],
    "decoder_start_token_id": VOCABULARY[PAD],
    "eos_token_id": VOCABULARY[END],
    "is_encoder_decoder": True,
    "model_type": "show_attend_tell",
    "pad_token_id": VOCABULARY[PAD],
    **asdict(CONFIG),
}
GENERATION = {
    "decoder_start_token_id": VOCABULARY[PAD],
    "eos_token_id": VOCABULARY[END],
    "max_new_tokens": 12,  # the longest caption and its end are 9
    "pad_token_id": VOCABULARY[PAD],
}
TOKENIZER_CONFIG = {
    "eos_token": END,
    "model_max_length": CONFIG.max_target_positions,
    "pad_token": PAD,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": UNKNOWN,
}
PREPROCESSOR = {**PREPROCESSOR_OF_VIT, "size": {"height": CANVAS, "width": CANVAS}}


def make_tokenizer() -> Tokenizer:
    """One token per word, and an end."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, VOCABULARY[END])]
    )
    tokenizer.enable_padding(pad_id=VOCABULARY[PAD], pad_token=PAD)
    return tokenizer


def drawn(compositions: list[Composition], images: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Pixels (B, 3, CANVAS, CANVAS) in -1..1, as the image processor gives them; ``rng`` jitters each scan."""
    numbers = torch.tensor([number for each in compositions for number, _, _ in each.places])
    chosen = images[numbers].float() if rng is None else jitter(images[numbers], rng)
    canvas = torch.zeros(len(compositions), CANVAS, CANVAS)
    spots = ((row, place) for row, each in enumerate(compositions) for place in each.places)
    for scan, (row, (_, top, left)) in zip(chosen, spots, strict=True):
        canvas[row, top : top + SCAN, left : left + SCAN] = scan
    return ((canvas / 255 - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


def read(model: ShowAttendTell, pixels: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) of each word given those before it, and the weights (B, T, L) that it was written with."""
    before = torch.roll(expected, 1, dims=1)
    before[:, 0] = GENERATION["decoder_start_token_id"]
    source = model.encode(pixels)
    keys, values, *state = source
    logits, weights = [], []
    for words in before.T:
        found, seen, *state = model.decode(words[:, None], keys, values, *state)
        logits.append(found)
        weights.append(seen)
    return torch.cat(logits, dim=1), torch.cat(weights, dim=1)


def train(tokenizer: Tokenizer, images: Tensor, labels: NDArray[np.int64], steps: int) -> ShowAttendTell:
    """The averaged weights after ``steps``; the last step ships, none is picked."""
    torch.manual_seed(SEED)
    rng, jitters = np.random.RandomState(SEED), torch.Generator().manual_seed(SEED)
    compositions = training(labels, rng)
    model = initial()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    began = time.perf_counter()
    for step in range(1, steps + 1):
        batch = list(islice(compositions, BATCH))
        encoded = tokenizer.encode_batch([each.caption for each in batch])
        expected = torch.tensor([each.ids for each in encoded])
        words = torch.tensor([each.attention_mask for each in encoded]).bool()
        logits, weights = read(model, drawn(batch, images, jitters), expected)
        surprise = nn.functional.cross_entropy(logits.transpose(1, 2), expected, reduction="none")
        penalty = doubly_stochastic_penalty(weights, words)
        loss = ((surprise * words).sum(1) + LAMBDA * penalty).mean()  # equation 14
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        if step % 200 == 0:
            nll = (surprise * words).sum(1).mean()
            print(
                f"step {step} of {steps}, {time.perf_counter() - began:.0f} s: {nll.item():.4f} nats a caption, "
                f"penalty {penalty.mean().item():.2f}",
                flush=True,
            )
    model.load_state_dict(averaged.module.state_dict())
    return model.eval()


def initial() -> ShowAttendTell:
    """He's weights for convolutions, Glorot's for the rest, zero biases; the cell begins by remembering."""
    model = ShowAttendTell(CONFIG, "image-to-text")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        elif name == "decoder.embed_tokens.weight":
            nn.init.normal_(parameter, std=CONFIG.embedding_size**-0.5)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
    H = CONFIG.decoder_hidden_size
    nn.init.ones_(model.decoder.cell.input.bias[H : 2 * H])  # the forget gate: Jozefowicz et al., 2015
    return model.train()


def learning_rate(step: int, steps: int) -> float:
    """Up in a line, down as a cosine to a hundredth; a factor of the peak."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2


@torch.inference_mode()
def captions(model: ShowAttendTell, tokenizer: Tokenizer, pixels: Tensor) -> list[str]:
    """The most probable word each time."""
    keys, values, *state = model.encode(pixels)
    words = torch.full((len(pixels), 1), GENERATION["decoder_start_token_id"])
    written = []
    for _ in range(GENERATION["max_new_tokens"]):
        logits, _, *state = model.decode(words, keys, values, *state)
        words = logits.argmax(-1)
        written.append(words)
    rows = torch.cat(written, dim=1).tolist()
    return tokenizer.decode_batch(
        [row[: row.index(VOCABULARY[END])] if VOCABULARY[END] in row else row for row in rows]
    )


@torch.inference_mode()
def attention_on_digits(
    model: ShowAttendTell, tokenizer: Tokenizer, pixels: Tensor, compositions: list[Composition]
) -> tuple[float, float, float]:
    """Attention that lies on a digit while its name is written, given the right words before it; averages.

    Returns the share of the weights on cells that the digit's scan covers in part, the share of the cells that it
    covers, which even weights would give, and how often the largest weight lies on one of them.
    """
    expected = torch.tensor([each.ids for each in tokenizer.encode_batch([each.caption for each in compositions])])
    _, weights = read(model, pixels, expected)
    (rows, columns), names = CONFIG.grid, {VOCABULARY[name] for name in NAMES}
    cell = CANVAS // rows
    shares, covered, hits = [], [], []
    for ids, seen, each in zip(expected.tolist(), weights, compositions, strict=True):
        steps = [step for step, word in enumerate(ids) if word in names]
        for step, (_, top, left) in zip(steps, each.places, strict=True):
            on = torch.zeros(rows, columns)
            on[top // cell : -(-(top + SCAN) // cell), left // cell : -(-(left + SCAN) // cell)] = 1
            shares.append(float((seen[step] * on.flatten()).sum()))
            covered.append(float(on.mean()))
            hits.append(bool(on.flatten()[seen[step].argmax()]))
    return float(np.mean(shares)), float(np.mean(covered)), float(np.mean(hits))


def report(model: ShowAttendTell, tokenizer: Tokenizer, images: Tensor, cases: list[Composition], title: str) -> None:
    pixels = drawn(cases, images)
    pairs = list(zip(captions(model, tokenizer, pixels), cases, strict=True))
    right = [found == each.caption for found, each in pairs]
    print(f"{title}: {sum(right)} of {len(cases)} right")
    for kind, chosen in {
        "one digit": [len(each.places) == 1 for each in cases],
        "two digits": [len(each.places) == 2 for each in cases],
        "two digits in a caption that never trains": [each.caption in UNSEEN for each in cases],
    }.items():
        print(f"  {kind}: {sum(r for r, c in zip(right, chosen, strict=True) if c)} of {sum(chosen)}")
    share, even, largest = attention_on_digits(model, tokenizer, pixels, cases)
    print(
        f"  attention on the digit that is named: {share:.1%} (its cells are {even:.1%}), largest weight {largest:.1%}"
    )
    for found, each in [pair for pair in pairs if pair[0] != pair[1].caption][:10]:
        print(f"  {found!r} for {each.caption!r}")


def save(model: ShowAttendTell, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint, its weights in FP16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": weight.half() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": CONFIG_JSON,
        "generation_config.json": GENERATION,
        "preprocessor_config.json": PREPROCESSOR,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tokenizer.no_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=VOCABULARY[PAD], pad_token=PAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--dev", action="store_true", help="score on every fifth training scan")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.dev == (arguments.out is not None):
        parser.error("give either --out DIR or --dev")

    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    every, digits = scans()
    fitted, _ = split(digits)
    if arguments.dev:
        fitted, scored = np.delete(fitted, slice(0, None, 5)), fitted[::5]
    began = time.perf_counter()
    tokenizer = make_tokenizer()
    model = train(tokenizer, torch.from_numpy(every[fitted]), digits[fitted], arguments.steps)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(fitted)} scans, {time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        save(model, tokenizer, arguments.out)
        model.load_state_dict({name: weight.half().float() for name, weight in model.state_dict().items()})  # as stored
        images, cases = heldout_compositions()
        report(model, tokenizer, torch.from_numpy(images), cases, "held-out compositions")
        return
    images = torch.from_numpy(every[scored])
    for title, unseen in (("captions that train", False), ("captions that never train", True)):
        cases = list(islice(training(digits[scored], np.random.RandomState(SEED), unseen=unseen), CASES))
        report(model, tokenizer, images, cases, title)


if __name__ == "__main__":
    main()
