"""Print a generated text while it is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transom.cli.output import printable

if TYPE_CHECKING:
    from transom.runtime.tasks.task import RunOptions


def streams(bundle: Any, prompts: Sequence[str], options: RunOptions) -> bool:
    """Return whether one text is asked for whose tokens are final as soon as they are there."""
    from transom.runtime.generation import GenerationConfig, with_keywords

    if len(prompts) != 1 or options.score:
        return False
    stored = GenerationConfig.from_json(bundle.manifest.generation or {})
    return with_keywords(stored, **options.keywords).rows(1) == 1


def print_stream(bundle: Any, prompt: str, options: RunOptions) -> None:
    """Print what comes after the prompt while it is made; its line is ended also where it is cut short."""
    from transom.runtime.tasks.generator_task import prompt_ids

    tokens = bundle.stream(prompt_ids(bundle, prompt, truncate=options.truncate), **options.keywords)
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
    """Yield tokens as they are printed: whole characters, or ids with spaces between them."""
    if bundle.manifest.tokenizer is None:
        for number, token in enumerate(tokens):
            yield f" {token}" if number else str(token)
        return
    text = bundle.target_tokenizer().detokenizer()
    for token in tokens:
        yield text.add(token)
    yield text.end()
