"""Print a generated text while it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transom.cli.output import printable

if TYPE_CHECKING:
    from transom.runtime.tasks.task import RunOptions


def can_stream(bundle: Any, prompts: Sequence[str], options: RunOptions) -> bool:
    """Return whether one text is asked for, without beams: its tokens are final at once and can be streamed."""
    from transom.runtime.generation import GenerationConfig, with_keywords

    if len(prompts) != 1 or options.score:
        return False
    stored = GenerationConfig.from_json(bundle.manifest.generation or {})
    return with_keywords(stored, **options.keywords).rows(1) == 1


def print_stream(bundle: Any, prompt: Any, options: RunOptions, *, trimmed: bool = False) -> None:
    """Print the new text of a prompt while it is generated; end its line also where it is interrupted.

    ``trimmed`` leaves out blanks around the text.
    """
    from transom.runtime.tasks.generator_task import trim

    tokens = bundle.stream(prompt, **options.keywords)
    started = False
    try:
        for piece in trim(pieces(bundle, tokens)) if trimmed else pieces(bundle, tokens):
            print("\n".join(map(printable, piece.split("\n"))), end="", flush=True)
            started = True
    except BaseException:
        if started:
            print()
        raise
    print()


def pieces(bundle: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Yield tokens as they are printed: whole characters, or ids with spaces between them."""
    from transom.runtime.tasks.generator_task import writes_text

    if not writes_text(bundle):
        for number, token in enumerate(tokens):
            yield f" {token}" if number else str(token)
        return
    detokenizer = bundle.target_tokenizer().detokenizer()
    for token in tokens:
        yield detokenizer.add(token)
    yield detokenizer.end()
