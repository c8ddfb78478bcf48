"""HTML and the words in it. What comes from a bundle or a user is escaped, cut and made visible here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MOST = 160  # characters of a name or a sentence that was not written here


def words(value: Any, most: int = MOST) -> str:
    """A value from outside as text for a page: one line, at most ``most`` characters, escaped.

    Control characters and those that turn the direction of text are shown by their codes; nothing is a dash.
    """
    if value is None:
        return "–"
    text = " ".join(str(value)[: 4 * most].split(" "))
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return escape("".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in cut))


def token_words(token: str, most: int = 40) -> str:
    """A token as a person can see it: blanks as ␣, what cannot be printed by its code."""
    return words(token.replace(" ", "␣").replace("▁", "␣"), most)


def section(title: str, *parts: str) -> str:
    """A part of the page; nothing where there is nothing in it."""
    body = "".join(parts)
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], kinds: Mapping[int, str] | None = None, last: str = ""
) -> str:
    """``rows`` of HTML under ``head``. ``kinds`` has the classes of columns; ``last`` is a row made elsewhere."""
    kind = [f' class="{(kinds or {})[column]}"' if column in (kinds or {}) else "" for column in range(len(head))]
    top = "".join(f'<th{each} scope="col">{name}</th>' for each, name in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{each}>{cell}</td>" for each, cell in zip(kind, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}{last}</tbody></table></div>'


def numeric(*columns: int) -> dict[int, str]:
    """Columns of numbers, for ``table``."""
    return dict.fromkeys(columns, "n")


def figure(caption: str, *parts: str) -> str:
    """A picture and how to read it."""
    return f"<figure><figcaption>{caption}</figcaption>{''.join(parts)}</figure>"


def folded(summary: str, *parts: str, opened: bool = False) -> str:
    """What only some readers want to see."""
    return f"<details{' open' if opened else ''}><summary>{summary}</summary>{''.join(parts)}</details>"
