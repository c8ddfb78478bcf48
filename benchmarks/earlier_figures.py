"""Read the figures that a benchmark wrote as JSON, before anything is measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def figures_with(key: str) -> Callable[[str], dict[str, Any]]:
    """Return what reads an argument that names a file of figures: its JSON object, which has ``key``.

    Raises ArgumentTypeError, for argparse to print, where there is no such file, or its contents are something else.
    """

    def read(argument: str) -> dict[str, Any]:
        try:
            found = json.loads(Path(argument).read_text(encoding="utf-8"))
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{argument} cannot be read: {error.strerror}") from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{argument} holds no JSON; expected the figures of a run") from None
        if not isinstance(found, dict) or key not in found:
            raise argparse.ArgumentTypeError(f"{argument} has no {key!r}; expected the figures of such a run")
        return found

    return read
