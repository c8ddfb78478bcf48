"""Measure the task scores of the reference models, by the same code for PyTorch and for the bundle.

A score takes a function from inputs to answers. Whoever computes them, everything around it is the same code on
the same data, so that two scores differ by the artefact alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from transom.export.datasets import (
    digit_prompts,
    heldout_compositions,
    heldout_date_lists,
    heldout_dates,
    heldout_digits,
    heldout_questions,
    heldout_text,
    masked_bytes,
    masked_text,
    wordnet_pairs,
)
from transom.export.metrics import Accuracy, LengthAccuracy, Rate
from transom.runtime.errors import ExportError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.bert import Bert, TextHeads
from transom.runtime.tasks.clip import Clip
from transom.runtime.tasks.flamingo import Flamingo
from transom.runtime.tasks.gpt import GPT
from transom.runtime.tasks.show_attend_tell import ShowAttendTell
from transom.runtime.tasks.transformer import Transformer
from transom.runtime.tasks.vit import ViT

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = len(DIGIT_NAMES)
MASK = "[MASK]"
LIST_SEPARATOR = "; "  # between the dates of a list
BLOCK_BYTES = 1500  # of a block of text, at least: some 500 tokens, two contexts


def digits_score(predict: Callable[[list[NDArray[np.uint8]]], NDArray[Any]]) -> Accuracy:
    """Return the fraction of the held-out scans whose digit has the largest number.

    ``predict`` takes N images, uint8 (8, 8, 3) of 0..255, and gives (N, 10): logits or probabilities.
    Raises ExportError for another shape and for values that are not finite.
    """
    images, labels = heldout_images()
    answers = finite(predict(images), (len(images), DIGITS), "predict(images)")
    return Accuracy.of_each("top-1 accuracy", "held-out scans of scikit-learn's digits", answers.argmax(1) == labels)


def heldout_images() -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Return the held-out scans as images, uint8 (8, 8, 3) of 0..255 each, and their digits (540,)."""
    scans, labels = heldout_digits()
    return [np.repeat(scan[:, :, None], 3, axis=2) for scan in scans], labels


def zero_shot_score(choose: Callable[[list[NDArray[np.uint8]], list[str]], NDArray[Any]]) -> Accuracy:
    """Return the fraction of the held-out scans that are classified right, with the worst of the unseen prompts.

    ``choose`` takes N images, uint8 (8, 8, 3) of 0..255, and ten texts, a digit's name in a prompt each, and gives
    (N, 10): logits or probabilities. It is called once per prompt. Raises as ``digits_score`` does.
    """
    images, labels = heldout_images()
    prompts = digit_prompts()
    right: list[NDArray[np.bool_]] = []
    for prompt in prompts:
        answers = choose(images, [prompt.replace("{}", name) for name in DIGIT_NAMES])
        found = finite(answers, (len(images), DIGITS), f"choose(images, {prompt!r})").argmax(1)
        right.append(found == labels)
    worst = min(right, key=np.sum)
    name = f"zero-shot accuracy, worst of {len(prompts)} unseen prompts"
    return Accuracy.of_each(name, "held-out scans of scikit-learn's digits", worst.tolist())


def retrieval_score(embed: Callable[[list[str]], NDArray[Any]]) -> Accuracy:
    """Return the fraction of the definitions whose own word is, of all words, the nearest by cosine similarity.

    ``embed`` takes N texts and gives (N, E); it is called twice, for 1,000 definitions and their 1,000 words.
    Raises ExportError for another shape, values that are not finite, and vectors of length zero.
    """
    definitions, words = wordnet_pairs()
    queries = unit_rows(embed(definitions), len(definitions))
    targets = unit_rows(embed(words), len(words))
    nearest = (queries @ targets.T).argmax(1)
    return Accuracy.of_each(
        "top-1 retrieval", "definitions and words of WordNet 3.0", nearest == np.arange(len(definitions))
    )


def bits_per_byte(log_probabilities: Callable[[str], NDArray[Any]], text: str) -> Rate:
    """Return the mean number of bits that the model needs to write a byte of ``text``, whose paragraphs are lines.

    ``log_probabilities`` takes a text and gives, in nats, the log-probability of each of its tokens but the first,
    given those before it. It is called once per block of whole paragraphs and the newline before them, which is the
    first token and is not counted. Raises ExportError for values that are not finite.
    """
    bits: list[float] = []
    sizes: list[int] = []
    for block in blocks(text):
        answers = np.asarray(log_probabilities("\n" + block), np.float64)
        if answers.ndim != 1 or not np.isfinite(answers).all():
            raise ExportError(
                f"log_probabilities of block {len(bits)} has shape {answers.shape} and is "
                f"{'finite' if np.isfinite(answers).all() else 'not finite'}; expected one number per token but the "
                "first. Try a wider precision."
            )
        bits.append(float(-answers.sum() / np.log(2)))
        sizes.append(len(block.encode()))
    return Rate("bits per byte", "held-out chapters of Jane Austen", tuple(bits), tuple(sizes))


def blocks(text: str) -> list[str]:
    """Cut the text into runs of whole lines, each of at least BLOCK_BYTES; a shorter rest joins the last."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if len(found[-1].encode()) >= BLOCK_BYTES:
            found.append("")
        found[-1] += line
    if len(found) > 1 and len(found[-1].encode()) < BLOCK_BYTES:
        found[-2:] = [found[-2] + found[-1]]
    return found


def masked_score(fill: Callable[[str], list[str]]) -> Accuracy:
    """Return the fraction of the masked words of held-out text that the model thinks most probable in their gaps.

    ``fill`` takes a text with one or more [MASK] and gives one word for each. Raises ExportError for another number.
    """
    return gaps_score("masked-word accuracy", masked_text(), fill)


def masked_bytes_score(fill: Callable[[str], list[str]]) -> Accuracy:
    """Return the fraction of the masked bytes of held-out text that the model thinks most probable in their gaps.

    As ``masked_score``, with a character of one byte for each gap.
    """
    return gaps_score("masked-byte accuracy", [(text, [*answers]) for text, answers in masked_bytes()], fill)


def gaps_score(name: str, passages: list[tuple[str, list[str]]], fill: Callable[[str], list[str]]) -> Accuracy:
    right: list[int] = []
    cases: list[int] = []
    for text, words in passages:
        found = fill(text)
        if len(found) != len(words):
            raise ExportError(
                f"fill gave {len(found)} words for {len(words)} gaps of {text[:40]!r}; expected one each."
            )
        right.append(sum(guess == word for guess, word in zip(found, words, strict=True)))
        cases.append(len(words))
    return Accuracy(name, "held-out chapters of Jane Austen", tuple(right), tuple(cases))


def dates_score(translate: Callable[[list[str]], list[str]]) -> Accuracy:
    """Return the fraction of the held-out dates that are turned into their ISO form, letter by letter.

    ``translate`` takes N texts and gives N. Raises ExportError for another number.
    """
    return Accuracy.of_each("exact match", "dates that training never saw", exact_matches(translate, *heldout_dates()))


def date_lists_score(translate: Callable[[list[str]], list[str]]) -> Accuracy:
    """Return the fraction of the held-out lists whose dates are all turned into their ISO form, letter by letter.

    By the number of dates as well. ``translate`` and errors as in ``dates_score``.
    """
    texts, expected = heldout_date_lists()
    right = exact_matches(translate, texts, expected)
    every = Accuracy.of_each("exact match", "lists of dates that training never saw", right)
    return replace(every, by_length=tuple(accuracies_by_dates(every, texts)))


def accuracies_by_dates(every: Accuracy, texts: list[str]) -> Iterator[LengthAccuracy]:
    """Yield the accuracy of ``every`` on the lists of each number of dates, the smallest first."""
    numbers = [text.count(LIST_SEPARATOR) + 1 for text in texts]
    for dates in sorted(set(numbers)):
        chosen = [index for index, number in enumerate(numbers) if number == dates]
        sizes = [len(texts[index]) for index in chosen]
        accuracy = Accuracy.of_each(every.name, every.data, (bool(every.right[index]) for index in chosen))
        name = f"{dates} date{'s' if dates > 1 else ''}"
        yield LengthAccuracy(name, (min(sizes), sum(sizes) / len(sizes), max(sizes)), accuracy)


def captions_score(caption: Callable[[list[NDArray[np.uint8]]], list[str]]) -> Accuracy:
    """Return the fraction of the held-out compositions whose caption is right in every word.

    ``caption`` takes N images, uint8 (32, 32) of 0..255, and gives N texts. Raises ExportError for another number.
    """
    scans, compositions = heldout_compositions()
    found = caption([composition.draw(scans) for composition in compositions])
    if len(found) != len(compositions):
        raise ExportError(f"caption gave {len(found)} texts for {len(compositions)} images; expected one each.")
    right = [text == each.caption for text, each in zip(found, compositions, strict=True)]
    return Accuracy.of_each("exact match", "captions of digits that training never saw", right)


def questions_score(answer: Callable[[list[list[Any]]], list[str]]) -> Accuracy:
    """Return the fraction of the held-out questions about images that are answered right in every word.

    ``answer`` takes N prompts, an image, uint8 (32, 32) of 0..255, and a question each, and gives N texts. Raises
    ExportError for another number.
    """
    scans, questions = heldout_questions()
    found = answer([[each.draw(scans), each.question] for each in questions])
    if len(found) != len(questions):
        raise ExportError(f"answer gave {len(found)} texts for {len(questions)} questions; expected one each.")
    right = [text == each.answer for text, each in zip(found, questions, strict=True)]
    return Accuracy.of_each("exact match", "questions about digits that training never saw", right)


def exact_matches(translate: Callable[[list[str]], list[str]], texts: list[str], expected: list[str]) -> list[bool]:
    """Compare N translations with what is expected. Raises ExportError for another number of them."""
    found = translate(texts)
    if len(found) != len(texts):
        raise ExportError(f"translate gave {len(found)} texts for {len(texts)}; expected one each.")
    return [answer == target for answer, target in zip(found, expected, strict=True)]


def unit_rows(vectors: NDArray[Any], n: int) -> NDArray[np.float64]:
    """Scale rows to length one, in FP64."""
    rows = finite(vectors, (n, None), "embed(texts)")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise ExportError(
            f"embed(texts)[{int(lengths.argmin())}] is a vector of zeros; expected a direction. Check the pooling."
        )
    return np.asarray(rows / lengths, np.float64)


def finite(answers: NDArray[Any], shape: tuple[int, int | None], call: str) -> NDArray[np.float64]:
    """Return the answers in FP64. NaN is refused: argmax would take its place for an answer."""
    array = np.asarray(answers, np.float64)
    if array.ndim != 2 or any(size not in (None, found) for size, found in zip(shape, array.shape, strict=True)):
        raise ExportError(
            f"{call} has shape {array.shape}; expected ({shape[0]}, {shape[1] or 'E'}): one row per input. "
            "Check which checkpoint is being scored."
        )
    if not np.isfinite(array).all():
        row = int(np.isfinite(array).all(1).argmin())
        raise ExportError(f"{call}[{row}] is not finite; a score needs numbers. Try a wider precision.")
    return array


def digits_score_of(bundle: LoadedBundle) -> Accuracy:
    def predict(images: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
        ranked = cast(ViT, bundle).classify(images, top_k=DIGITS)
        return np.array([[dict(row)[str(digit)] for digit in range(DIGITS)] for row in ranked])

    return digits_score(predict)


def zero_shot_score_of(bundle: LoadedBundle) -> Accuracy:
    def choose(images: list[NDArray[np.uint8]], texts: list[str]) -> NDArray[np.float64]:
        ranked = cast(Clip, bundle).zero_shot(images, texts)
        return np.array([[dict(row)[text] for text in texts] for row in ranked])

    return zero_shot_score(choose)


def retrieval_score_of(bundle: LoadedBundle) -> Accuracy:
    return retrieval_score(cast(Bert, bundle).embed)


def bits_per_byte_of(bundle: LoadedBundle) -> Rate:
    return bits_per_byte(cast(GPT, bundle).log_probabilities, heldout_text())


def masked_score_of(bundle: LoadedBundle) -> Accuracy:
    return masked_score(filled_by(bundle))


def masked_bytes_score_of(bundle: LoadedBundle) -> Accuracy:
    return masked_bytes_score(filled_by(bundle))


def filled_by(bundle: LoadedBundle) -> Callable[[str], list[str]]:
    """Return what fills each gap of a text with the most probable token."""

    def fill(text: str) -> list[str]:
        ranked = cast(TextHeads, bundle).fill_mask(text, top_k=1)
        gaps = [ranked] if text.count(MASK) == 1 else ranked  # one gap's answer comes without a list around it
        return [gap[0][0] for gap in gaps]

    return fill


def dates_score_of(bundle: LoadedBundle) -> Accuracy:
    return dates_score(greedy(bundle))


def date_lists_score_of(bundle: LoadedBundle) -> Accuracy:
    return date_lists_score(greedy(bundle))


def greedy(bundle: LoadedBundle) -> Callable[[list[str]], list[str]]:
    """Return the translation of a bundle that takes the most probable token each time."""
    return lambda texts: cast(Transformer, bundle).translate(texts, num_beams=1)


def captions_score_of(bundle: LoadedBundle) -> Accuracy:
    return captions_score(lambda images: cast(ShowAttendTell, bundle).caption(images, num_beams=1))


def questions_score_of(bundle: LoadedBundle) -> Accuracy:
    return questions_score(lambda prompts: cast(Flamingo, bundle).answer(prompts, num_beams=1))
