"""What the reference Flamingo answers in PyTorch, and how often it is right: greedy, few-shot prompts among it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from digit_dialogues import END, END_ID, IMAGE, QUESTION, UNSAID
from digit_questions import KINDS, WHOLE, kind_of
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from transom.calib.digit_questions import DigitQuestion
from transom.models.flamingo import Flamingo

SHOTS = (0, 1, 2, 4)
MOST_TOKENS, TOGETHER = 12, 40
Example = tuple[NDArray[np.uint8], str, str]  # image (CANVAS, CANVAS), question, answer
Prompt = tuple[list[NDArray[np.uint8]], str]  # images, and a text with a mark for each


def prompt(image: NDArray[np.uint8], question: str, examples: Sequence[Example], *, said: bool = True) -> Prompt:
    """A few-shot prompt, in which the question and those of the examples are said or not."""
    asked = [(QUESTION if said else UNSAID).format(each) for _, each, _ in (*examples, (image, question, ""))]
    chunks = [f"{IMAGE}{each} {answer}{END}" for each, (_, _, answer) in zip(asked, examples, strict=False)]
    return [*(each for each, _, _ in examples), image], "".join([*chunks, IMAGE + asked[-1]])


def pixel_values(images: list[NDArray[np.uint8]]) -> Tensor:
    """Float32 (B, 3, CANVAS, CANVAS) in -1..1, as the image processor gives them."""
    return ((torch.from_numpy(np.stack(images)).float() / 255 - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


@torch.inference_mode()
def written(model: Flamingo, tokenizer: Tokenizer, prompts: list[Prompt]) -> list[str]:
    """The most probable token each time, up to the end of the chunk; prompts of as many images each."""
    if len(prompts) > TOGETHER:
        parts = [prompts[first : first + TOGETHER] for first in range(0, len(prompts), TOGETHER)]
        return [text for part in parts for text in written(model, tokenizer, part)]
    *states, _ = model.encode(pixel_values([image for images, _ in prompts for image in images]))
    rows = tuple(state.squeeze(2).unflatten(0, (len(prompts), -1)).transpose(1, 2) for state in states)
    given = [tokenizer.encode(text).ids for _, text in prompts]
    tokens = torch.full((len(prompts), max(map(len, given)) + MOST_TOKENS), END_ID)
    for row, ids in zip(tokens, given, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    every, ends = torch.arange(len(prompts)), torch.tensor([len(ids) for ids in given])
    for step in range(MOST_TOKENS):
        tokens[every, ends + step] = model(tokens[:, : int(ends.max()) + step], *rows)[every, ends + step - 1].argmax(
            -1
        )
    found = [row[len(ids) : len(ids) + MOST_TOKENS].tolist() for row, ids in zip(tokens, given, strict=True)]
    return [tokenizer.decode([*ids, END_ID][: [*ids, END_ID].index(END_ID)]).strip() for ids in found]


def right_by_kind(
    model: Flamingo,
    tokenizer: Tokenizer,
    scans: NDArray[np.uint8],
    cases: list[DigitQuestion],
    examples: list[Example],
    shots: int,
    *,
    said: bool = True,
) -> dict[str, list[bool]]:
    """Which of the questions are answered right, by their kind; where they are not said, those of WHOLE alone."""
    kinds = KINDS if said else WHOLE
    chosen = [each for each in cases if kind_of(each.question) in kinds]
    prompts = [
        prompt(each.draw(scans), each.question, [examples[number] for number in each.examples[:shots]], said=said)
        for each in chosen
    ]
    found: dict[str, list[bool]] = {kind: [] for kind in kinds}
    for each, text in zip(chosen, written(model, tokenizer, prompts), strict=True):
        found[kind_of(each.question)].append(text == each.answer)
    return found


def report(
    model: Flamingo,
    tokenizer: Tokenizer,
    scans: NDArray[np.uint8],
    cases: list[DigitQuestion],
    examples: list[Example],
) -> None:
    """Print the accuracy of each kind of question against the number of examples, the question said and not."""
    for kind in KINDS:
        answers = Counter(each.answer for each in cases if kind_of(each.question) == kind)
        print(f"{kind} most frequent answer: {answers.most_common(1)[0][1] / answers.total():.1%}")
    for said in (True, False):
        for shots in SHOTS:
            found = right_by_kind(model, tokenizer, scans, cases, examples, shots, said=said)
            every = [each for answers in found.values() for each in answers]
            shown = ", ".join(f"{kind} {sum(answers)}/{len(answers)}" for kind, answers in found.items())
            title = f"{'said' if said else 'unsaid'}, {shots} examples"
            print(f"{title}: {sum(every)} of {len(every)} = {np.mean(every):.1%} ({shown})", flush=True)
