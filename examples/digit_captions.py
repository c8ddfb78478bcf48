"""Captions of handwritten digits: what the reference CLIP reads, and the prompts that it must understand unseen.

    python examples/digit_captions.py        how many templates train, ten captions, and the words of the unseen prompts

A caption is a template with a digit, as a word or as a numeral, at its ``{}``. Templates are composed of parts, such as
"a blurry scan of" + "the digit {}" + "on a form" + ".". None names a second digit: "one" is always the digit.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import numpy as np

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# Chosen before the first training run and scored once, after the last; the file ships with the package.
PROMPTS = Path(__file__).resolve().parents[1] / "export" / "data" / "digit_prompts.txt"
UNSEEN = tuple(PROMPTS.read_text(encoding="utf-8").splitlines())
DEV = (  # unseen as well; these choose settings
    "what looks like a {} from a postcard",
    "is that {}? yes, certainly",
    'yesterday a child painted this: "{}"',
    "{} - found under the old kitchen table",
    "our dog has seen better examples of {}.",
)

OPENINGS = [
    *["", "a scan of", "an image of", "a drawing of", "a sketch of", "a small scan of", "a blurry scan of"],
    *["a tiny image of", "a grey image of", "a clear drawing of", "a bad copy of", "a coarse copy of"],
    *["a low-resolution image of", "a close-up of", "a cropped view of", "pixels of"],
    *["this is", "that's", "here is", "here we have", "we see", "you can see", "look at", "it must be", "it reads"],
    *["the label says", "the answer is", "the class is", "the right answer:", "label:", "digit:", "class =", "it says"],
]
SUBJECTS = [
    *["{}", "a {}", "the {}", '"{}"', "'{}'", "the digit {}", "a digit {}", 'the digit "{}"', "the digit: {}"],
    *["the figure {}", "the numeral {}", "the symbol {}", "a handwritten {}", "a hand-drawn {}", "a scanned {}"],
    *["the handwritten digit {}", "a neat {}", "a sloppy {}", "a bold {}", "a slanted {}", "some {}", "the value {}"],
]
CLOSINGS = [
    *["", "written by hand", "by hand", "drawn in ink", "in black ink", "in white on black", "on a form", "on paper"],
    *["from a bank form", "at low resolution", "in a small box", "on a dark background", "in the centre"],
    *["made by an adult", "for a test", ", handwritten", ", scanned", ", a digit", "(handwritten)", "in a hurry"],
]
ENDINGS = ["", ".", "!", "?", "..."]
LETTERS = list("abcdefghijklmnopqrstuvwxyz")


def templates() -> list[str]:
    """Every template that trains, in a fixed order."""
    return [compose(*parts) for parts in product(OPENINGS, SUBJECTS, CLOSINGS, ENDINGS)]


def compose(opening: str, subject: str, closing: str, ending: str) -> str:
    gap = "" if closing.startswith(",") else " "
    return f"{opening} {subject}{gap}{closing}".strip() + ending


def caption(digit: int, rng: np.random.RandomState) -> str:
    """A caption that training shows for an image of ``digit``. In every second one some words are letters at random.

    They teach the text tower to find the digit among words that it does not know, as prompts have them.
    """
    template = compose(*(each[rng.randint(len(each))] for each in (OPENINGS, SUBJECTS, CLOSINGS, ENDINGS)))
    if rng.rand() < 0.5:
        template = garbled(template, rng)
    return template.replace("{}", WORDS[digit] if rng.rand() < 0.7 else str(digit))


def garbled(template: str, rng: np.random.RandomState) -> str:
    """Every third word replaced, and up to two words put before and behind."""
    known = re.sub("[a-z]+", lambda word: letters(rng) if rng.rand() < 1 / 3 else word[0], template)
    before, behind = (" ".join(letters(rng) for _ in range(rng.randint(3))) for _ in range(2))
    return f"{before} {known} {behind}".strip()


def letters(rng: np.random.RandomState) -> str:
    """Letters that are no digit's name, though every eighth time they end in one, as "stone" and "weight" do."""
    while (word := "".join(rng.choice(LETTERS, rng.randint(1, 8)))) in WORDS:
        pass
    return word + WORDS[rng.randint(10)] if rng.rand() < 1 / 8 else word


def words(texts: list[str]) -> set[str]:
    return set(re.findall("[a-z]+", " ".join(texts).lower()))


def main() -> None:
    rng = np.random.RandomState(0)
    trained = templates()
    print(f"{len(trained)} templates, {len(words(trained))} words")
    print("\n".join(caption(digit, rng) for digit in range(10)))
    for prompt in UNSEEN:
        print(f"{prompt}    in training: {prompt in trained}, new words: {sorted(words([prompt]) - words(trained))}")


if __name__ == "__main__":
    main()
