"""Trains the reference BERT to fill gaps in Jane Austen's novels, and writes its checkpoint folder.

    python examples/train_bert_mlm.py JANEAUSTEN --out DIR        vocabulary, weights, scores (austen.py says how to
                                                                  get JANEAUSTEN), and austen_masked.tsv
    python examples/train_bert_mlm.py JANEAUSTEN --dev            for choosing settings: the held-out chapters stay
                                                                  untouched, another of each novel scores instead

One thread and one seed. Gaps that score are whole words of the vocabulary,
about one word in seven, drawn with a seed of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from austen import split
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import BertConfig, BertForMaskedLM

SEED = 20
VOCABULARY = 1800
STEPS, ROWS, TOKENS = 1800, 16, 128  # rows of a step and their length, [CLS] and [SEP] among it
PEAK_LR, WARMUP, WEIGHT_DECAY = 1.2e-3, 100, 0.01
MASKED = 0.25  # of a row's tokens; of these 80 % become [MASK], 10 % any token, 10 % stay, as in BERT's paper
AVERAGE = 0.995  # decay of the weight average that ships, per step
SHARPNESS = 4.0  # of the first layer's attention to neighbours, at the start
PASSAGE = 100  # tokens of a passage that scores, at most
GAPS = 0.15  # of its words

PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONFIG = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=512,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    pad_token_id=0,
)
TOKENIZER_CONFIG = {
    "cls_token": CLS,
    "do_lower_case": True,
    "mask_token": MASK,
    "model_max_length": 128,
    "pad_token": PAD,
    "sep_token": SEP,
    "tokenizer_class": "BertTokenizer",
    "unk_token": UNKNOWN,
}
Case = tuple[str, list[str]]  # a passage with gaps, and the words that were there


def train_tokenizer(chapters: list[str]) -> Tokenizer:
    """WordPiece in lower case, as BERT's.

    The trainer breaks ties by the numbers of the pieces, assigned in no fixed order, except to those it is given.
    """
    letters = sorted(set("".join(chapters).lower()) - {" ", "\n"})
    pieces = [f"##{letter}" for letter in letters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL + pieces, initial_alphabet=letters, show_progress=False
    )
    trained = lower_case(models.WordPiece(unk_token=UNKNOWN))
    trained.train_from_iterator(chapters, trainer)
    tokens = SPECIAL + sorted(trained.get_vocab().keys() - set(SPECIAL))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = lower_case(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(SPECIAL)
    ids = [(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{CLS} $A {SEP}", special_tokens=ids)
    return tokenizer


def lower_case(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train(tokenizer: Tokenizer, text: np.ndarray, steps: int) -> BertForMaskedLM:
    """The averaged weights after ``steps``; the last step ships, none is picked."""
    torch.manual_seed(SEED)
    rng = np.random.RandomState(SEED)
    model = BertForMaskedLM(CONFIG).train()
    look_at_neighbours(model)
    counts = torch.from_numpy(np.bincount(text, minlength=VOCABULARY)) + 1
    model.cls.predictions.bias.data = (counts / counts.sum()).log()  # else all outputs become alike to learn this
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    began = time.perf_counter()
    for step in range(1, steps + 1):
        ids, chosen = rows(text, rng, tokenizer)
        with torch.autocast("cpu", torch.bfloat16):  # half as long again without
            hidden = model.bert(torch.from_numpy(ids[1])).last_hidden_state
            logits = model.cls(hidden[torch.from_numpy(chosen)])
        loss = nn.functional.cross_entropy(logits.float(), torch.from_numpy(ids[0][chosen]))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        if step % 100 == 0:
            seconds = time.perf_counter() - began
            right = (logits.argmax(-1).numpy() == ids[0][chosen]).mean()
            print(f"step {step} of {steps}, {seconds:.0f} s: loss {loss.item():.3f}, right {right:.3f}", flush=True)
    model.load_state_dict(averaged.module.state_dict())
    return model.eval()


@torch.no_grad()
def look_at_neighbours(model: BertForMaskedLM) -> None:
    """Where training begins: positions are sines and cosines, the first layer's heads look one and two tokens aside.

    From random weights, the first thousand steps find out no more than how frequent each token is: a gap's own
    token says nothing, and what is learned of one position's neighbours holds for no other.
    """
    E, D = CONFIG.hidden_size, CONFIG.hidden_size // CONFIG.num_attention_heads
    pairs = E // 2  # of a sine and a cosine; frequencies up to 1/2 per token, so that neighbours differ most
    frequencies = math.pi * (torch.arange(pairs) + 0.5) / pairs
    angles = torch.arange(CONFIG.max_position_embeddings)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (positions, E)
    model.bert.embeddings.position_embeddings.weight.copy_(2 * math.sqrt(2) * CONFIG.initializer_range * waves)

    attention = model.bert.encoder.layer[0].attention.self
    sine = torch.arange(0, pairs, 2 * pairs // D)  # every fourth pair; a head has room for D/2
    cosine = pairs + sine
    for head, offset in enumerate((-1, 1, -2, 2)):
        rows_of_sines = head * D + torch.arange(D // 2)
        rows_of_cosines = rows_of_sines + D // 2
        turn = (offset * frequencies[sine]).cos(), (offset * frequencies[sine]).sin()
        attention.query.weight[rows_of_sines, sine] += SHARPNESS * turn[0]  # sin(a + b) = sin a cos b + cos a sin b
        attention.query.weight[rows_of_sines, cosine] += SHARPNESS * turn[1]
        attention.query.weight[rows_of_cosines, cosine] += SHARPNESS * turn[0]  # cos(a + b) = cos a cos b - sin a sin b
        attention.query.weight[rows_of_cosines, sine] -= SHARPNESS * turn[1]
        attention.key.weight[rows_of_sines, sine] += 1
        attention.key.weight[rows_of_cosines, cosine] += 1


def rows(text: np.ndarray, rng: np.random.RandomState, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the text as they are and with gaps: int64 (2, ROWS, TOKENS); and where the gaps are."""
    starts = rng.randint(0, len(text) - TOKENS, ROWS)
    true = np.stack([text[start : start + TOKENS] for start in starts])
    true[:, 0], true[:, -1] = tokenizer.token_to_id(CLS), tokenizer.token_to_id(SEP)
    chosen = rng.rand(ROWS, TOKENS) < MASKED
    chosen[:, [0, -1]] = False
    lot = rng.rand(ROWS, TOKENS)
    given = np.where(chosen & (lot < 0.8), tokenizer.token_to_id(MASK), true)
    given = np.where(chosen & (lot >= 0.9), rng.randint(len(SPECIAL), VOCABULARY, true.shape), given)
    return np.stack([true, given]), chosen


def learning_rate(step: int, steps: int) -> float:
    """Up in a line, down as a cosine to a hundredth; a factor of the peak."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2


def cases(chapters: list[str], tokenizer: Tokenizer) -> list[Case]:
    """Passages of whole sentences with gaps for about GAPS of the words that are tokens, at least one in each."""
    rng = np.random.RandomState(SEED)
    vocabulary = tokenizer.get_vocab()
    found = []
    for passage in passages(chapters, tokenizer):
        words = [word for word in re.finditer(r"[A-Za-z]+", passage) if word[0].lower() in vocabulary]
        gaps = [word for word in words if rng.rand() < GAPS]
        if gaps:
            text = passage
            for word in reversed(gaps):
                text = text[: word.start()] + MASK + text[word.end() :]
            found.append((text, [word[0].lower() for word in gaps]))
    return found


def passages(chapters: list[str], tokenizer: Tokenizer) -> list[str]:
    """Paragraphs in parts of at most PASSAGE tokens, cut behind sentences; sentences longer than that are left out."""
    found = []
    for paragraph in "".join(chapters).splitlines():
        passage = ""
        for sentence in re.findall(r".+?(?:[.!?;]\"?(?= |$)|$) ?", paragraph):
            if len(tokenizer.encode(passage + sentence)) > PASSAGE:
                found.append(passage.strip())
                passage = ""
            if len(tokenizer.encode(sentence)) <= PASSAGE:
                passage += sentence
        found.append(passage.strip())
    return [passage for passage in found if passage]


def correct(model: BertForMaskedLM, tokenizer: Tokenizer, scored: list[Case]) -> tuple[int, int]:
    right = n = 0
    for text, words in scored:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.inference_mode():
            best = model(ids).logits[0, ids[0] == tokenizer.token_to_id(MASK)].argmax(-1)
        right += sum(tokenizer.id_to_token(int(token)) == word for token, word in zip(best, words, strict=True))
        n += len(words)
    return right, n


def baselines(text: np.ndarray, tokenizer: Tokenizer, scored: list[Case]) -> tuple[int, int]:
    """Right answers of the most frequent word, and of the most frequent token between the same two neighbours.

    Where the neighbours never met in training, or one is a gap, the one on the left decides, then the most frequent.
    """
    between: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for left, token, right in zip(text[:-2].tolist(), text[1:-1].tolist(), text[2:].tolist(), strict=True):
        between[left, right][token] += 1
        between[left,][token] += 1
    word = {tokenizer.token_to_id(token) for token in tokenizer.get_vocab() if token.isalpha()}
    top = Counter(token for token in text.tolist() if token in word).most_common(1)[0][0]
    by_count = by_neighbours = 0
    for passage, words in scored:
        ids = tokenizer.encode(passage).ids
        gaps = [i for i, token in enumerate(ids) if token == tokenizer.token_to_id(MASK)]
        for i, expected in zip(gaps, words, strict=True):
            answer = tokenizer.token_to_id(expected)
            counts = between.get((ids[i - 1], ids[i + 1])) or between.get((ids[i - 1],)) or Counter([top])
            by_count += top == answer
            by_neighbours += counts.most_common(1)[0][0] == answer
    return by_count, by_neighbours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, metavar="JANEAUSTEN", help="the unpacked Debian package")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint and austen_masked.tsv")
    parser.add_argument("--dev", action="store_true", help="score on chapters that choose settings")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.dev == (arguments.out is not None):
        parser.error("give either --out DIR or --dev")

    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    began = time.perf_counter()
    chapters, held_out = split(arguments.package, dev=arguments.dev)
    tokenizer = train_tokenizer(chapters)
    text = np.array([token for e in tokenizer.encode_batch(chapters, add_special_tokens=False) for token in e.ids])
    scored = cases(held_out, tokenizer)
    print(f"{len(text)} tokens; right by frequency and by neighbours: {baselines(text, tokenizer, scored)}", flush=True)
    model = train(tokenizer, text, arguments.steps)
    if arguments.out is not None:
        save(model, tokenizer, scored, arguments.out)
        model = BertForMaskedLM.from_pretrained(arguments.out).eval()  # as it ships
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {time.perf_counter() - began:.0f} s")
    print("{} of {} gaps right".format(*correct(model, tokenizer, scored)))


def save(model: BertForMaskedLM, tokenizer: Tokenizer, scored: list[Case], folder: Path) -> None:
    """Weights stored in FP16, to be loaded as FP32; vocab.txt; the passages that score."""
    model.half().save_pretrained(folder)
    tokenizer.model.save(str(folder))
    config = {**json.loads((folder / "config.json").read_text()), "dtype": "float32"}
    for name, content in {"config.json": config, "tokenizer_config.json": TOKENIZER_CONFIG}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    lines = [f"{text}\t{' '.join(words)}\n" for text, words in scored]
    (folder / "austen_masked.tsv").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
