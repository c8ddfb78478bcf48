"""Trains the reference GPT on Jane Austen's novels, an in-context task mixed in, and writes its checkpoint folder.

    python examples/train_gpt.py JANEAUSTEN --out DIR       tokenizer, weights, scores (austen.py says how to get
                                                            JANEAUSTEN)
    python examples/train_gpt.py JANEAUSTEN --dev           for choosing settings: the held-out chapters stay untouched,
                                                            another of each novel scores instead
    python examples/train_gpt.py JANEAUSTEN --baseline      the n-grams alone, for every order, on the latter

One thread and one seed. Every step reads windows of the text and prompts of
in_context.py; of these, the answers weigh most, since the digits are noise.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from austen import split
from byte_ngrams import KneserNey
from in_context import batch as task_batch
from in_context import flags, table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from transom.export.scores import bits_per_byte

SEED = 20
VOCABULARY = 1024
END = "<|endoftext|>"
STEPS = 3400
WINDOWS, PROMPTS = 8, 16  # rows of a step: windows of text, prompts of the in-context task
PEAK_LR, PEAK_LR_OTHERS = 0.02, 3e-3  # of Muon (Jordan et al., 2024) for the layers' matrices, AdamW for the rest
WARMUP, WEIGHT_DECAY = 100, 0.05
FRAME = 0.1  # weight of what is not an answer in a prompt
AVERAGE = 0.995  # decay of the weight average that ships, per step
ORDERS = (3, 4, 5, 6, 7, 8)  # of the n-grams; ORDER is what --baseline found best
ORDER = 8

CONFIG = GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=256,
    n_embd=128,
    n_layer=4,
    n_head=4,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
GENERATION = {"bos_token_id": 0, "eos_token_id": 0, "max_new_tokens": 64, "pad_token_id": 0}
TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": END,
    "eos_token": END,
    "model_max_length": 256,
    "pad_token": END,
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": END,
}


def train_tokenizer(chapters: list[str]) -> Tokenizer:
    """Byte-level BPE as GPT-2's, on the training text and enough prompts that their parts become tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters + task_batch(np.random.RandomState(SEED), 4000), trainer)
    return tokenizer


def train(tokenizer: Tokenizer, chapters: list[str], steps: int) -> GPT2LMHeadModel:
    """The averaged weights after ``steps``; the last step ships, none is picked."""
    torch.manual_seed(SEED)
    rng = np.random.RandomState(SEED)
    text = np.array([token for chapter in chapters for token in [0, *tokenizer.encode(chapter).ids]])
    print(f"{len(text)} tokens, {sum(len(c.encode()) for c in chapters) / len(text):.2f} bytes each", flush=True)
    model = GPT2LMHeadModel(CONFIG).train()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    hidden = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (".h." in name and p.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=PEAK_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=PEAK_LR_OTHERS, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: learning_rate(step, steps)) for each in optimizers
    ]
    window, began = CONFIG.n_positions, time.perf_counter()
    for step in range(1, steps + 1):
        starts = rng.randint(0, len(text) - window, WINDOWS)
        prose = torch.from_numpy(np.stack([text[start : start + window] for start in starts]))
        prompts = np.array([encoded.ids for encoded in tokenizer.encode_batch(task_batch(rng, PROMPTS))])
        weights = torch.from_numpy(np.where(flags(prompts), 1.0, FRAME).astype(np.float32))
        with torch.autocast("cpu", torch.bfloat16):  # half as long again without
            text_loss = losses(model, prose).mean()
            task_losses, weights = losses(model, torch.from_numpy(prompts)), weights[:, 1:]
        loss = text_loss + (task_losses * weights).sum() / weights.sum()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for updated in (*optimizers, *schedules):
            updated.step()
        averaged.update_parameters(model)
        if step % 200 == 0:
            answers = task_losses[:, 1::4].mean(0)  # by the number of examples before
            shown = " ".join(f"{answers[shots]:.2f}" for shots in (0, 1, 2, 4, 8))
            seconds = time.perf_counter() - began
            print(f"step {step} of {steps}, {seconds:.0f} s: text {text_loss:.3f}, answers {shown}", flush=True)
    model.load_state_dict(averaged.module.state_dict())
    return model.eval()


def learning_rate(step: int, steps: int) -> float:
    """Up in a line, down as a cosine to a hundredth; a factor of the peak."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2


def losses(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Cross-entropy of each token after the first: (B, S) -> (B, S-1), in nats."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, metavar="JANEAUSTEN", help="the unpacked Debian package")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--dev", action="store_true", help="score on chapters that choose settings")
    parser.add_argument("--baseline", action="store_true", help="only the n-grams, of every order, on those chapters")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.dev + arguments.baseline + (arguments.out is not None) != 1:
        parser.error("give one of --out DIR, --dev and --baseline")

    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    chapters, scored = split(arguments.package, dev=arguments.out is None)
    for order in ORDERS if arguments.baseline else (ORDER,):
        bits = KneserNey("".join(chapters).encode(), order).bits("".join(scored).encode())
        print(f"Kneser-Ney over bytes, order {order}: {bits.mean():.4f} bits per byte", flush=True)
    if arguments.baseline:
        return

    began = time.perf_counter()
    tokenizer = train_tokenizer(chapters)
    model = train(tokenizer, chapters, arguments.steps)
    if arguments.out is not None:
        save(model, tokenizer, arguments.out)
        model = GPT2LMHeadModel.from_pretrained(arguments.out).eval()  # as it ships
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {time.perf_counter() - began:.0f} s")

    report(model, tokenizer, "".join(scored))


def report(model: GPT2LMHeadModel, tokenizer: Tokenizer, text: str) -> None:
    """Print bits per byte of ``text``, and the accuracy of the in-context task."""
    score = bits_per_byte(lambda block: log_probabilities(model, tokenizer, block), text)
    low, high = score.interval
    print(f"{score.value:.4f} bits per byte, 95 % interval {low:.4f} to {high:.4f}, {score.n} blocks", flush=True)
    print("\n".join(table(lambda prompt: answer(model, tokenizer, prompt))))


@torch.inference_mode()
def log_probabilities(model: GPT2LMHeadModel, tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Of each token but the first, in nats. Windows share half a context, as in the runtime."""
    ids, context = torch.tensor([tokenizer.encode(text).ids]), CONFIG.n_positions
    found = np.empty(0)
    for first in range(0, ids.shape[1], context // 2):
        window = -losses(model, ids[:, first : first + context + 1])[0].double().numpy()
        found = np.append(found, window[len(found) - first :])
        if len(found) == ids.shape[1] - 1:
            break
    return found


@torch.inference_mode()
def answer(model: GPT2LMHeadModel, tokenizer: Tokenizer, prompt: str) -> str:
    """The most probable next token."""
    logits = model(torch.tensor([tokenizer.encode(prompt).ids])).logits
    return tokenizer.decode([int(logits[0, -1].argmax())])


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights stored in FP16, to be loaded as FP32; vocab.json and merges.txt."""
    model.half().save_pretrained(folder)
    tokenizer.model.save(str(folder))
    config = {**json.loads((folder / "config.json").read_text()), "dtype": "float32"}
    files = {
        "config.json": config,
        "generation_config.json": GENERATION,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
