"""Print one JSON document, or lines and tables that read well on a terminal and in a pipe."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transom.runtime.compare import Comparison

IN_A_PIPE = 100_000  # columns: a reader that is no terminal gets every table row on one line


def print_json(value: Any) -> None:
    """Print the one JSON document of a ``--json`` call; NaN and infinity become null."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """Return the value as JSON types: dicts, lists, strings, finite numbers, null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return plain(value.tolist())
    return str(value)  # paths


def say(line: str) -> None:
    """Print one line on stderr; a stderr that is closed is no reason to fail."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return the text on one line, control characters, which may steer a terminal, as visible escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in " ".join(text.splitlines())
    )


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table on stdout; columns named in ``right`` are right-aligned. Cells are plain text: no markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = IN_A_PIPE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    sys.stdout.flush()  # rich ends the process when it flushes a closed pipe: leave it nothing to flush
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="")


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print ``name  value`` lines with the values aligned."""
    pairs = [(printable(name), value) for name, value in fields]  # some names are a manifest's keys
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"{name:<{width}}  {printable(value)}")


def comparison_cells(comparison: Comparison) -> list[str]:
    """Return tensor, error, the index of the worst element, and both its values."""
    return [
        comparison.tensor,
        f"{comparison.error:.2e}",
        f"[{', '.join(map(str, comparison.index))}]",
        f"{comparison.ours:.7g}",
        f"{comparison.theirs:.7g}",
    ]
