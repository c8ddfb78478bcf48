"""Trains the reference Perceiver IO to fill gaps of single bytes in Jane Austen's novels, and writes its checkpoint.

    python examples/train_perceiver_bytes.py JANEAUSTEN --out DIR        weights and scores (austen.py says how to get
                                                                         JANEAUSTEN)
    python examples/train_perceiver_bytes.py JANEAUSTEN --dev            for choosing settings: the held-out chapters
                                                                         stay untouched, another of each novel scores

One thread and one seed. The gaps that score are every seventh byte, ``transom.export.datasets.byte_gaps``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from austen import split
from torch import Tensor, nn
from train_bert_mlm import learning_rate
from transformers import PerceiverConfig, PerceiverForMaskedLM, PerceiverTokenizer

from transom.export.datasets import byte_gaps

SEED = 20
STEPS, ROWS, TOKENS = 6000, 16, 128  # rows of a step and their length, [CLS] and [SEP] among it
PEAK_LR, WEIGHT_DECAY = 3e-3, 0.01
MASKED = 0.2  # of a row's bytes; of these 80 % become [MASK], 10 % any byte, 10 % stay, as in BERT's paper
AVERAGE = 0.995  # decay of the weight average that ships, per step
LOUDER = 3.0  # than the other weights, the embeddings of bytes
SHARPNESS = 2.0  # of the attention to positions at the start
BYTES = 256
MASK, CLS, SEP, FIRST = 3, 4, 5, 6  # ids of PerceiverTokenizer; FIRST is that of byte 0
CONFIG = PerceiverConfig(
    num_latents=64,
    d_latents=128,
    d_model=128,
    num_blocks=1,
    num_self_attends_per_block=4,
    num_self_attention_heads=8,
    num_cross_attention_heads=8,
    qk_channels=128,
    v_channels=128,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.06,
    vocab_size=FIRST + BYTES,
    max_position_embeddings=TOKENS,
)
WAVES = (0, 1, 3, 6, 11, 19, 33, 56)  # frequencies of which a head sees a place, without a common period


def train(text: np.ndarray, steps: int) -> PerceiverForMaskedLM:
    """The averaged weights after ``steps``; the last step ships, none is picked."""
    torch.manual_seed(SEED)
    rng = np.random.RandomState(SEED)
    model = PerceiverForMaskedLM(CONFIG).train()
    look_at_places(model)
    counts = torch.from_numpy(np.bincount(text, minlength=CONFIG.vocab_size)) + 1
    model.embedding_decoder.bias.data = (counts / counts.sum()).log().float()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    began = time.perf_counter()
    rights = []
    for step in range(1, steps + 1):
        true, given, chosen = rows(text, rng)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.perceiver(torch.from_numpy(given)).logits[torch.from_numpy(chosen)]
            logits = model.embedding_decoder(hidden[None], model.perceiver.input_preprocessor.embeddings)[0]
        loss = nn.functional.cross_entropy(logits.float(), torch.from_numpy(true[chosen]))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        rights.append((logits.argmax(-1).numpy() == true[chosen]).mean())
        if step % 100 == 0:
            seconds, right = time.perf_counter() - began, np.mean(rights[-100:])
            print(f"step {step} of {steps}, {seconds:.0f} s: loss {loss.item():.3f}, right {right:.3f}", flush=True)
    model.load_state_dict(averaged.module.state_dict())
    return model.eval()


@torch.no_grad()
def look_at_places(model: PerceiverForMaskedLM) -> None:
    """Where training begins: positions and latents are sines and cosines of a place, which heads look for.

    A latent stands for every second position. Its heads look from four bytes before it to three behind; the output's
    heads look at the latents around their own position. From random weights, a run of this length learned no more
    than how frequent each byte is.
    """
    E = CONFIG.d_model
    pairs = E // 2
    frequencies = math.pi * (torch.arange(pairs) + 0.5) / pairs  # up to 1/2 per byte, so that neighbours differ most

    def waves(places: Tensor) -> Tensor:
        angles = places[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    perceiver = model.perceiver
    positions = waves(torch.arange(CONFIG.max_position_embeddings))
    perceiver.input_preprocessor.embeddings.weight.mul_(LOUDER)  # which the logits are products with
    perceiver.input_preprocessor.position_embeddings.weight.copy_(
        1.5 * math.sqrt(2) * LOUDER * CONFIG.initializer_range * positions
    )
    for layer in perceiver.encoder.self_attends:  # else they drown what the latents have read
        layer.attention.output.dense.weight.mul_(0.3)
        layer.mlp.dense2.weight.mul_(0.3)
    perceiver.embeddings.latents.copy_(waves(torch.arange(CONFIG.num_latents) * (TOKENS / CONFIG.num_latents)))
    perceiver.decoder.output_position_encodings.position_embeddings.copy_(positions)
    sine = torch.tensor(WAVES)
    cosine = pairs + sine
    for attention, offsets in (
        (perceiver.encoder.cross_attention.attention.self, range(-4, 4)),
        (perceiver.decoder.decoding_cross_attention.attention.self, (0, 0, -2, 2, -4, 4, -6, 6)),
    ):
        D = attention.qk_channels_per_head
        for head, offset in enumerate(offsets):
            turn = (offset * frequencies[sine]).cos(), (offset * frequencies[sine]).sin()
            sines = head * D + torch.arange(len(WAVES))
            cosines = sines + len(WAVES)
            attention.query.weight[sines, sine] += SHARPNESS * turn[0]  # sin(a + b) = sin a cos b + cos a sin b
            attention.query.weight[sines, cosine] += SHARPNESS * turn[1]
            attention.query.weight[cosines, cosine] += SHARPNESS * turn[0]  # cos(a + b) = cos a cos b - sin a sin b
            attention.query.weight[cosines, sine] -= SHARPNESS * turn[1]
            attention.key.weight[sines, sine] += SHARPNESS
            attention.key.weight[cosines, cosine] += SHARPNESS


def rows(text: np.ndarray, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of the text as they are and with gaps, int64 (ROWS, TOKENS); and where the gaps are."""
    starts = rng.randint(0, len(text) - TOKENS, ROWS)
    true = np.stack([text[start : start + TOKENS] for start in starts])
    true[:, 0], true[:, -1] = CLS, SEP
    chosen = rng.rand(ROWS, TOKENS) < MASKED
    chosen[:, [0, -1]] = False
    lot = rng.rand(ROWS, TOKENS)
    given = np.where(chosen & (lot < 0.8), MASK, true)
    given = np.where(chosen & (lot >= 0.9), rng.randint(FIRST, FIRST + BYTES, true.shape), given)
    return true, given, chosen


def correct(model: PerceiverForMaskedLM, scored: Sequence[tuple[str, str]]) -> tuple[int, int]:
    """Gaps whose most probable byte is the one that was there, and how many there are."""
    tokenizer = PerceiverTokenizer()
    right = n = 0
    for text, answers in scored:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            best = model(ids).logits[0, : ids.shape[1]][ids[0] == MASK].argmax(-1)
        right += int((best == torch.tensor([FIRST + ord(answer) for answer in answers])).sum())
        n += len(answers)
    return right, n


def baselines(text: np.ndarray, scored: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Right answers of the most frequent byte, and of the most frequent between the same neighbours in training.

    Two on each side, else one on each side, else the one on the left, else the most frequent.
    """
    counts: dict[tuple[object, ...], Counter[int]] = defaultdict(Counter)
    for a, b, token, c, d in zip(*(text[k : len(text) - 4 + k].tolist() for k in range(5)), strict=True):
        counts[a, b, c, d][token] += 1
        counts[b, c][token] += 1
        counts[b, None][token] += 1
        counts[()][token] += 1
    best = {key: found.most_common(1)[0][0] for key, found in counts.items()}
    tokenizer = PerceiverTokenizer()
    right = Counter(frequency=0)
    for passage, answers in scored:
        ids = [CLS, *tokenizer(passage)["input_ids"], SEP]
        gaps = [place for place, token in enumerate(ids) if token == MASK]
        for place, answer in zip(gaps, answers, strict=True):
            a, b, _, c, d = ids[place - 2 : place + 3]
            one = best.get((b, c)) or best.get((b, None)) or best[()]
            for name, guess in (("frequency", best[()]), ("one", one), ("two", best.get((a, b, c, d)) or one)):
                right[name] += guess == FIRST + ord(answer)
    return dict(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, metavar="JANEAUSTEN", help="the unpacked Debian package")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--dev", action="store_true", help="score on chapters that choose settings")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.dev == (arguments.out is not None):
        parser.error("give either --out DIR or --dev")

    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    began = time.perf_counter()
    chapters, held_out = split(arguments.package, dev=arguments.dev)
    text = np.frombuffer("".join(chapters).encode(), np.uint8).astype(np.int64) + FIRST
    scored = byte_gaps("".join(held_out), TOKENS - 2)
    print(f"{len(text)} bytes; right without a model: {baselines(text, scored)}", flush=True)
    model = train(text, arguments.steps)
    if arguments.out is not None:
        save(model, arguments.out)
        model = PerceiverForMaskedLM.from_pretrained(arguments.out).eval()  # as it ships
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {time.perf_counter() - began:.0f} s")
    print("{} of {} gaps right".format(*correct(model, scored)))


def save(model: PerceiverForMaskedLM, folder: Path) -> None:
    """Weights stored in FP16, to be loaded as FP32, and the tokenizer's settings."""
    model.half().save_pretrained(folder)
    PerceiverTokenizer(model_max_length=TOKENS).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
