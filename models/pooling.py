"""How a sentence-transformers folder makes one vector of a sentence."""

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
    """Like ``read_json`` for a file that must hold one JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def sentence_modules(folder: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of each module in modules.json, in order; empty without that file.

    The kind is the class name in lower case: ``transformer``, ``pooling``, ``normalize``, ...
    """
    path = folder / "modules.json"
    if not path.is_file():
        return []
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path}: expected a list of modules as sentence-transformers writes it.")
    found = []
    for module in modules:
        where = folder / str(module.get("path", ""))
        if not where.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{path}: the module path {module['path']!r} leaves the checkpoint's folder.")
        found.append((str(module.get("type", "")).rsplit(".", 1)[-1].lower(), where))
    return found


def sentence_pooling(folder: Path) -> dict[str, Any]:
    """``{"mode": "mean" | "cls", "normalize": bool, "prompt": str}``; empty where the folder says nothing.

    Raises CheckpointError for a module or a pooling mode that is not defined: leaving it out would
    give other vectors than the checkpoint's.
    """
    modules = sentence_modules(folder)
    if not modules:
        return {}
    for kind, _ in modules:
        if kind not in ("transformer", "pooling", "normalize"):
            raise CheckpointError(
                f"{folder / 'modules.json'} has a {kind!r} module; Transformer, Pooling and Normalize are defined. "
                "Export the Transformer's folder alone (move modules.json away) and apply the rest in your app."
            )
    modes = [pooling_mode(where / "config.json") for kind, where in modules if kind == "pooling"]
    prompts = folder / "config_sentence_transformers.json"
    words = read_object(prompts) if prompts.is_file() else {}
    prompt = (words.get("prompts") or {}).get(words.get("default_prompt_name"), "")
    return {
        "mode": modes[0] if modes else "mean",
        "normalize": any(kind == "normalize" for kind, _ in modules),
        "prompt": prompt,
    }


def pooling_mode(path: Path) -> str:
    """mean or cls, from either spelling of the file: ``pooling_mode`` or one flag per mode."""
    words = read_object(path)
    flags = [name for name, value in words.items() if name.startswith("pooling_mode_") and value is True]
    mode = words.get("pooling_mode") or "+".join(flags).replace("pooling_mode_", "")
    known = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    if mode not in known:
        raise CheckpointError(f"{path}: the pooling is {mode!r}; defined are mean and cls. Use such a checkpoint.")
    return known[mode]
