"""Texts about images of digits, as the reference Flamingo reads and writes them, and their tokenizer.

    <image>Question: how many sevens? Answer: two<|endofchunk|><image>Question: what is left of the three? Answer: one
    <image>Caption: top seven three, bottom nothing one<|endofchunk|>Question: which digits are there? Answer: ...
    <image>Answer: four<|endofchunk|><image>Answer: two<|endofchunk|><image>Answer: ...

A dialogue is one of three shapes: few-shot prompts of one to five images with a question each, of the same kind or of
any; talks, of several questions and captions about the same image; and few-shot prompts in which the question is not
said, so that only the examples tell which one of digit_questions.WHOLE it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from digit_questions import KINDS, WHOLE, Digits, ask, caption, composed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END, IMAGE = "<|endofchunk|>", "<image>"
END_ID, IMAGE_ID = 0, 1
QUESTION, CAPTION, UNSAID = "Question: {} Answer:", "Caption:", "Answer:"
CONTEXT = 256  # tokens
MOST_VOCABULARY, TEXTS = 1024, 4000  # the trainer stops where every word is a token
FRAME = 0.1  # weight of what is no answer in the loss of a text
UNSAID_SHARE = 0.25  # of the dialogues
MOST_IMAGES = 5
POOL = 7  # batches that are drawn together
Image = Any  # stands for an image: places of scans, or its number among images that are known
Look = Callable[[np.random.RandomState], tuple[Digits, Image]]  # draws the digits of an image, and the image


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer; ``image`` is the one that they begin with, None where they are about the last one."""

    image: Image | None
    prompt: str
    answer: str

    @property
    def parts(self) -> tuple[str, str]:
        """What is given, and what is to be written, the end of the chunk with it."""
        return f"{'' if self.image is None else IMAGE}{self.prompt}", f" {self.answer}{END}"


def dialogue(look: Look, rng: np.random.RandomState, talks: float) -> list[Turn]:
    """A dialogue of one of the three shapes; ``talks`` is the share of talks."""
    chosen = rng.rand()
    if chosen >= UNSAID_SHARE + talks:
        kind = KINDS[rng.randint(len(KINDS))] if rng.rand() < 0.6 else None
        return [turn for _ in range(rng.randint(1, MOST_IMAGES + 1)) for turn in turns(look, rng, [kind])]
    if chosen >= UNSAID_SHARE:
        return talk(look, rng)
    kind = WHOLE[rng.randint(len(WHOLE))]
    return [unsaid(kind, look, rng) for _ in range(rng.randint(1, MOST_IMAGES + 1))]


def talk(look: Look, rng: np.random.RandomState) -> list[Turn]:
    """One or two images, each with a caption three times in four and one to four questions of any kind."""
    found = []
    for _ in range(rng.randint(1, 3)):
        asked: list[str | None] = [None] * rng.randint(1, 5)
        found += turns(look, rng, [CAPTION, *asked] if rng.rand() < 0.75 else asked)
    return found


def turns(look: Look, rng: np.random.RandomState, kinds: list[str | None]) -> list[Turn]:
    """Turns about one image; a kind is one of KINDS, CAPTION, or None for any of KINDS."""
    while True:
        digits, image = look(rng)
        pairs = [answered(kind, digits, rng) for kind in kinds]
        if all(pair is not None for pair in pairs):
            return [Turn(None if number else image, *pair) for number, pair in enumerate(pairs) if pair is not None]


def answered(kind: str | None, digits: Digits, rng: np.random.RandomState) -> tuple[str, str] | None:
    """The prompt of a turn and its answer; None where the image allows no question of the kind."""
    if kind == CAPTION:
        return CAPTION, caption(digits)
    pair = ask(KINDS[rng.randint(len(KINDS))] if kind is None else kind, digits, rng)
    return None if pair is None else (QUESTION.format(pair[0]), pair[1])


def unsaid(kind: str, look: Look, rng: np.random.RandomState) -> Turn:
    digits, image = look(rng)
    pair = ask(kind, digits, rng)
    assert pair is not None  # each image allows each of WHOLE
    return Turn(image, UNSAID, pair[1])


def text(dialogue: list[Turn]) -> str:
    return "".join(part for turn in dialogue for part in turn.parts)


def unseen(rng: np.random.RandomState) -> tuple[Digits, Image]:
    """Draw digits whose image nobody looks at, where only texts are wanted."""
    return composed(lambda digit: 0, rng)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE as GPT-2's, on dialogues alone, until each of their words is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_VOCABULARY,
        special_tokens=[END, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = np.random.RandomState(0)
    tokenizer.train_from_iterator((text(dialogue(unseen, rng, 0.5)) for _ in range(TEXTS)), trainer)
    return tokenizer


@dataclass(frozen=True)
class Batch:
    """Dialogues as rows of tokens, padded on the right.

    tokens    int64 (B, S)
    weights   float32 (B, S), of each token in the loss: 1 in an answer and its end, FRAME elsewhere, 0 in padding
    images    those of each row
    """

    tokens: Tensor
    weights: Tensor
    images: list[list[Image]]


class Batches:
    """Draws batches of ``rows`` dialogues without end, those of a batch alike in length, in random order.

    One batch in eight is of a quarter as many rows with several dialogues each, up to the whole context.
    """

    def __init__(self, tokenizer: Tokenizer, look: Look, rng: np.random.RandomState, rows: int, talks: float) -> None:
        self.look, self.rng, self.rows, self.talks = look, rng, rows, talks
        self.encode: Callable[[str], list[int]] = cache(lambda text: tokenizer.encode(text).ids)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            drawn = sorted(
                (dialogue(self.look, self.rng, self.talks) for _ in range(POOL * self.rows)), key=self.length
            )
            parts = [drawn[first : first + self.rows] for first in range(0, len(drawn), self.rows)]
            parts.append([self.joined() for _ in range(self.rows // 4)])
            yield from (self.batch(parts[number]) for number in self.rng.permutation(len(parts)))

    def length(self, turns: list[Turn]) -> int:
        return sum(len(self.encode(part)) for turn in turns for part in turn.parts)

    def joined(self) -> list[Turn]:
        """Dialogues one after another, as long as they have eight images and CONTEXT tokens at most."""
        found: list[Turn] = []
        while True:
            more = dialogue(self.look, self.rng, self.talks)
            images = sum(turn.image is not None for turn in found + more)
            if images > 8 or self.length(found + more) > CONTEXT:
                return found or more
            found += more

    def batch(self, dialogues: list[list[Turn]]) -> Batch:
        """Encode dialogues as rows."""
        rows = [[(self.encode(part), weight) for turn in each for part, weight in weighed(turn)] for each in dialogues]
        longest = max(sum(len(ids) for ids, _ in row) for row in rows)
        tokens, weights = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest)
        for number, row in enumerate(rows):
            ids = [token for part, _ in row for token in part]
            tokens[number, : len(ids)] = torch.tensor(ids)
            weights[number, : len(ids)] = torch.tensor([weight for part, weight in row for _ in part])
        return Batch(tokens, weights, [[turn.image for turn in each if turn.image is not None] for each in dialogues])


def weighed(turn: Turn) -> tuple[tuple[str, float], tuple[str, float]]:
    prompt, answer = turn.parts
    return (prompt, FRAME), (answer, 1.0)
