"""Read the inputs that ship with the package; export/data/README.md says where each comes from."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from transom.calib.builtin_sets import lines, scans
from transom.calib.digit_compositions import Composition, read_compositions
from transom.calib.digit_questions import DigitQuestion, read_questions

DATA = files("transom.export").joinpath("data")
PHOTOS = ("photo_china.jpg", "photo_flower.jpg")
BYTES_OF_PASSAGE = 126  # two less than the reference Perceiver reads
PASSAGE_EVERY = 6  # of the passages, for each is a run of its own
BYTE_GAP_EVERY = 7  # bytes of a passage that a model of bytes is asked for: about the 15 % of BERT's paper


def passage() -> list[str]:
    """Return 31 lines of prose: English, then one line each in languages of other alphabets and scripts."""
    return DATA.joinpath("passage.txt").read_text(encoding="utf-8").splitlines()


def photos() -> list[bytes]:
    """Return two photographs as JPEG files: 360x240 and 240x320 pixels, RGB."""
    return [DATA.joinpath(name).read_bytes() for name in PHOTOS]


def heldout_digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the scans that the reference ViT never saw: uint8 (540, 8, 8) of 0..255, and their labels (540,)."""
    from safetensors.numpy import load

    arrays = load(DATA.joinpath("digits_heldout.safetensors").read_bytes())
    return arrays["images"], arrays["labels"]


def heldout_compositions() -> tuple[NDArray[np.uint8], list[Composition]]:
    """Read 500 compositions of the held-out scans, and the scans: uint8 (540, 8, 8) of 0..255.

    ``Composition.draw(scans)`` makes the image.
    """
    text = DATA.joinpath("digit_compositions_heldout.tsv").read_text(encoding="ascii")
    return heldout_digits()[0], read_compositions(text)


def heldout_questions() -> tuple[NDArray[np.uint8], list[DigitQuestion]]:
    """Read 400 questions about compositions of the held-out scans, and the scans: uint8 (540, 8, 8) of 0..255.

    ``DigitQuestion.draw(scans)`` makes the image; ``examples`` are places in ``question_examples()``.
    """
    text = DATA.joinpath("digit_questions_heldout.tsv").read_text(encoding="ascii")
    return heldout_digits()[0], read_questions(text)


def question_examples() -> list[tuple[NDArray[np.uint8], str, str]]:
    """Read what few-shot prompts show: images of scans that train, uint8 (32, 32), a question and its answer each."""
    available = scans()
    found = read_questions("\n".join(lines("digit_questions.tsv")))
    return [(each.draw(available), each.question, each.answer) for each in found]


def digit_prompts() -> list[str]:
    """Return 5 templates, ``{}`` for the digit, that the reference CLIP never read; fixed before it was trained."""
    return DATA.joinpath("digit_prompts.txt").read_text(encoding="utf-8").splitlines()


def wordnet_pairs() -> tuple[list[str], list[str]]:
    """Read 1,000 definitions of nouns, and the words that each defines ("adviser, advisor, consultant")."""
    return texts_and_targets("wordnet_pairs.tsv")


def heldout_text() -> str:
    """Read six chapters of Jane Austen, one of each novel, that no reference model trained on; paragraphs are lines."""
    return DATA.joinpath("austen_heldout.txt").read_text(encoding="utf-8")


def masked_text() -> list[tuple[str, list[str]]]:
    """Read the same chapters in passages with a [MASK] for every seventh word or so, and the words that were there."""
    lines = DATA.joinpath("austen_masked.tsv").read_text(encoding="utf-8").splitlines()
    passages = (line.split("\t") for line in lines)
    return [(text, words.split(" ")) for text, words in passages]


def masked_bytes() -> list[tuple[str, str]]:
    """Read passages of the same chapters with a [MASK] for every seventh byte, and the characters that were there."""
    return byte_gaps(heldout_text(), BYTES_OF_PASSAGE)


def byte_gaps(text: str, most: int) -> list[tuple[str, str]]:
    """Cut a text into passages of at most ``most`` bytes, and put [MASK] for every BYTE_GAP_EVERY-th byte of some.

    Return each PASSAGE_EVERY-th passage and the characters that were there. A byte of a character beyond ASCII has no
    text of its own and stays; a passage without a gap is left out.
    """
    found = []
    for paragraph in text.splitlines():
        for passage in pieces(paragraph, most):
            parts = [*passage]
            ends = np.cumsum([len(character.encode()) for character in parts])
            gaps = [
                place
                for place, end in enumerate(ends)
                if end % BYTE_GAP_EVERY == BYTE_GAP_EVERY // 2 and parts[place].isascii()
            ]
            answers = "".join(parts[place] for place in gaps)
            for place in gaps:
                parts[place] = "[MASK]"
            if gaps:
                found.append(("".join(parts), answers))
    return found[::PASSAGE_EVERY]


def pieces(paragraph: str, most: int) -> list[str]:
    """Cut a paragraph at spaces into pieces of at most ``most`` bytes; a longer word is left out."""
    found = [""]
    for word in paragraph.split(" "):
        longer = f"{found[-1]} {word}".strip()
        if len(longer.encode()) <= most:
            found[-1] = longer
        elif len(word.encode()) <= most:
            found.append(word)
    return [piece for piece in found if piece]


def heldout_dates() -> tuple[list[str], list[str]]:
    """Read 1,000 dates as people write them, of days that the reference Transformer never saw, and each in ISO 8601."""
    return texts_and_targets("dates_heldout.tsv")


def heldout_date_lists() -> tuple[list[str], list[str]]:
    """Read 900 lists of one to six such dates ("3 May 1921; 12.6.2004"), and their ISO forms ("1921-05-03 2004-06-12").

    The number of dates grows from list to list and begins again after six, so any part in order has all lengths.
    """
    return texts_and_targets("date_lists_heldout.tsv")


def texts_and_targets(name: str) -> tuple[list[str], list[str]]:
    """Read a file of pairs, one per line, a tab between."""
    lines = DATA.joinpath(name).read_text(encoding="utf-8").splitlines()
    texts, targets = zip(*(line.split("\t") for line in lines), strict=True)
    return list(texts), list(targets)
