"""Stage 2 of the reference Flamingo: a GPT learns the dialogues as text alone. It is given no image.

It learns the language, what is likely, and to answer questions about what a caption before them says; and is never
changed again.
"""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np
import torch
from digit_dialogues import CONTEXT, END_ID, Batches, unseen
from tokenizers import Tokenizer
from torch import Tensor, nn
from training_schedules import Updates

from transom.models.gpt import GPT, GPTConfig

SEED = 21
STEPS, ROWS, WARMUP = 2400, 24, 60
TALKS = 0.6  # of the dialogues: where a caption stands before a question, text alone has the answer


def text_config(vocabulary: int) -> GPTConfig:
    return GPTConfig(vocab_size=vocabulary, n_positions=CONTEXT, n_embd=64, n_layer=4, n_head=4, n_inner=256)


def text_config_json(found: GPTConfig) -> dict[str, object]:
    """Return the text_config of config.json."""
    ends = {f"{name}_token_id": END_ID for name in ("bos", "eos", "pad")}
    return {"model_type": "gpt2", **ends, **asdict(found)}


def initial(found: GPTConfig) -> GPT:
    """GPT-2's weights: normal ones of 0.02, smaller where a sublayer ends, zero biases."""
    model = GPT(found, "text-generation")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            ends = name.endswith("c_proj.weight")
            nn.init.normal_(parameter, std=0.02 / (2 * found.n_layer) ** 0.5 if ends else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model.train()


def text_inputs(tokens: Tensor, found: GPTConfig) -> tuple[Tensor, ...]:
    """The decoder's inputs for whole rows (B, S) at once: positions from 0, all logits, empty caches."""
    B, S = tokens.shape
    empty = [torch.zeros(B, found.n_head, S, found.n_embd // found.n_head) for _ in range(2 * found.n_layer)]
    return tokens, torch.zeros(B, dtype=torch.int64), torch.arange(S).expand(B, S), *empty


def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """The mean cross-entropy in nats of each token after the first, by its weight: (B, S, V), (B, S), (B, S) -> ()."""
    surprise = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return (surprise * weights[:, 1:]).sum() / weights[:, 1:].sum()


def train_language(tokenizer: Tokenizer, steps: int = STEPS) -> GPT:
    """The averaged weights after ``steps``; the last step ships, none is picked."""
    torch.manual_seed(SEED)
    batches = iter(Batches(tokenizer, unseen, np.random.RandomState(SEED), ROWS, TALKS))
    config = text_config(tokenizer.get_vocab_size())
    model = initial(config)
    updates = Updates(model, model.h.parameters(), WARMUP, steps)
    began = time.process_time()
    for step in range(1, steps + 1):
        batch = next(batches)
        logits, *_ = model(*text_inputs(batch.tokens, config))
        updates.apply(weighted_loss(logits, batch.tokens, batch.weights))
        if step % 200 == 0:
            seconds = time.process_time() - began
            answers = weighted_loss(logits.detach(), batch.tokens, (batch.weights == 1).float())
            print(f"stage 2, step {step} of {steps}, {seconds:.0f} s: answers {answers:.3f} nats a token", flush=True)
    updates.finish()
    return model
