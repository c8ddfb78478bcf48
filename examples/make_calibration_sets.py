"""Makes the calibration sets that ship: inputs that the reference models trained on, and none that scores them.

    python examples/make_calibration_sets.py JANEAUSTEN WORDNET calib/datasets

``austen.py`` and ``make_wordnet_pairs.py`` say how to get the two folders (here janeausten and
wordnet/usr/share/wordnet); the scans are scikit-learn's, the dates and captions are made.

austen.jsonl         passages of the chapters that train, with the line breaks between paragraphs
wordnet.txt          definitions and words, a text per line: the pairs behind the thousand that score
dates.txt            dates of days that train
date_lists.txt       lists of one to six such dates
digits.safetensors   scans that train: ``images`` uint8 (512, 8, 8), ``labels`` uint8, ``indices`` int16 into
                     ``load_digits()``
digit_captions.txt   a caption for each of these scans
digit_compositions.tsv    images of one or two of them, in captions that train
digit_questions.tsv       questions about images of one to four of them, and examples of each kind
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import islice
from pathlib import Path

import austen
import date_lists
import dates
import digit_compositions
import digit_questions
import numpy as np
import torch
from make_wordnet_pairs import PAIRS, candidates
from safetensors.numpy import save
from train_clip_digits import captions
from train_vit_digits import scans, split
from transformers import CLIPTokenizer

from transom.calib.digit_questions import DigitQuestion

SEED = 21  # not that of the held-out samples
PASSAGES, SHORTEST = 400, 100  # characters
LONGEST = (200, 300, 400, 900)  # of passages in turn; GPT's 256 tokens are some 700 characters
WORDNET_PAIRS = 250  # two texts each
DATES, LISTS, SCANS, COMPOSITIONS = 500, 420, 512, 400
QUESTIONS = 70  # of each kind
CLIP = Path(__file__).resolve().parents[1] / "models" / "reference" / "clip"


def passages(package: Path) -> list[str]:
    """From the line break before a paragraph to the end of a sentence, drawn from all chapters that train."""
    train, _ = austen.split(package)
    starts = [(chapter, match.start()) for chapter in train for match in re.finditer(r"\n(?=.)", chapter)]
    rng = np.random.RandomState(SEED)
    found: list[str] = []
    for index in rng.permutation(len(starts)):
        chapter, place = starts[index]
        text = chapter[place : place + LONGEST[len(found) % len(LONGEST)]]
        ends = [match.end() for match in re.finditer(r"[.!?][\"”’']?(?=\s)", text)]
        passage = text[: ends[-1]] if ends else ""
        if len(passage) >= SHORTEST and passage not in found and len(found) < PASSAGES:
            found.append(passage)
    return found


def definitions_and_words(wordnet: Path) -> list[str]:
    behind = candidates(wordnet)[PAIRS : PAIRS + WORDNET_PAIRS]
    return [text for pair in behind for text in pair]


def written_dates() -> list[str]:
    train, _ = dates.split()
    return [text for text, _ in dates.pairs(train, dates.FORMS, DATES, np.random.RandomState(SEED))]


def written_lists() -> list[tuple[str, str]]:
    """The lists, and their ISO forms, which do not ship."""
    train, _ = dates.split()
    return date_lists.even_lists(train, LISTS, np.random.RandomState(SEED))


def training_scans() -> dict[str, np.ndarray]:
    images, labels = scans()
    training, _ = split(labels)
    chosen = np.sort(np.random.RandomState(SEED).permutation(training)[:SCANS])
    return {"images": images[chosen], "labels": labels[chosen].astype(np.uint8), "indices": chosen.astype(np.int16)}


def compositions(labels: np.ndarray) -> list[str]:
    found = digit_compositions.training(labels, np.random.RandomState(SEED))
    return [each.line() for each in islice(found, COMPOSITIONS)]


def questions(labels: np.ndarray) -> list[str]:
    """Questions of every kind in turn, with none to four examples of their kind before them."""
    rng = np.random.RandomState(SEED)
    pick = digit_questions.training_scans(labels, rng)
    made = [digit_questions.questions(kind, pick, rng) for kind in digit_questions.KINDS]
    kinds, found = len(made), []
    for number in range(kinds * QUESTIONS):
        each = next(made[number % kinds])
        others = [other for other in range(number % kinds, kinds * QUESTIONS, kinds) if other != number]
        shown = tuple(int(other) for other in rng.permutation(others)[: number // kinds % 5])
        found.append(DigitQuestion(each.question, each.answer, each.places, shown).line())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("janeausten", type=Path, help="the unpacked r-cran-janeaustenr")
    parser.add_argument("wordnet", type=Path, help="folder with data.noun, data.verb, ... and cntlist.rev")
    parser.add_argument("out", type=Path, help="folder to write to")
    arguments = parser.parse_args()

    digits = training_scans()
    described = captions(
        CLIPTokenizer.from_pretrained(CLIP), torch.from_numpy(digits["labels"]), np.random.RandomState(SEED)
    )
    texts = {
        "austen.jsonl": [
            json.dumps({"text": passage}, ensure_ascii=False) for passage in passages(arguments.janeausten)
        ],
        "wordnet.txt": definitions_and_words(arguments.wordnet),
        "dates.txt": written_dates(),
        "date_lists.txt": [text for text, _ in written_lists()],
        "digit_captions.txt": described,
        "digit_compositions.tsv": compositions(digits["labels"]),
        "digit_questions.tsv": questions(digits["labels"]),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, found in texts.items():
        (arguments.out / name).write_text("".join(f"{line}\n" for line in found), encoding="utf-8")
        print(f"{name}: {len(found)} texts, {(arguments.out / name).stat().st_size} bytes")
    (arguments.out / "digits.safetensors").write_bytes(save(digits))


if __name__ == "__main__":
    main()
