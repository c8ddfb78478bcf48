"""Read a checkpoint's licence and its revision on the hub, where its folder says them.

The folder is somebody else's: files are read within bounds, texts are cut and kept to printable characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"  # the hub's model card; YAML between two lines of --- at its head
CARD_BYTES = 1 << 16  # of the head; cards list languages and data sets by the hundred
FIELDS = {"license": "id", "license_name": "name", "license_link": "link"}  # of a card -> of bundle.json
MOST_TEXT = {"id": 100, "name": 200, "link": 500, "file": 100}  # characters
LICENCE_FILE = re.compile(r"(licen[cs]e|copying)([.-].{1,40})?", re.IGNORECASE)
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # SHA-1, or SHA-256, of git
METADATA = ".cache/huggingface/download"  # beside what `hf download --local-dir` wrote: a file for each, commit first
METADATA_BYTES = 4096


def licence(folder: Path) -> dict[str, str]:
    """Return what the folder says of the checkpoint's licence; empty where it says nothing.

    ``id``, ``name`` and ``link`` are the model card's license, license_name and license_link, as the hub defines them;
    ``file`` is the name of a licence's text in the folder.
    """
    found = {FIELDS[key]: value for key, value in front_matter(head(folder / CARD, CARD_BYTES)) if key in FIELDS}
    names = sorted(path.name for path in folder.iterdir() if LICENCE_FILE.fullmatch(path.name) and path.is_file())
    if names:
        found["file"] = names[0]
    cleaned = {key: printable(value, MOST_TEXT[key]) for key, value in found.items()}
    return {key: value for key, value in cleaned.items() if value}


def revision(folder: Path, config: Mapping[str, Any], files: Sequence[Path]) -> str | None:
    """Return the commit of the hub's repository that ``files`` in ``folder`` are of, in hex; None where not known.

    From the hub cache's ``snapshots/<commit>``, from what the hub's client notes of each file in a folder that it
    downloaded to, where all have one commit and none was changed since, or from config.json's ``_commit_hash``.
    """
    resolved = folder.resolve()
    for part in (resolved, *resolved.parents):
        if part.parent.name == "snapshots" and COMMIT.fullmatch(part.name):
            return part.name
    if (folder / METADATA).is_dir():
        commits = {noted_commit(folder, file) for file in files}
        return commits.pop() if len(commits) == 1 else None
    said = config.get("_commit_hash")
    return said if isinstance(said, str) and COMMIT.fullmatch(said) else None


def noted_commit(folder: Path, file: Path) -> str | None:
    """Return the commit that the hub's client notes of a file below ``folder``; None of one that was changed since."""
    note = folder / METADATA / file.relative_to(folder).with_name(f"{file.name}.metadata")
    commit, *rest = head(note, METADATA_BYTES).split("\n")
    try:
        downloaded = float(rest[1])  # seconds since the epoch; between them lies the etag
        changed = file.stat().st_mtime - 1 > downloaded  # as the client itself compares
    except (IndexError, ValueError, OSError):
        return None
    return None if changed or not COMMIT.fullmatch(commit) else commit


def head(path: Path, size: int) -> str:
    """Return the first ``size`` bytes of a regular file as text; empty where there is none or it cannot be read."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(size).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return ""


def front_matter(text: str) -> Iterator[tuple[str, str]]:
    """Yield the top-level keys of a card's YAML with their values, as far as those are one text or a list of texts.

    No YAML is parsed but this much: ``key: value``, quoted or not, ``key: [a, b]``, and lines ``- value`` below a key.
    """
    lines = [line.rstrip() for line in text.removeprefix("\ufeff").split("\n")]
    if lines[0] != "---" or "---" not in lines[1:]:
        return
    key, items = "", []  # type: str, list[str]
    for line in lines[1 : lines.index("---", 1)]:
        if (item := re.fullmatch(r"\s*- +(.*)", line)) and key:
            items.append(scalar(item[1]))
        elif entry := re.fullmatch(r"([A-Za-z_][\w-]*):(?:\s+(.*))?", line):
            if key and items:
                yield key, ", ".join(items)
            value = (entry[2] or "").strip()
            listed = value[1:-1].split(",") if value[:1] == "[" and value[-1:] == "]" else [value] if value else []
            key, items = entry[1], [text for text in map(scalar, listed) if text]
    if key and items:
        yield key, ", ".join(items)


def scalar(text: str) -> str:
    """Return a YAML scalar's text: without its quotes, or without a comment behind it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return re.split(r"\s#", text)[0].strip() if not text.startswith("#") else ""


def printable(text: str, most: int) -> str:
    """Return a text of at most ``most`` characters, runs of white space and of what cannot be printed as one space."""
    shown = "".join(character if character.isprintable() else " " for character in text[: 4 * most])
    return " ".join(shown.split())[:most]
