"""Requests of every family with mixed batch sizes, lengths and ways of choosing, always the same for a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

Request = Callable[[Any], Any]  # takes the loaded bundle
WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "it",
    "that",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
]


def bert(model: Any, rng: np.random.Generator) -> Request:
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(rng.integers(1, 5))]
    if rng.random() < 0.5:
        return lambda loaded: loaded.embed(texts)
    below = next(tensor.exclusive_max for tensor in model.manifest.graphs[0].graph.inputs if tensor.name == "input_ids")
    shape = rng.integers(1, 4), rng.integers(1, 33)
    feeds = {"input_ids": rng.integers(0, below, shape), "attention_mask": np.tri(*shape, shape[1] - 1, dtype=np.int64)}
    return lambda loaded: loaded.run(feeds)


def vit(model: Any, rng: np.random.Generator) -> Request:
    images = pictures(rng)
    return (lambda loaded: loaded.classify(images, top_k=3)) if rng.random() < 0.5 else lambda m: m.features(images)


def clip(model: Any, rng: np.random.Generator) -> Request:
    images, labels = pictures(rng), list(rng.choice(WORDS, rng.integers(1, 5)))
    templates = ["{}", "a {}"][: rng.integers(1, 3)]
    kind = rng.integers(3)
    if kind == 0:
        return lambda loaded: loaded.embed_text(labels)
    if kind == 1:
        return lambda loaded: loaded.embed_image(images)
    return lambda loaded: loaded.zero_shot(images, labels, templates=templates)


def gpt(model: Any, rng: np.random.Generator) -> Request:
    prompts, keywords = generation(model, rng, most=60)
    if rng.random() < 0.2:
        return lambda loaded: loaded.score(prompts[0] + [1])
    if rng.random() < 0.2 and "num_beams" not in keywords:
        return lambda loaded: list(loaded.stream(prompts[0], **keywords))
    return lambda loaded: loaded.generate(prompts, **keywords)


def transformer(model: Any, rng: np.random.Generator) -> Request:
    if rng.random() < 0.5 and model.manifest.tokenizer:
        dates = [f"{rng.integers(1, 29)} May {rng.integers(1800, 2100)}" for _ in range(rng.integers(1, 4))]
        beams = int(rng.integers(1, 4))
        return lambda loaded: loaded.translate(dates, num_beams=beams)
    prompts, keywords = generation(model, rng, most=20)
    return lambda loaded: loaded.generate(prompts, **keywords)


FAMILIES = {"bert": bert, "clip": clip, "gpt": gpt, "transformer": transformer, "vit": vit}


def generation(model: Any, rng: np.random.Generator, most: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompts of ids and keywords: greedy, sampled, or with beams."""
    prompts = [rng.integers(0, model.vocabulary, rng.integers(1, most)).tolist() for _ in range(rng.integers(1, 4))]
    keywords: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, 7))}
    kind = rng.integers(3)
    if kind == 1:
        keywords |= {"do_sample": True, "seed": int(rng.integers(1000)), "temperature": 0.8, "num_beams": 1}
    if kind == 2:
        keywords |= {"num_beams": 2}
    return prompts, keywords


def pictures(rng: np.random.Generator) -> list[Any]:
    """One to four images of different sizes, uint8 (height, width, 3)."""
    sizes = rng.integers(4, 48, (rng.integers(1, 5), 2))
    return [rng.integers(0, 256, (height, width, 3)).astype(np.uint8) for height, width in sizes]


def requests(model: Any, count: int, seed: int) -> list[Request]:
    """``count`` requests of the loaded bundle's family."""
    rng = np.random.default_rng(seed)
    return [FAMILIES[model.manifest.family](model, rng) for _ in range(count)]


def same(ours: Any, theirs: Any) -> bool:
    """Equal to the bit, arrays within lists and dicts too."""
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[name]) for name, value in ours.items())
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def different_answers(model: Any, asked: Sequence[Request], *, threads: int, each: int) -> int:
    """How many answers of ``each`` requests in every one of ``threads`` threads are not the serial ones."""
    serial = [request(model) for request in asked]

    def worker(number: int) -> int:
        chosen = random.Random(number).choices(range(len(asked)), k=each)
        return sum(not same(asked[index](model), serial[index]) for index in chosen)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(worker, range(threads)))
