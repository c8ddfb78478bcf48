"""vocab.json: a JSON object of ids by token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transom.models.json_files import read_object


def read_vocabulary(path: Path, rows: int | None) -> dict[str, int]:
    """Read it; ValueError unless the ids are 0, 1, 2, ..., each once, and within an embedding table of ``rows``."""
    vocabulary = read_object(path)
    strange = next((token for token, number in vocabulary.items() if type(number) is not int), None)
    if strange is not None:
        raise ValueError(f"{path.name} gives {strange!r:.60} the id {vocabulary[strange]!r:.60}, expected an integer")
    if not vocabulary:
        raise ValueError(f"{path.name} has no tokens")
    numbers = sorted(vocabulary.values())
    wrong = next((place for place, number in enumerate(numbers) if number != place), None)
    if wrong is not None:
        twice = wrong > 0 and numbers[wrong] == numbers[wrong - 1]
        what = f"the id {numbers[wrong]} twice" if twice else f"no token with the id {wrong}"
        raise ValueError(f"{path.name} has {what}; expected 0..{len(numbers) - 1}, each once")
    check_rows(path.name, vocabulary, rows)
    return vocabulary


def check_rows(name: str, vocabulary: Mapping[str, int], rows: int | None) -> None:
    """ValueError where an id is beyond an embedding table of ``rows``; tokens added later are not in ``vocabulary``."""
    most = max(vocabulary.values(), default=0)
    if rows is not None and most >= rows:
        raise ValueError(f"{name} has ids up to {most}, the model's are 0..{rows - 1}; it is that of another model")
