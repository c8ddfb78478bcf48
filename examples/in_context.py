"""The in-context task of the reference GPT: each prompt hides a mapping that only its examples show.

    3 -> K
    8 -> T
    5 -> K
    7 ->

A mapping is a rule that parts the digits in two classes (odd and even, or low and high: from 5 on) and a letter for
each class, all drawn anew for every prompt. Weights cannot know the letters: without examples 1 answer in 26 is
right, an example shows one letter, and only examples of both classes show which rule it is. After Brown et al.,
"Language Models are Few-Shot Learners" (2020), section 2.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from math import sqrt

import numpy as np
from numpy.typing import NDArray

LETTERS = string.ascii_uppercase
RULES = (lambda digit: digit % 2, lambda digit: digit >= 5)
MOST_SHOTS = 8
SHOTS = (0, 1, 2, 4, 8)
CASES = 500  # prompts that a measured accuracy comes from, for each number of shots
MEASURED, HELD_OUT_SEED = 2020, 26  # seeds
# Which answer for which digit is never seen in training, as example or as answer: a tenth of the 26 * 10.
HELD_OUT = np.random.RandomState(HELD_OUT_SEED).permutation(260).reshape(26, 10) < 26

Prompt = list[tuple[int, str]]


def draw(rng: np.random.RandomState, shots: int, *, held_out: bool = False) -> Prompt:
    """``shots`` examples and a query, (digit, letter) each, no digit twice; none of them held out of training.

    With ``held_out`` the query is, and only the query.
    """
    while True:
        rule = RULES[rng.randint(len(RULES))]
        letters = rng.permutation(26)[:2]
        digits = rng.permutation(10)[: shots + 1]
        pairs = [(int(digit), int(letters[int(rule(digit))])) for digit in digits]
        hidden = [bool(HELD_OUT[letter, digit]) for digit, letter in pairs]
        if not any(hidden[:-1]) and hidden[-1] == held_out:
            return [(digit, LETTERS[letter]) for digit, letter in pairs]


def text(pairs: Prompt) -> str:
    return "".join(f"{digit} -> {letter}\n" for digit, letter in pairs)


def question(pairs: Prompt) -> str:
    """The prompt: all but the last letter."""
    return text(pairs).rpartition(" ")[0]


def accuracy(answer: Callable[[str], str], shots: int, *, held_out: bool = False, n: int = CASES) -> tuple[int, int]:
    """How many of ``n`` fresh prompts are answered with the right letter. ``answer`` takes one and goes on from it."""
    rng = np.random.RandomState(MEASURED + shots + 100 * held_out)
    prompts = [draw(rng, shots, held_out=held_out) for _ in range(n)]
    return sum(answer(question(prompt)).strip() == prompt[-1][1] for prompt in prompts), n


def best_possible(shots: int, n: int = 20_000) -> float:
    """What a reader gets who knows the family of mappings and guesses best: letters not yet seen are all alike."""
    rng = np.random.RandomState(MEASURED)
    return float(np.mean([likeliest(draw(rng, shots)) for _ in range(n)]))


def likeliest(pairs: Prompt) -> float:
    """The probability of the best answer to a prompt, given its examples (held-out pairs left aside)."""
    *examples, (query, _) = pairs
    chances: dict[str, float] = {}
    weights = 0.0
    for rule in RULES:
        letters: dict[int, str] = {}
        if any(letters.setdefault(int(rule(digit)), letter) != letter for digit, letter in examples):
            continue
        if len(set(letters.values())) < len(letters):
            continue  # two classes never share a letter
        weight = (1 / 26) * (1 / 25) if len(letters) == 2 else 1 / 26 if letters else 1.0
        weights += weight
        if int(rule(query)) in letters:
            letter = letters[int(rule(query))]
            chances[letter] = chances.get(letter, 0.0) + weight
        else:
            chances["unseen"] = chances.get("unseen", 0.0) + weight / (26 - len(letters))
    return max(chances.values()) / weights


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the true fraction. Wilson (1927)."""
    z, p = 1.959963984540054, correct / n
    middle, half = p + z**2 / (2 * n), z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def table(answer: Callable[[str], str]) -> list[str]:
    """Accuracy by shots, on letters seen with their digit in training and on those held out, ready to print."""
    lines = ["shots   best possible   trained pairs              held-out pairs"]
    for shots in SHOTS:
        cells = []
        for held_out in (False, True):
            correct, n = accuracy(answer, shots, held_out=held_out)
            low, high = wilson(correct, n)
            cells.append(f"{correct} of {n} ({low:.1%} to {high:.1%})")
        lines.append(f"{shots:5d}   {best_possible(shots):13.1%}   {cells[0]:25}  {cells[1]}")
    return lines


def batch(rng: np.random.RandomState, rows: int) -> list[str]:
    """Prompts to train on, with their answers: eight examples and a query each."""
    return [text(draw(rng, MOST_SHOTS)) for _ in range(rows)]


def flags(encoded: NDArray[np.int64], period: int = 4, answer: int = 2) -> NDArray[np.bool_]:
    """Which tokens of a prompt are answers: the third of each four, "3", " ->", " K", newline."""
    return np.broadcast_to(np.arange(encoded.shape[1]) % period == answer, encoded.shape)
