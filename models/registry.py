"""Find the family and the task of a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.models.family import Family
from transom.runtime.errors import CheckpointError
from transom.runtime.families import FAMILIES as NAMES
from transom.runtime.families import family_record

FAMILIES: dict[str, Family] = {name: family_record("models", name) for name in NAMES}

# Relatives that people will try, and what differs; one that a family defines since is passed over.
RELATIVES = {
    "roberta": "RoBERTa counts positions from pad_token_id + 1 over real tokens only, has another LM head and a "
    "byte-level BPE tokenizer",
    "xlm-roberta": "XLM-RoBERTa counts positions from pad_token_id + 1 over real tokens only, has another LM head and "
    "a SentencePiece tokenizer",
    "distilbert": "DistilBERT has no token types and no pooler, and names its weights differently",
    "albert": "ALBERT shares one layer's weights among all layers and factorises its embeddings",
    "gpt_neo": "GPT-Neo attends locally in every second layer and does not scale its scores",
    "gptj": "GPT-J rotates its positions and runs attention and MLP side by side",
    "gpt_neox": "GPT-NeoX rotates its positions and runs attention and MLP side by side",
    "opt": "OPT counts positions from 2 and has ReLU",
    "llama": "Llama rotates its positions and has RMSNorm and gated MLPs",
    "bart": "BART learns its positions, counts them from 2 and normalises its embeddings",
    "mbart": "mBART is pre-norm, learns its positions, counts them from 2 and normalises its embeddings",
    "t5": "T5 has relative position biases, RMSNorm and no biases",
    "fsmt": "FSMT counts positions from the padding id and has a vocabulary per language",
    "m2m_100": "M2M100 is pre-norm and counts positions from the padding id",
    "deit": "DeiT has a distillation token beside the class token",
    "clip_text_model": "CLIP's text tower on its own has other outputs than the one in a CLIPModel, whose bundle runs "
    "either tower alone",
    "clip_vision_model": "CLIP's image tower on its own has other outputs than the one in a CLIPModel, whose bundle "
    "runs either tower alone",
    "idefics": "Idefics lets a Llama, which rotates its positions, read several images at once; Flamingo is defined "
    "here with a GPT-2",
    "siglip": "SigLIP pools its images by attention, reads texts both ways and adds a bias to its logits",
    "chinese_clip": "Chinese-CLIP's text tower is a BERT",
    "swin2sr": "Swin2SR enlarges images: Swin v2's layers between convolutions, without stages",
    "maskformer-swin": "MaskFormer's Swin gives the maps of all its stages, each with a norm of its own",
    "donut-swin": "Donut's Swin has no LayerNorm after its last stage",
    "bit": "BiT classifies by the mean of its feature map; defined here is its backbone alone, within a hybrid ViT",
    "dinov2": "DINOv2 scales each residual branch and orders its patches' positions differently",
}


def find_family(config_json: Mapping[str, Any]) -> Family:
    """Find the family of a config.json; CheckpointError names what we define otherwise."""
    model_type = config_json.get("model_type")
    known = {name: family for family in FAMILIES.values() for name in family.model_types}
    if model_type is None:  # configs older than the field say it in the class name
        named = [name for name in architectures(config_json) for f in FAMILIES.values() if name in f.architectures]
        owners = {f.name for f in FAMILIES.values() for name in named if name in f.architectures}
        if len(owners) == 1:
            return FAMILIES[owners.pop()]
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    if model_type is None and isinstance(config_json.get("architecture"), str):
        raise CheckpointError(
            f"config.json is timm's, of {config_json['architecture']!r}: timm names and packs weights otherwise than "
            "transformers, whose checkpoints are read. Convert it with a conversion script of transformers, or use the "
            "checkpoint that transformers has of it."
        )
    ours = "; ".join(f"{f.name} ({', '.join(f.architectures)})" for f in FAMILIES.values())
    relative = RELATIVES.get(str(model_type))
    reason = f" {relative}, so its weights would compute something else in our definitions." if relative else ""
    raise CheckpointError(
        f"config.json has model_type {model_type!r} and architectures {architectures(config_json)!r}, which Transom "
        f"does not define.{reason} Defined are: {ours}. Use such a checkpoint, or add the family "
        "(docs/adding_a_model.md)."
    )


def find_task(family: Family, config_json: Mapping[str, Any], asked: str | None) -> str:
    """Return the task asked for, else the one of the head that ``architectures`` names.

    Raises CheckpointError when the family has no such task, or the architecture is unknown or not defined.
    """
    names = architectures(config_json)
    for name in names:
        if name in family.undefined:
            raise CheckpointError(
                f"config.json names the architecture {name!r}, which {family.undefined[name]}. Transom defines "
                f"{', '.join(family.architectures)}. Use such a checkpoint."
            )
    if asked is not None:
        task = TASK_ALIASES.get(asked, asked)
        if task not in family.tasks:
            raise CheckpointError(
                f"--task is {asked!r}; a checkpoint of {family.name} offers {', '.join(family.tasks)}."
            )
        return task
    if not names:
        return "feature-extraction" if "feature-extraction" in family.tasks else family.tasks[0]
    for name in names:
        if name in family.architectures:
            return family.architectures[name]
    differs = family.unread_heads.get(names[0])
    reason = f", whose head {differs}" if differs else ""
    raise CheckpointError(
        f"config.json names the architecture {names[0]!r}{reason}; of the family {family.name} Transom defines "
        f"{', '.join(family.architectures)}. Choose a head with --task: {', '.join(family.tasks)}."
    )


TASK_ALIASES = {"image-feature-extraction": "feature-extraction", "sentence-similarity": "feature-extraction"}


def architectures(config_json: Mapping[str, Any]) -> list[str]:
    names = config_json.get("architectures") or []
    return [str(name) for name in names] if isinstance(names, list) else []
