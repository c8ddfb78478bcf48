"""Answer prompts of `transom run` about images: captions of image files, or questions with the files of ``--image``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transom.runtime.errors import InputError
from transom.runtime.tasks.generator_task import has_tokenizer, ids_of
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt, MarkedPrompt
from transom.runtime.tasks.task import Result, RunOptions


def ask_about_images(bundle: Any, inputs: Sequence[str], options: RunOptions) -> list[Result]:
    """Return one result per text made; of an INPUT whose image cannot be read its "error".

    Raises InputError as ``marked_prompts`` does, and that of the image where there is one INPUT alone.
    """
    kind = "prompt" if options.images or not has_tokenizer(bundle) else "image"
    prompts = marked_prompts(bundle, inputs, options)
    if len(prompts) == 1:
        answers = [bundle.generate(prompts[0], **options.keywords)]
    else:
        answers = bundle.generate(prompts, return_exceptions=True, **options.keywords)
    results: list[Result] = []
    for given, answer in zip(inputs, answers, strict=True):
        if isinstance(answer, InputError):
            results.append({kind: given, "error": {"type": type(answer).__name__, "message": str(answer)}})
            continue
        for tokens in answer if answer and isinstance(answer[0], list) else [answer]:
            made = {"text": bundle.answer_text(tokens)} if has_tokenizer(bundle) else {"ids": tokens}
            results.append({kind: given, **made, "tokens": len(tokens)})
    return results


def prompt_of_input(bundle: Any, given: str, options: RunOptions) -> InterleavedPrompt:
    """Return what ``stream`` takes for an INPUT: ids, and the images opened."""
    prompt: InterleavedPrompt = bundle.reader().open(marked_prompts(bundle, [given], options)[0])
    return prompt


def marked_prompts(bundle: Any, inputs: Sequence[str], options: RunOptions) -> list[MarkedPrompt]:
    """Return a prompt for each INPUT: an image file to describe, or with ``--image`` a question about such files.

    The files are dealt out in their order: one for each mark of an INPUT, one in front of an INPUT without a mark. A
    bundle without a tokenizer takes ids. Raises InputError where files and marks are not as many, and where no INPUT is
    a file although no ``--image`` is given.
    """
    reader = bundle.reader()
    if not has_tokenizer(bundle):
        rows = [ids_of(bundle, given, truncate=False) for given in inputs]
        needed = [row.count(reader.mark) for row in rows]
        files = dealt(needed, options.images, f"one for each token {reader.mark} of an INPUT")
        return [MarkedPrompt(row, own) for row, own in zip(rows, files, strict=True)]
    if options.images:
        needed = [given.count(reader.word()) or 1 for given in inputs]
        files = dealt(needed, options.images, f"one for each {reader.word()} of an INPUT, one for an INPUT without it")
        parts = [about(bundle, given, own) for given, own in zip(inputs, files, strict=True)]
    else:
        if not any(map(os.path.exists, inputs)):
            raise InputError(
                f"{inputs[0]!r:.80} is not a file that is there; without --image an INPUT is an image to describe. "
                "Check the path, or give --image FILE beside a question."
            )
        parts = [bundle.caption_parts(given) for given in inputs]
    prompts: list[MarkedPrompt] = list(reader.read(parts).given)
    return prompts


def about(bundle: Any, given: str, files: Sequence[Path]) -> list[Any]:
    """Return the parts of a question with its files: at its marks, or in front where it has none."""
    reader = bundle.reader()
    parts = reader.placed(given, files) if reader.word() in given else [*files, given]
    asked: list[Any] = bundle.question_parts(parts)
    return asked


def dealt(needed: Sequence[int], images: Sequence[str], places: str) -> list[list[Path]]:
    """Deal the files of ``--image`` out to the INPUTs, ``needed`` each; InputError where they are not as many.

    ``places`` describes where images stand.
    """
    if sum(needed) != len(images):
        raise InputError(
            f"--image was given {len(images)} times, but the places of images are {sum(needed)}: {places}. Give "
            "as many files."
        )
    files = iter(images)
    return [[Path(next(files)) for _ in range(count)] for count in needed]
