"""Trains a reference seq2seq model to turn lists of dates into ISO 8601, and writes its checkpoint folder.

    python examples/train_seq2seq_dates.py --out DIR                   with attention: tokenizer, weights, scores
    python examples/train_seq2seq_dates.py --out DIR --no-attention    the same, the context one vector per source
    python examples/train_seq2seq_dates.py --dev [--no-attention]      how its settings were chosen: scored on days that
                                                                       train otherwise; the held-out ones stay untouched

The model is transom.models.seq2seq; date_lists.py makes the data. Both forms have the same sizes and data. With
attention 1600 steps are enough; without, that is too short: by --dev 17 of 150 lists of three dates are right after
1600 steps and 139 after 4800, so this form takes 4800. One thread and one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from date_lists import MOST, SEPARATOR, held_out_lists, lists
from dates import FORMS, split
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from transom.models.seq2seq import Seq2Seq, Seq2SeqConfig

SEED = 20
STEPS, STEPS_WITHOUT_ATTENTION, DATES_PER_BATCH = 1600, 4800, 192
GROWING = 0.3  # of the steps, in MOST equal parts: lists of one date, then of one or two, and so on
PEAK_LR, WARMUP = 3e-3, 100
AVERAGE = 0.99  # decay of the weight average that ships, per step
LISTS_AT_ONCE = 150  # lists that are translated together

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
CHARACTERS = sorted({character for form in FORMS for day in split()[0][:3000] for character in form(day) + SEPARATOR})
VOCABULARY = {token: number for number, token in enumerate([PAD, END, UNKNOWN, *CHARACTERS])}
GENERATION = {
    "decoder_start_token_id": VOCABULARY[PAD],
    "eos_token_id": VOCABULARY[END],
    "max_new_tokens": 72,  # six ISO dates, five spaces and the end are 66
    "pad_token_id": VOCABULARY[PAD],
}


def config(*, attention: bool) -> Seq2SeqConfig:
    return Seq2SeqConfig(
        vocab_size=len(VOCABULARY),
        decoder_vocab_size=len(VOCABULARY),
        embedding_size=32,
        encoder_hidden_size=96,
        decoder_hidden_size=128,
        encoder_layers=1,
        decoder_layers=1,
        attention_size=64,
        readout_size=64,
        attention=attention,
        max_source_positions=240,  # the longest list of six dates has 232 characters
        max_target_positions=80,
    )


def config_json(model: Seq2SeqConfig) -> dict[str, Any]:
    tokens = {name: GENERATION[name] for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
    types = {
        "architectures": ["Seq2SeqForConditionalGeneration"],
        "is_encoder_decoder": True,
        "model_type": "seq2seq",
    }
    return dict(sorted({**vars(model), **tokens, **types}.items()))


def tokenizer_config(model: Seq2SeqConfig) -> dict[str, Any]:
    return {
        "eos_token": END,
        "model_max_length": model.max_source_positions,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
    }


def make_tokenizer() -> Tokenizer:
    """One token per character, and an end."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, VOCABULARY[END])]
    )
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Int64 (B, S), padded."""
    tokenizer.enable_padding(pad_id=VOCABULARY[PAD], pad_token=PAD)
    ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
    tokenizer.no_padding()
    return ids


class Steps:
    """The decoder's steps over one batch of sources, int64 (B, S): the state moves with each."""

    def __init__(self, model: Seq2Seq, source: Tensor) -> None:
        self.model, self.layers = model, model.config.decoder_layers
        mask = (source != VOCABULARY[PAD]).long()
        encoded = model.encode(source, mask)
        self.source, self.states = encoded[: -self.layers], encoded[-self.layers :]
        if model.config.attention:
            self.source = (mask, *self.source)

    def __call__(self, tokens: Tensor) -> Tensor:
        """What follows ``tokens`` (B, 1), given those before: logits (B, 1, V)."""
        logits, *rest = self.model.decode(tokens, *self.source, *self.states)
        self.states = tuple(rest[-self.layers :])
        return logits


def logits_of(model: Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
    """What follows each token of ``target`` (B, T), given those before it: (B, T, V)."""
    step = Steps(model, source)
    return torch.cat([step(tokens) for tokens in target.split(1, dim=1)], dim=1)


def train(model: Seq2Seq, tokenizer: Tokenizer, steps: int, *, dev: bool) -> None:
    """Leave the averaged weights after ``steps`` in the model; the last step ships, none is picked."""
    rng = np.random.RandomState(SEED)
    days, _ = split(dev=dev)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    began = time.perf_counter()
    for step in range(1, steps + 1):
        dates = 1 + rng.randint(longest(step, steps))
        texts, isos = zip(*lists(days, dates, DATES_PER_BATCH // dates, rng), strict=True)
        source, expected = encode(tokenizer, list(texts)), encode(tokenizer, list(isos))
        target = torch.roll(expected, 1, dims=1)  # lists of as many dates are as long in ISO 8601: no padding
        target[:, 0] = GENERATION["decoder_start_token_id"]
        loss = nn.functional.cross_entropy(logits_of(model, source, target).transpose(1, 2), expected)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        if step % 100 == 0:
            print(
                f"step {step} of {steps}, {time.perf_counter() - began:.0f} s: loss {loss.item():.4f}, {dates} dates",
                flush=True,
            )
    model.load_state_dict(averaged.module.state_dict())
    model.eval()


def initial(*, attention: bool) -> Seq2Seq:
    """Glorot's weights, orthogonal ones between states, zero biases, and embeddings of standard deviation 1."""
    torch.manual_seed(SEED)
    model = Seq2Seq(config(attention=attention), "translation")
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter)
        elif parameter.ndim == 1:
            nn.init.zeros_(parameter)
        elif "weight_hh" in name or name.endswith("hidden.weight"):
            for gate in parameter.data.chunk(3):
                nn.init.orthogonal_(gate)
        else:
            nn.init.xavier_uniform_(parameter)
    return model.train()


def longest(step: int, steps: int) -> int:
    """How many dates a list may have at this step."""
    return min(MOST, 1 + int(MOST * step / (GROWING * steps)))


def learning_rate(step: int, steps: int) -> float:
    """Up in a line, down as a cosine to a hundredth; a factor of the peak."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2


@torch.inference_mode()
def translate(model: Seq2Seq, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The most probable character each time."""
    found: list[str] = []
    for first in range(0, len(texts), LISTS_AT_ONCE):
        source = encode(tokenizer, texts[first : first + LISTS_AT_ONCE])
        step, tokens = Steps(model, source), torch.full((len(source), 1), GENERATION["decoder_start_token_id"])
        written: list[Tensor] = []
        for _ in range(GENERATION["max_new_tokens"]):
            tokens = step(tokens).argmax(-1)
            written.append(tokens)
        rows = torch.cat(written, dim=1).tolist()
        found += tokenizer.decode_batch(
            [row[: row.index(VOCABULARY[END])] if VOCABULARY[END] in row else row for row in rows]
        )
    return found


def correct(model: Seq2Seq, tokenizer: Tokenizer, cases: list[tuple[str, str]]) -> int:
    texts, isos = zip(*cases, strict=True)
    return sum(a == b for a, b in zip(translate(model, tokenizer, list(texts)), isos, strict=True))


def report(model: Seq2Seq, tokenizer: Tokenizer, *, dev: bool) -> None:
    every = held_out_lists(dev=dev)
    for dates in range(1, MOST + 1):
        cases = [case for case in every if case[0].count(SEPARATOR) == dates - 1]
        print(f"lists of {dates}: {correct(model, tokenizer, cases)} of {len(cases)}")
    print(f"all lists: {correct(model, tokenizer, every)} of {len(every)}")


def save(model: Seq2Seq, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint, its weights in FP16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": weight.half() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": config_json(model.config),
        "generation_config.json": GENERATION,
        "tokenizer_config.json": tokenizer_config(model.config),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--no-attention", action="store_true", help="the decoder reads one vector per source")
    parser.add_argument("--dev", action="store_true", help="score on days that choose settings")
    parser.add_argument("--steps", type=int, help=f"{STEPS}; {STEPS_WITHOUT_ATTENTION} with --no-attention")
    arguments = parser.parse_args()
    if arguments.dev == (arguments.out is not None):
        parser.error("give either --out DIR or --dev")
    steps = arguments.steps or (STEPS_WITHOUT_ATTENTION if arguments.no_attention else STEPS)

    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    began = time.perf_counter()
    tokenizer = make_tokenizer()
    model = initial(attention=not arguments.no_attention)
    train(model, tokenizer, steps, dev=arguments.dev)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        save(model, tokenizer, arguments.out)
        model.load_state_dict({name: weight.half().float() for name, weight in model.state_dict().items()})  # as stored
    report(model, tokenizer, dev=arguments.dev)


if __name__ == "__main__":
    main()
