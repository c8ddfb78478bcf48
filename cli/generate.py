"""``transom run`` for bundles that generate: prompts in, what comes after them out, or how probable a text is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from transom.cli.output import printable
from transom.runtime.errors import InputError

if TYPE_CHECKING:
    from transom.cli.answers import Wishes

Result = Mapping[str, Any]
ID = re.compile(r"-?[0-9]{1,18}")  # int64; the runtime says which ids the model has


def generate(bundle: Any, prompts: Sequence[str], wishes: Wishes) -> list[Result]:
    """One result per text made: as many as INPUTs, times ``--num-return-sequences``."""
    if wishes.score:
        return [score(bundle, text) for text in prompts]
    rows = [row_of(bundle, prompt, truncate=wishes.truncate) for prompt in prompts]
    found = bundle.generate(rows, **wishes.keywords)
    results: list[Result] = []
    for prompt, answer in zip(prompts, found, strict=True):
        for tokens in answer if answer and isinstance(answer[0], list) else [answer]:
            results.append({"prompt": prompt, **made(bundle, tokens), "tokens": len(tokens)})
    return results


def made(bundle: Any, tokens: list[int]) -> Result:
    return {"text": bundle.target_encoder().decode(tokens)} if has_tokenizer(bundle) else {"ids": tokens}


def score(bundle: Any, text: str) -> Result:
    """The perplexity of a text over its tokens but the first, which nothing precedes."""
    row = row_of(bundle, text, truncate=False)
    return {"text": text, "perplexity": bundle.score(row), "tokens": len(row)}


def row_of(bundle: Any, prompt: str, *, truncate: bool) -> list[int]:
    """The ids of a prompt: of its text or, for a bundle without a tokenizer, those that it spells."""
    if not prompt:
        raise InputError("a prompt is empty; expected a text, or token ids for a bundle without a tokenizer.")
    if has_tokenizer(bundle):
        (row,) = bundle.encoder().encode([prompt], truncate=truncate).rows
        return list(row.ids)
    words = re.split(r"[\s,]+", prompt.strip())
    if not all(map(ID.fullmatch, words)):
        raise InputError(
            f"the prompt is {prompt!r:.60}, but this bundle has no tokenizer, since its checkpoint had none; "
            "expected token ids, such as '1 2 3'."
        )
    return [int(word) for word in words]


def has_tokenizer(bundle: Any) -> bool:
    return bundle.manifest.tokenizer is not None


def streams(bundle: Any, prompts: Sequence[str], wishes: Wishes) -> bool:
    """Whether one text is asked for whose tokens are final as soon as they are there."""
    from transom.runtime.generation import GenerationSettings

    if len(prompts) != 1 or wishes.score:
        return False
    settings = GenerationSettings.from_json(bundle.manifest.generation or {}).with_keywords(**wishes.keywords)
    return settings.rows(1) == 1


def print_stream(bundle: Any, prompt: str, wishes: Wishes) -> None:
    """Print what comes after the prompt while it is made; its line is ended also where it is cut short."""
    tokens = bundle.stream(row_of(bundle, prompt, truncate=wishes.truncate), **wishes.keywords)
    begun = False
    try:
        for piece in pieces(bundle, tokens):
            print("\n".join(map(printable, piece.split("\n"))), end="", flush=True)
            begun = True
    except BaseException:
        if begun:
            print()
        raise
    print()


def pieces(bundle: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Tokens as they are printed: whole characters, or ids with spaces between them."""
    if not has_tokenizer(bundle):
        for number, token in enumerate(tokens):
            yield f" {token}" if number else str(token)
        return
    text = bundle.target_encoder().stream()
    for token in tokens:
        yield text.add(token)
    yield text.end()


def generated_lines(results: Sequence[Result]) -> Iterator[str]:
    """What is new alone where it is one text; else below each prompt what came after it."""
    if len(results) == 1:
        yield from text_lines(results[0])
        return
    for prompt, answers in groupby(results, key=lambda result: result.get("prompt", result.get("text"))):
        yield str(prompt)
        for answer in answers:
            yield from (f"  {line}" for line in text_lines(answer))


def text_lines(result: Result) -> list[str]:
    if "perplexity" in result:
        return [f"perplexity {result['perplexity']:.4f}, {result['tokens']} tokens"]
    return str(result["text"]).split("\n") if "text" in result else [" ".join(map(str, result["ids"]))]
