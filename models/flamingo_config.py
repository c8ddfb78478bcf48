"""Read the config.json of a Flamingo: two models in one, what joins them, and the words around a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transom.models import clip, gpt, vit
from transom.models.family import Source, config_fields
from transom.models.gated_cross_attention import GATES, MLPS, NORMS, CrossAttentionConfig
from transom.models.layers import ACTIVATIONS
from transom.models.resampler import ResamplerConfig
from transom.runtime.errors import CheckpointError

VISION_TYPES = ("vit", "clip_vision_model")
STRATEGIES = ("default", "full")  # transformers' words: patches alone, or the class token in front of them too


@dataclass(frozen=True)
class FlamingoConfig:
    """ViT-B/16 and GPT-2 of 124 M parameters by default, with cross-attention in front of every block."""

    text_config: gpt.GPTConfig = field(default_factory=gpt.GPTConfig)
    vision_config: vit.ViTConfig | clip.VisionConfig = field(default_factory=vit.ViTConfig)
    resampler_config: ResamplerConfig = field(default_factory=ResamplerConfig)
    cross_attention_config: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    image_token_id: int = 50256
    vision_feature_select_strategy: str = "default"
    cross_attention_every_n_layers: int = 1
    max_images: int = 8
    question_template: str = "Question: {} Answer:"
    caption_template: str = "Caption:"
    example_separator: str = "\n"

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """The blocks of the language model that have cross-attention in front of them."""
        return tuple(range(0, self.text_config.n_layer, self.cross_attention_every_n_layers))


RESAMPLER_SIZES = {"num_latents": 64, "depth": 6, "num_heads": 16, "head_dim": 96}
CROSS_ATTENTION_SIZES = {"num_heads": 8, "head_dim": 64}
SIZES = {"cross_attention_every_n_layers": 1, "max_images": 8}
TEMPLATES = {"question_template": "Question: {} Answer:", "caption_template": "Caption:", "example_separator": "\n"}


def config_from_source(source: Source) -> FlamingoConfig:
    """Read config.json; the image size is the checkpoint's unless the user asked for another.

    Raises CheckpointError for a part that is not defined here, and for settings that cannot be.
    """
    config_json = source.config_json
    text, vision = text_config(source), vision_config(source)
    sizes = config_fields(config_json, SIZES, {}, {}, heads=())
    every = sizes["cross_attention_every_n_layers"]
    if every > text.n_layer:
        raise CheckpointError(
            f"config.json: cross_attention_every_n_layers is {every}, but text_config has n_layer {text.n_layer}; "
            "expected at most as many. Correct one of them."
        )
    token = config_json.get("image_token_id")
    if type(token) is not int or not 0 <= token < text.vocab_size:
        raise CheckpointError(
            f"config.json: image_token_id is {token!r}, expected a token in 0..{text.vocab_size - 1}, text_config's "
            "vocabulary. Name the token that marks an image."
        )
    return FlamingoConfig(
        text_config=text,
        vision_config=vision,
        resampler_config=resampler_config(part(config_json, "resampler_config"), vision.hidden_size),
        cross_attention_config=cross_attention_config(part(config_json, "cross_attention_config"), text.n_embd),
        image_token_id=token,
        vision_feature_select_strategy=word(config_json, "vision_feature_select_strategy", STRATEGIES),
        **sizes,
        **templates(config_json),
    )


def part(config_json: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the object ``name`` of config.json; CheckpointError where it is missing or no object."""
    value = config_json.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {name} is {value!r:.80}, expected an object. Correct it.")
    return value


def word(fields: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    """Return the setting ``name``, one of the words ``known``, by default the first."""
    value = fields.get(name, known[0])
    if value not in known:
        raise CheckpointError(f"config.json: {name} is {value!r:.80}, expected {' or '.join(map(repr, known))}.")
    return str(value)


def of_part(name: str, source: Source, read: Callable[[Source], Any]) -> Any:
    """Read one of the two models by its own family's function; a CheckpointError names the part."""
    try:
        return read(source)
    except CheckpointError as error:
        raise CheckpointError(f"{name} of {error}") from None


def text_config(source: Source) -> gpt.GPTConfig:
    """Read the language model's part, a GPT-2's config.json."""
    fields = part(source.config_json, "text_config")
    if fields.get("model_type") != "gpt2":
        raise CheckpointError(
            f"config.json: text_config has model_type {fields.get('model_type')!r:.80}, expected 'gpt2', the language "
            "model that is defined here. Use such a checkpoint."
        )
    text: gpt.GPTConfig = of_part(
        "text_config", Source(fields, frozenset(), "text-generation", {}), gpt.config_from_source
    )
    return text


def vision_config(source: Source) -> vit.ViTConfig | clip.VisionConfig:
    """Read the vision encoder's part, the config.json of a ViT or of CLIP's image tower."""
    fields = part(source.config_json, "vision_config")
    if fields.get("model_type") not in VISION_TYPES:
        raise CheckpointError(
            f"config.json: vision_config has model_type {fields.get('model_type')!r:.80}, expected "
            f"{' or '.join(map(repr, VISION_TYPES))}, the vision encoders that are defined here. Use such a checkpoint."
        )
    if fields["model_type"] == "clip_vision_model":
        return clip.vision_config(fields, source.image_size)
    vision: vit.ViTConfig = of_part(
        "vision_config",
        Source(fields, frozenset(), "feature-extraction", {}, source.image_size),
        vit.config_from_source,
    )
    return vision


def resampler_config(fields: Mapping[str, Any], width: int) -> ResamplerConfig:
    """Read the resampler's part; its MLPs have four times the ``width`` where no size is given."""
    sizes = RESAMPLER_SIZES | {"intermediate_size": 4 * width}
    others = {"activation": "relu2", "qk_layer_norms": False, "layer_norm_eps": 1e-5}
    where = "config.json: resampler_config"
    found = config_fields(fields, sizes, others, ACTIVATIONS, heads=(), where=where)
    return ResamplerConfig(**found)


def cross_attention_config(fields: Mapping[str, Any], width: int) -> CrossAttentionConfig:
    """Read the cross-attention's part; its MLPs have four times the ``width`` where no size is given."""
    sizes = CROSS_ATTENTION_SIZES | {"intermediate_size": 4 * width}
    others = {"hidden_act": "relu2", "qk_layer_norms": False, "norm_eps": 1e-5}
    where = "config.json: cross_attention_config"
    found = config_fields(fields, sizes, others, ACTIVATIONS, heads=(), where=where)
    for name, known in {"norm": tuple(NORMS), "mlp": MLPS, "gate": GATES}.items():
        found[name] = word(fields, name, known)
    return CrossAttentionConfig(**found)


def is_template(value: Any, holes: int) -> bool:
    """Return whether this is text that a tokenizer can read, with ``holes`` {} and no other braces."""
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):  # lone surrogates
        return False
    return value.count("{}") == holes and not set("{}") & set(value.replace("{}", ""))


def templates(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Read the words around a question, a caption and an example; a question stands where its template has ``{}``."""
    found = {name: config_json.get(name, default) for name, default in TEMPLATES.items()}
    for name, value in found.items():
        holes = int(name == "question_template")
        if not is_template(value, holes) or (name == "caption_template" and not value):
            place = "with one {} where the question goes" if holes else "without braces"
            raise CheckpointError(f"config.json: {name} is {value!r:.80}, expected a text {place}. Correct it.")
    return found
