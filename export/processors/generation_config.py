"""A checkpoint's generation_config.json, read as the object ``generation`` of bundle.json.

Where there is no such file, transformers 5.23 takes the fields from config.json, as checkpoints of
before 2023 have them; the source followed is ``GenerationConfig.from_pretrained`` and its
``from_model_config``. With a generation_config.json it looks at no field of config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transom.models.json_files import read_object
from transom.runtime.errors import CheckpointError, InputError
from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.field_specs import FIELD_SPECS
from transom.runtime.generation.validation import check_for_model, contradiction

FILE = "generation_config.json"
DECODERS = ("decoder", "generator", "text_config")  # parts of config.json that may hold the fields

# Fields that change what transformers chooses and that the runtime does not follow, with a test for
# the values that change nothing
REFUSED: Mapping[str, Callable[[Any], bool]] = {
    "max_time": lambda value: False,
    "min_p": lambda value: value == 0,
    "top_h": lambda value: value == 1,
    "typical_p": lambda value: value == 1,
    "epsilon_cutoff": lambda value: value == 0,
    "eta_cutoff": lambda value: value == 0,
    "encoder_repetition_penalty": lambda value: value == 1,
    "encoder_no_repeat_ngram_size": lambda value: value == 0,
    "remove_invalid_values": lambda value: value is False,
    "exponential_decay_length_penalty": lambda value: False,
    "sequence_bias": lambda value: False,
    "token_healing": lambda value: value is False,
    "guidance_scale": lambda value: value == 1,
    "watermarking_config": lambda value: False,
    "penalty_alpha": lambda value: value == 0,
    "dola_layers": lambda value: False,
    "num_beam_groups": lambda value: value == 1,
    "diversity_penalty": lambda value: value == 0,
    "constraints": lambda value: False,
    "force_words_ids": lambda value: False,
}


def generation_from_checkpoint(folder: Path, vocabulary: int) -> GenerationConfig:
    """Read the settings with which transformers' ``model.generate()`` of this folder works.

    ``vocabulary`` is the number of tokens the model chooses from. Fields without effect on the text,
    as ``use_cache``, are passed over, and so are those that transformers does not know. Raises
    CheckpointError when a file is damaged, a field has a wrong value or names a token past the
    vocabulary, or changes the text in a way that the runtime does not follow.
    """
    path = folder / FILE
    if path.is_file():
        found = given(read_object(path))
    else:
        path = folder / "config.json"
        found = legacy_fields(read_object(path))
    strange = {name: found[name] for name, is_idle in REFUSED.items() if name in found and not is_idle(found[name])}
    if strange:
        listed = ", ".join(f"{name}={value!r:.40}" for name, value in strange.items())
        raise CheckpointError(
            f"{path} sets {listed}, which the runtime does not follow; the text would differ from transformers'. "
            "Delete the field from a copy of the checkpoint to export without it."
        )
    values = {name: read_field(path, name, found[name]) for name in FIELD_SPECS if name in found}
    config = GenerationConfig(**values)
    try:
        check_for_model(config, vocabulary, text=True)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from None
    problem = contradiction(config, {})
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return config


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Drop fields that are null, which means their default, and a negative pad_token_id, which means none."""
    pad = fields.get("pad_token_id")
    absent = {"pad_token_id"} if isinstance(pad, int) and pad < 0 else set()
    return {name: value for name, value in fields.items() if value is not None and name not in absent}


def legacy_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation fields of a config.json, those of its decoder where it has none itself."""
    found = given(config)
    if found.get("force_bos_token_to_be_generated") and "bos_token_id" in found:
        found["forced_bos_token_id"] = found["bos_token_id"]
    decoder: dict[str, Any] = next((config[name] for name in DECODERS if isinstance(config.get(name), dict)), {})
    return {**given(decoder), **found}


def read_field(path: Path, name: str, value: Any) -> Any:
    """Parse one field; CheckpointError names it and what is expected."""
    spec = FIELD_SPECS[name]
    try:
        return spec.parse(value)
    except ValueError:
        raise CheckpointError(f"{path}: {name} is {value!r:.60}, expected {spec.expected}. Correct it.") from None
