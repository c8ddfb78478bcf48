"""Generate token ids and answer prompts of `transom run`: new text of prompts, or the perplexity of texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from transom.runtime.errors import InputError
from transom.runtime.tasks.task import Result, RunOptions, subject

EMPTY = "{} is empty; expected a text, or token ids for a bundle without a tokenizer."
ID = re.compile(r"-?[0-9]{1,18}")  # int64; the runtime says which ids the model has


def ask_generator(bundle: Any, prompts: Sequence[str], options: RunOptions) -> list[Result]:
    """Return one result per text made: as many as INPUTs, times ``--num-return-sequences``.

    Raises InputError for an empty prompt, by its place.
    """
    if "" in prompts and len(prompts) > 1:
        raise InputError(EMPTY.format(f"prompt {list(prompts).index('')}"))
    if options.score:
        return [score(bundle, text) for text in prompts]
    rows = [prompt_of(bundle, prompt, options) for prompt in prompts]
    return generated(bundle, "prompt", prompts, bundle.generate(rows, **options.keywords))


def generated(bundle: Any, kind: str, inputs: Sequence[str], answers: Sequence[Any]) -> list[Result]:
    """Return one result per answer, of which an INPUT may have several; ``kind`` is what an INPUT is."""
    results: list[Result] = []
    for given, answer in zip(inputs, answers, strict=True):
        for tokens in answer if answer and isinstance(answer[0], list) else [answer]:
            results.append({kind: given, **text_or_ids(bundle, tokens), "tokens": len(tokens)})
    return results


def text_or_ids(bundle: Any, tokens: list[int]) -> Result:
    """Return generated tokens as text, or as ids where the bundle has no tokenizer."""
    return {"text": bundle.target_tokenizer().decode(tokens)} if writes_text(bundle) else {"ids": tokens}


def score(bundle: Any, text: str) -> Result:
    """Return the perplexity of a text over its tokens but the first, which nothing precedes."""
    row = ids_of(bundle, text, truncate=False)
    return {"text": text, "perplexity": bundle.score(row), "tokens": len(row)}


def prompt_of(bundle: Any, prompt: str, options: RunOptions) -> list[int]:
    """Return the ids of a prompt, as ``generate`` and ``stream`` take them."""
    return ids_of(bundle, prompt, truncate=options.truncate)


def ids_of(bundle: Any, prompt: str, *, truncate: bool) -> list[int]:
    """Return the ids of a prompt: of its text or, for a bundle without a tokenizer, those that it spells.

    Raises InputError for an empty prompt, and for one that is no ids where ids are needed.
    """
    if not prompt:
        raise InputError(EMPTY.format("a prompt"))
    if has_tokenizer(bundle):
        (row,) = bundle.tokenizer().encode([prompt], truncate=truncate).rows
        return list(row.ids)
    words = re.split(r"[\s,]+", prompt.strip())
    if not all(map(ID.fullmatch, words)):
        raise InputError(
            f"the prompt is {prompt!r:.60}, but this bundle has no tokenizer, since its checkpoint had none; "
            "expected token ids, such as '1 2 3'."
        )
    return [int(word) for word in words]


def writes_text(bundle: Any) -> bool:
    """Return whether generated tokens can be decoded."""
    return has_tokenizer(bundle) or bundle.manifest.target_tokenizer is not None


def has_tokenizer(bundle: Any) -> bool:
    return bundle.manifest.tokenizer is not None


def generated_lines(results: Sequence[Result]) -> Iterator[str]:
    """Yield what is new alone where it is one text; else below each prompt what came after it."""
    if len(results) == 1:
        yield from text_lines(results[0])
        return
    for prompt, answers in groupby(results, key=subject):
        yield prompt
        for answer in answers:
            yield from (f"  {line}" for line in text_lines(answer))


def text_lines(result: Result) -> list[str]:
    """Return one generated text, ids or perplexity as lines; none of an INPUT that failed."""
    if "error" in result:
        return []
    if "perplexity" in result:
        return [f"perplexity {result['perplexity']:.4f}, {result['tokens']} tokens"]
    return str(result["text"]).split("\n") if "text" in result else [" ".join(map(str, result["ids"]))]


def trim(pieces: Iterator[str]) -> Iterator[str]:
    """Yield pieces without the blanks around the text that they make."""
    held = ""  # blanks, which nothing has followed yet
    begun = False
    for piece in pieces:
        text = held + piece if begun else piece.lstrip()
        begun = begun or bool(text)
        yield text.rstrip()
        held = text[len(text.rstrip()) :]
