"""Search notes by meaning: a command-line tool around a bundle that embeds texts.

    transom export minilm --out bundles/minilm
    python examples/search_notes.py bundles/minilm notes/ "what did we decide about the roof?"
    python examples/search_notes.py bundles/minilm diary.txt "days at the sea" --top-k 3 --json

NOTES is a text file, or a folder whose .txt and .md files are read. Every paragraph is embedded once and remembered in
a cache (--cache FILE.npz, otherwise one per NOTES in the user's cache folder): the next search embeds only what is new.
The cache belongs to one bundle, by the hash of its bundle.json, and is begun again for another. Needs only the runtime.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from transom.runtime import load
from transom.runtime.errors import InputError, TransomError
from transom.runtime.tasks.bert import Bert

ENDINGS = (".txt", ".md")
WORDS = 120  # of a passage at most: MiniLM reads 256 tokens, and what is behind them is not seen
AT_ONCE = 64  # passages embedded between two lines of progress

Floats = NDArray[np.float32]
Vectors = dict[str, Floats]  # SHA-256 of a passage -> its vector, unit length


class NotesError(Exception):
    """What the caller can put right."""


@dataclass(frozen=True)
class Passage:
    """A paragraph, or a part of a long one, and where it begins."""

    path: Path
    line: int
    text: str

    @property
    def key(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def note_files(notes: Path) -> list[Path]:
    if notes.is_file():
        return [notes]
    if not notes.is_dir():
        raise NotesError(f"{notes} is neither a file nor a folder.")
    return sorted(path for path in notes.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())


def passages_of(path: Path) -> Iterator[Passage]:
    """Paragraphs are separated by blank lines; a long one is cut into parts of WORDS words."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        print(f"{path} is not text in UTF-8; left out.", file=sys.stderr)
        return
    for paragraph in re.finditer(r"\S(?:.|\n(?!\s*\n))*", text):
        words = list(re.finditer(r"\S+", paragraph[0]))
        for first in range(0, len(words), WORDS):
            part = words[first : first + WORDS]
            line = text.count("\n", 0, paragraph.start() + part[0].start()) + 1
            yield Passage(path, line, " ".join(word[0] for word in part))


def read_cache(path: Path, bundle: str) -> Vectors:
    """What an earlier search embedded with the same bundle; nothing where there is no such file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["bundle"]) != bundle:
                return {}
            return dict(zip(file["keys"].tolist(), file["vectors"], strict=True))
    except FileNotFoundError:
        return {}
    except (EOFError, ValueError, KeyError, BadZipFile):
        if path.suffix != ".npz":
            raise InputError(f"{path} is no cache; name a file that ends in .npz with --cache.") from None
        print(f"{path} is damaged or of another program; it is written again.", file=sys.stderr)
        return {}


def write_cache(path: Path, bundle: str, vectors: Vectors) -> None:
    """Beside, then renamed: a search that is interrupted leaves the old cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, bundle=np.array(bundle), keys=np.array(list(vectors)), vectors=np.stack([*vectors.values()]))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def default_cache(notes: Path) -> Path | None:
    """In the user's cache folder; None where that cannot be had, and every search embeds all passages."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        (base / "search_notes").mkdir(parents=True, exist_ok=True)
        if not os.access(base / "search_notes", os.W_OK):
            raise PermissionError(f"{base / 'search_notes'} cannot be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"search_notes: vectors are not kept for the next search: {error}. Name a --cache.", file=sys.stderr)
        return None
    return base / "search_notes" / f"{hashlib.sha256(str(notes.resolve()).encode()).hexdigest()[:16]}.npz"


def unit(vectors: Floats) -> Floats:
    """Of length 1, so that a dot product is the cosine; not every bundle normalises."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.float32(1e-12)), np.float32)


def embed_new(bert: Bert, passages: list[Passage], known: Mapping[str, Floats]) -> Vectors:
    """The vectors of all passages, those that are known taken over; passages that are gone are forgotten."""
    vectors = {passage.key: known[passage.key] for passage in passages if passage.key in known}
    new = list({passage.key: passage for passage in passages if passage.key not in known}.values())
    for first in range(0, len(new), AT_ONCE):
        batch = new[first : first + AT_ONCE]
        print(f"embedding {first + len(batch)} of {len(new)} new passages ...", file=sys.stderr)
        embedded = unit(bert.embed([passage.text for passage in batch]))
        vectors |= {passage.key: vector for passage, vector in zip(batch, embedded, strict=True)}
    return vectors


def search(bundle: Path, notes: Path, question: str, top_k: int, cache: Path | None) -> list[tuple[float, Passage]]:
    """The ``top_k`` passages nearest to the question by cosine, best first."""
    passages = [passage for path in note_files(notes) for passage in passages_of(path)]
    if not passages:
        raise NotesError(f"{notes} holds no text; expected paragraphs in {' or '.join(ENDINGS)} files.")
    with load(bundle) as bert:
        if not isinstance(bert, Bert):
            raise NotesError(f"{bundle} is a bundle for {bert.manifest.task}; expected one that embeds texts.")
        asked = unit(bert.embed(question))
        identity = hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
        known = read_cache(cache, identity) if cache is not None else {}
        vectors = embed_new(bert, passages, known)
    if cache is not None and vectors.keys() != known.keys():
        write_cache(cache, identity, vectors)
    cosines = np.stack([vectors[passage.key] for passage in passages]) @ asked
    return [(float(cosines[index]), passages[index]) for index in np.argsort(-cosines, kind="stable")[:top_k]]


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive integer")
    return int(word)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("notes", type=Path)
    parser.add_argument("question")
    parser.add_argument("--top-k", type=positive, default=5, metavar="N")
    parser.add_argument("--cache", type=Path, metavar="FILE.npz")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    cache = options.cache or default_cache(options.notes)
    try:
        found = search(options.bundle, options.notes, options.question, options.top_k, cache)
    except (TransomError, NotesError) as error:
        print(f"search_notes: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"search_notes: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for cosine, passage in found:
        if options.json:
            record = {"cosine": cosine, "path": str(passage.path), "line": passage.line, "text": passage.text}
            print(json.dumps(record))
        else:
            print(f"{cosine:.3f}  {passage.path}:{passage.line}  {passage.text[:160]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
