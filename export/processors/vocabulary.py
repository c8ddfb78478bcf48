"""A BPE vocabulary and its merges, of tokenizer.json or of vocab.json and merges.txt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.processors.tokenizer_settings import FILE, refusal
from transom.models.json_files import read_object
from transom.runtime.text.tokenizer_json import parse_tokenizer

if TYPE_CHECKING:
    from tokenizers.processors import PostProcessor

Bpe = tuple[dict[str, int], list[tuple[str, str]]]


def read_bpe(
    folder: Path, stored: Mapping[str, Any] | None, rows: int | None, name: str
) -> tuple[Bpe, PostProcessor | None]:
    """Vocabulary and merges for the class ``name``, and the template of a tokenizer.json.

    ``stored`` is tokenizer.json, parsed, or None where there is none; it wins over the two older files.
    """
    from tokenizers.models import BPE

    if stored is not None:
        opened = parse_tokenizer((folder / FILE).read_bytes())
        kind = type(opened.model).__name__
        if kind != "BPE":
            raise refusal(folder, f"tokenizer.json holds a {kind} model and {name} takes BPE")
        vocabulary = stored["model"]["vocab"]
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in stored["model"]["merges"]]
        check_rows(FILE, vocabulary, rows)
        return (vocabulary, [(str(first), str(second)) for first, second in pairs]), opened.post_processor
    missing = [file for file in ("vocab.json", "merges.txt") if not (folder / file).is_file()]
    if missing:
        raise refusal(folder, f"neither tokenizer.json nor {' and '.join(missing)}, which {name} is made of")
    read_vocabulary(folder / "vocab.json", rows)
    return BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt")), None


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
