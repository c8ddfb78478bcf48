"""Trains the reference Transformer to turn dates as people write them into ISO 8601, and writes its checkpoint folder.

    python examples/train_transformer_dates.py --out DIR       tokenizer, weights, scores
    python examples/train_transformer_dates.py --dev           how its settings were chosen: scored on days that train
                                                               otherwise; the held-out ones stay untouched

The model is transom.models.transformer, the paper's; dates.py makes the data and states the rules of numeric forms.
One thread and one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from dates import FORMS, HELD_OUT_FORMS, Form, held_out_pairs, pairs, split
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from transom.models.transformer import Transformer, TransformerConfig, computed

SEED = 20
STEPS, BATCH = 2400, 64
PEAK_LR, WARMUP, WEIGHT_DECAY = 2e-3, 200, 0.01
AVERAGE = 0.99  # decay of the weight average that ships, per step

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
CHARACTERS = sorted(
    {character for form in FORMS + HELD_OUT_FORMS for day in split()[0][:3000] for character in form(day)}
)
VOCABULARY = {token: number for number, token in enumerate([PAD, END, UNKNOWN, *CHARACTERS])}
CONFIG = TransformerConfig(
    vocab_size=len(VOCABULARY),
    decoder_vocab_size=len(VOCABULARY),
    max_position_embeddings=64,
    d_model=64,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=256,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=256,
)
CONFIG_JSON = {
    "activation_function": CONFIG.activation_function,
    "architectures": ["TransformerForConditionalGeneration"],
    "d_model": CONFIG.d_model,
    "decoder_attention_heads": CONFIG.decoder_attention_heads,
    "decoder_ffn_dim": CONFIG.decoder_ffn_dim,
    "decoder_layers": CONFIG.decoder_layers,
    "decoder_start_token_id": VOCABULARY[PAD],
    "encoder_attention_heads": CONFIG.encoder_attention_heads,
    "encoder_ffn_dim": CONFIG.encoder_ffn_dim,
    "encoder_layers": CONFIG.encoder_layers,
    "eos_token_id": VOCABULARY[END],
    "is_encoder_decoder": True,
    "max_position_embeddings": CONFIG.max_position_embeddings,
    "model_type": "transformer",
    "pad_token_id": VOCABULARY[PAD],
    "position_layout": CONFIG.position_layout,
    "scale_embedding": CONFIG.scale_embedding,
    "share_encoder_decoder_embeddings": CONFIG.share_encoder_decoder_embeddings,
    "tie_word_embeddings": CONFIG.tie_word_embeddings,
    "vocab_size": CONFIG.vocab_size,
}
GENERATION = {
    "decoder_start_token_id": VOCABULARY[PAD],
    "eos_token_id": VOCABULARY[END],
    "max_new_tokens": 16,  # an ISO date and its end are 11
    "pad_token_id": VOCABULARY[PAD],
}
TOKENIZER_CONFIG = {
    "eos_token": END,
    "model_max_length": CONFIG.max_position_embeddings,
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


def logits_of(model: Transformer, source: Tensor, target: Tensor) -> Tensor:
    """What follows each token of ``target`` (B, T), given those before it: (B, T, V). The cache starts empty."""
    mask = (source != VOCABULARY[PAD]).long()
    _, *cross = model.encode(source, mask)
    B, T = target.shape
    heads = CONFIG.decoder_attention_heads
    caches = [torch.zeros(B, heads, T, CONFIG.d_model // heads) for _ in range(2 * CONFIG.decoder_layers)]
    every = torch.arange(T).expand(B, T)
    return model.decode(target, mask, torch.zeros(B, dtype=torch.long), every, *cross, *caches)[0]


def train(tokenizer: Tokenizer, steps: int, *, dev: bool) -> Transformer:
    """The averaged weights after ``steps``; the last step ships, none is picked."""
    torch.manual_seed(SEED)
    rng = np.random.RandomState(SEED)
    days, _ = split(dev=dev)
    model = initial()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    began = time.perf_counter()
    for step in range(1, steps + 1):
        texts, dates = zip(*pairs(days, FORMS, BATCH, rng), strict=True)
        source, expected = encode(tokenizer, list(texts)), encode(tokenizer, list(dates))
        target = torch.roll(expected, 1, dims=1)  # every ISO date is as long as the others: no padding
        target[:, 0] = CONFIG_JSON["decoder_start_token_id"]
        loss = nn.functional.cross_entropy(logits_of(model, source, target).transpose(1, 2), expected)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        if step % 200 == 0:
            print(f"step {step} of {steps}, {time.perf_counter() - began:.0f} s: loss {loss.item():.4f}", flush=True)
    model.load_state_dict(averaged.module.state_dict())
    return model.eval()


def initial() -> Transformer:
    """Glorot's weights, zero biases, embeddings of standard deviation d_model^-0.5, and positions that stay."""
    model = Transformer(CONFIG, "translation")
    for name, parameter in model.named_parameters():
        if "embed_positions" in name or name == "final_logits_bias":
            parameter.requires_grad_(False)
            parameter.data = computed(CONFIG)[name]
        elif name == "shared.weight":
            nn.init.normal_(parameter, std=CONFIG.d_model**-0.5)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model.train()


def learning_rate(step: int, steps: int) -> float:
    """Up in a line, down as a cosine to a hundredth; a factor of the peak."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2


@torch.inference_mode()
def translate(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The most probable character each time."""
    source = encode(tokenizer, texts)
    target = torch.full((len(texts), 1), VOCABULARY[PAD])
    for _ in range(GENERATION["max_new_tokens"]):
        best = logits_of(model, source, target)[:, -1:].argmax(-1)
        target = torch.cat([target, best], dim=1)
    rows = [row[: row.index(VOCABULARY[END])] if VOCABULARY[END] in row else row for row in target[:, 1:].tolist()]
    return tokenizer.decode_batch(rows)


def correct(model: Transformer, tokenizer: Tokenizer, cases: list[tuple[str, str]]) -> int:
    texts, dates = zip(*cases, strict=True)
    return sum(a == b for a, b in zip(translate(model, tokenizer, list(texts)), dates, strict=True))


def report(model: Transformer, tokenizer: Tokenizer, *, dev: bool) -> None:
    for name, forms in (("trained forms", FORMS), ("held-out forms", HELD_OUT_FORMS)):
        cases = held_out_pairs(forms, dev=dev)
        print(f"{name}: {correct(model, tokenizer, cases)} of {len(cases)}")
    for form in HELD_OUT_FORMS:
        each: tuple[Form, ...] = (form,)
        cases = held_out_pairs(each, dev=dev)
        print(f"  such as {cases[0][0]!r}: {correct(model, tokenizer, cases)} of {len(cases)}")


def save(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Return the weights in FP16, without those that config.json determines: positions and a bias of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": w.half() for name, w in model.state_dict().items() if name not in computed(CONFIG)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": CONFIG_JSON,
        "generation_config.json": GENERATION,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--dev", action="store_true", help="score on days that choose settings")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.dev == (arguments.out is not None):
        parser.error("give either --out DIR or --dev")

    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    began = time.perf_counter()
    tokenizer = make_tokenizer()
    model = train(tokenizer, arguments.steps, dev=arguments.dev)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{parameters} parameters, {time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        save(model, tokenizer, arguments.out)
        model.load_state_dict({name: weight.half().float() for name, weight in model.state_dict().items()})  # as stored
    report(model, tokenizer, dev=arguments.dev)


if __name__ == "__main__":
    main()
