"""Read how a sentence-transformers folder pools a sentence to one embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.models.json_files import read_json, read_object, read_optional
from transom.runtime.errors import CheckpointError


def sentence_modules(folder: Path) -> list[tuple[str, Path]]:
    """Return (kind, folder) of each module in modules.json, in order; empty without that file.

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
    """Return ``{"mode": "mean" | "cls", "normalize": bool, "prompt": str}``; empty without modules.json.

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
    poolings = [read_object(where / "config.json") for kind, where in modules if kind == "pooling"]
    modes = [pooling_mode(pooling, folder) for pooling in poolings]
    settings = read_optional(folder / "config_sentence_transformers.json")
    prompts = settings.get("prompts")
    prompt = prompts.get(str(settings.get("default_prompt_name")), "") if isinstance(prompts, dict) else ""
    if prompt and any(pooling.get("include_prompt") is False for pooling in poolings):
        raise CheckpointError(
            f"{folder}: the pooling leaves out the prompt {prompt!r} (include_prompt is false), which is not defined "
            "here. Use a checkpoint without a default prompt."
        )
    if settings.get("truncate_dim") is not None:
        raise CheckpointError(
            f"{folder}: truncate_dim is {settings['truncate_dim']!r}; bundles give whole vectors. Remove it from "
            "config_sentence_transformers.json and cut the vectors in your app."
        )
    return {
        "mode": modes[0] if modes else "mean",
        "normalize": any(kind == "normalize" for kind, _ in modules),
        "prompt": prompt,
    }


def pooling_mode(settings: Mapping[str, Any], folder: Path) -> str:
    """Return mean or cls, from any spelling: ``pooling_mode``, a list of modes, or one flag per mode."""
    prefix = "pooling_mode_"
    flags = [name.removeprefix(prefix) for name, value in settings.items() if name.startswith(prefix) and value]
    given = settings.get("pooling_mode") or flags
    mode = "+".join(map(str, given)) if isinstance(given, list) else str(given)
    known = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    if mode not in known:
        raise CheckpointError(f"{folder}: the pooling is {mode!r}; defined are mean and cls. Use such a checkpoint.")
    return known[mode]
