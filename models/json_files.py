"""Read a checkpoint's JSON files; errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transom.runtime.errors import CheckpointError


def read_json(path: Path) -> Any:
    """Parse a JSON file of a checkpoint; CheckpointError names the file and what is wrong."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download the checkpoint again.") from None


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold one object, as ``read_json``."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def read_optional(path: Path) -> dict[str, Any]:
    """Parse a JSON file as ``read_object``; empty where there is no such file."""
    return read_object(path) if path.is_file() else {}
