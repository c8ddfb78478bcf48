"""The families Transom defines. A new one is a file beside this and a line in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.models import bert, vit
from transom.models.family import Family
from transom.runtime.errors import CheckpointError

FAMILIES: dict[str, Family] = {family.name: family for family in (bert.FAMILY, vit.FAMILY)}

# Relatives that people will try: what differs, so that nobody has to find out by a wrong result.
RELATIVES = {
    "roberta": "RoBERTa counts positions from pad_token_id + 1 over real tokens only, has another LM head and a "
    "byte-level BPE tokenizer",
    "xlm-roberta": "XLM-RoBERTa counts positions from pad_token_id + 1 over real tokens only, has another LM head and "
    "a SentencePiece tokenizer",
    "distilbert": "DistilBERT has no token types and no pooler, and names its weights differently",
    "albert": "ALBERT shares one layer's weights among all layers and factorises its embeddings",
    "electra": "ELECTRA may project its embeddings and has a discriminator head",
    "deit": "DeiT has a distillation token beside the class token",
    "dinov2": "DINOv2 scales each residual branch and orders its patches' positions differently",
}


def find_family(raw: Mapping[str, Any]) -> Family:
    """The family of a config.json; CheckpointError names what we define otherwise."""
    model_type = raw.get("model_type")
    if model_type is None:  # configs older than the field say it in the class name
        named = [name for name in architectures(raw) for f in FAMILIES.values() if name in f.architectures]
        owners = {f.name for f in FAMILIES.values() for name in named if name in f.architectures}
        model_type = owners.pop() if len(owners) == 1 else None
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    ours = "; ".join(f"{f.name} ({', '.join(f.architectures)})" for f in FAMILIES.values())
    relative = RELATIVES.get(str(model_type))
    reason = f" {relative}, so its weights would compute something else in our definitions." if relative else ""
    raise CheckpointError(
        f"config.json has model_type {model_type!r} and architectures {architectures(raw)!r}, which Transom does not "
        f"define.{reason} Defined are: {ours}. Use such a checkpoint, or add the family (docs/adding_a_model.md)."
    )


def find_task(family: Family, raw: Mapping[str, Any], asked: str | None) -> str:
    """The task asked for, else the one of the head that ``architectures`` names.

    Raises CheckpointError when the family has no such task, or the architecture is unknown.
    """
    if asked is not None:
        task = TASK_ALIASES.get(asked, asked)
        if task not in family.tasks:
            raise CheckpointError(f"--task is {asked!r}; a {family.name} checkpoint offers {', '.join(family.tasks)}.")
        return task
    names = architectures(raw)
    if not names:
        return "feature-extraction"
    for name in names:
        if name in family.architectures:
            return family.architectures[name]
    raise CheckpointError(
        f"config.json names the architecture {names[0]!r}; of the family {family.name} Transom defines "
        f"{', '.join(family.architectures)}. Choose a head with --task: {', '.join(family.tasks)}."
    )


TASK_ALIASES = {"image-feature-extraction": "feature-extraction", "sentence-similarity": "feature-extraction"}


def architectures(raw: Mapping[str, Any]) -> list[str]:
    names = raw.get("architectures") or []
    return [str(name) for name in names] if isinstance(names, list) else []
