"""Read a Perceiver's config.json, and refuse what the definition would compute differently.

Sources: ``transformers.models.perceiver``, 5.23; what it writes into its code instead of config.json is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transom.models.family import MAX_LAYERS, Source, config_fields, label_count
from transom.models.layers import ACTIVATIONS
from transom.models.patches import Size, size_pair
from transom.runtime.errors import CheckpointError

LEARNED_CHANNELS = 256  # of a pixel behind the 1x1 convolution, and of its learned position
CONV_CHANNELS = 64
BANDS = 64  # frequencies of the Fourier features of one side
PIXELS_RESOLUTION, CONV_RESOLUTION = 224, 56  # whose half is the highest frequency
TRAINED_SIZE = 224  # pixels, where no image processor says otherwise
FEATURES = 2 + 4 * BANDS  # the place, sines and cosines, of two sides each
DECODER_QK, DECODER_HEADS = 8 * 32, 8  # of the masked language model's decoder
LEAST_CONV_SIDE = 5  # pixels, of which the pooling sees the three that it needs

ARCHITECTURES = {
    "PerceiverForImageClassificationLearned": "image-classification",
    "PerceiverForImageClassificationFourier": "image-classification",
    "PerceiverForImageClassificationConvProcessing": "image-classification",
    "PerceiverForMaskedLM": "fill-mask",
    "PerceiverForSequenceClassification": "text-classification",
}
UNDEFINED = {  # that transformers defines, and what differs
    "PerceiverModel": "has latents alone: neither the preprocessing of its inputs nor output queries are part of it",
    "PerceiverForOpticalFlow": "reads patches of two frames and decodes a flow at every pixel, asked by its inputs",
    "PerceiverForMultimodalAutoencoding": "reads video, audio and a label at once and decodes all three in pieces",
}
# Weights that only one kind of preprocessing has
MARKS = {
    "input_preprocessor.embeddings.weight": "text",
    "input_preprocessor.convnet_1x1.weight": "learned",
    "input_preprocessor.convnet.conv.weight": "conv",
}


@dataclass(frozen=True)
class Widths:
    """The width of an attention's queries and keys, and of its values, over all heads."""

    qk: int
    v: int


@dataclass(frozen=True)
class PerceiverConfig:
    """The masked language model by default; names as in transformers' config.json, sizes as (height, width)."""

    inputs: str = "text"  # text, learned, fourier or conv
    num_latents: int = 256
    d_latents: int = 1280
    d_model: int = 768  # of embedded bytes
    num_blocks: int = 1
    num_self_attends_per_block: int = 26
    num_self_attention_heads: int = 8
    num_cross_attention_heads: int = 8
    self_attention_widening_factor: int = 1
    cross_attention_widening_factor: int = 1
    vocab_size: int = 262
    max_position_embeddings: int = 2048
    hidden_act: str = "gelu"
    use_query_residual: bool = True
    cross_widths: Widths = Widths(256, 1280)  # of the attention to the input
    self_widths: Widths = Widths(256, 1280)
    num_labels: int = 2
    image_size: Size = (TRAINED_SIZE, TRAINED_SIZE)
    trained_image_size: Size = (TRAINED_SIZE, TRAINED_SIZE)  # of the stored positions, where they are learned

    @property
    def input_channels(self) -> int:
        """The channels of a row of the input."""
        return input_channels(self.inputs, self.d_model)


def input_channels(inputs: str, d_model: int) -> int:
    channels = {"text": d_model, "learned": 2 * LEARNED_CHANNELS, "fourier": 3 + FEATURES}
    return channels.get(inputs, CONV_CHANNELS + FEATURES)


def conv_grid(image_size: Size) -> Size:
    """Return the rows and columns behind the convolution and the pooling, each of which halves a side."""
    rows, columns = (((side - 1) // 2 + 1 - 3) // 2 + 1 for side in image_size)
    return rows, columns


SIZES = {
    "num_latents": 256,
    "d_latents": 1280,
    "d_model": 768,
    "num_blocks": 1,
    "num_self_attends_per_block": 26,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 8,
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "vocab_size": 262,
    "max_position_embeddings": 2048,
}
HEADS = (("d_latents", "num_self_attention_heads"), ("d_latents", "num_cross_attention_heads"))


def config_from_source(source: Source) -> PerceiverConfig:
    """Read config.json; the image size is the one asked for, else that of the checkpoint.

    Learned positions are of config.json's ``image_size``, and are interpolated to another as transformers does on
    request. Fourier features are computed for any size; config.json does not know it, so it is the image processor's.
    """
    config_json = source.config_json
    inputs = inputs_of(source)
    fields = config_fields(
        config_json, SIZES, {"hidden_act": "gelu", "use_query_residual": True}, ACTIVATIONS, heads=HEADS
    )
    layers = fields["num_blocks"] * fields["num_self_attends_per_block"]
    if layers > MAX_LAYERS:
        raise CheckpointError(
            f"config.json: num_blocks times num_self_attends_per_block is {layers}, expected {MAX_LAYERS} layers at "
            "most. Correct these fields."
        )
    if source.task == "fill-mask" and fields["d_model"] % DECODER_HEADS:
        raise CheckpointError(
            f"config.json: d_model is {fields['d_model']}, expected a multiple of the decoder's {DECODER_HEADS} heads. "
            "Correct it."
        )
    trained = trained_size(config_json, inputs, source.processor_size)
    size = source.image_size or trained
    if inputs == "conv" and min(size) < LEAST_CONV_SIDE:
        raise CheckpointError(
            f"the image size {size} leaves nothing behind the convolution and its pooling; expected at least "
            f"{LEAST_CONV_SIDE} pixels on each side. Ask for a larger one with --image-size."
        )
    cross, own = widths(config_json, fields, input_channels(inputs, fields["d_model"]))
    return PerceiverConfig(
        **fields,
        cross_widths=cross,
        self_widths=own,
        inputs=inputs,
        num_labels=label_count(config_json),
        image_size=size,
        trained_image_size=trained,
    )


def inputs_of(source: Source) -> str:
    """Return how the checkpoint reads its inputs, by its weights."""
    names = {name.removeprefix("perceiver.") for name in source.names}
    found = next((inputs for mark, inputs in MARKS.items() if mark in names), "fourier")
    texts = source.task != "image-classification"
    if texts != (found == "text"):
        kind = "bytes" if found == "text" else "images"
        raise CheckpointError(f"the checkpoint reads {kind}, which {source.task} does not. Choose another --task.")
    return found


def trained_size(config_json: Mapping[str, Any], inputs: str, processor_size: Size | None) -> Size:
    """Return the image size that the checkpoint was made for."""
    if inputs != "learned":
        return processor_size or (TRAINED_SIZE, TRAINED_SIZE)
    side = config_json.get("image_size", 56)
    if type(side) is not int:  # transformers squares it
        raise CheckpointError(f"config.json: image_size is {side!r}, expected one integer. Correct it.")
    return size_pair(config_json, "image_size", 56)


def widths(config_json: Mapping[str, Any], fields: Mapping[str, Any], channels: int) -> tuple[Widths, Widths]:
    """Return the widths of the encoder's attentions, to the input and to itself, as PerceiverAttention chooses them."""
    given: dict[str, int | None] = {}
    for name in ("qk_channels", "v_channels"):
        value = given[name] = config_json.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise CheckpointError(f"config.json: {name} is {value!r}, expected a positive integer or null. Correct it.")
    shape = config_json.get("cross_attention_shape_for_attention", "kv")
    if shape not in ("kv", "q"):
        raise CheckpointError(
            f"config.json: cross_attention_shape_for_attention is {shape!r}, expected 'kv' or 'q'. Correct it."
        )
    latents = int(fields["d_latents"])
    cross_qk = given["qk_channels"] or (channels if shape == "kv" else latents)
    self_qk = given["qk_channels"] or latents
    cross, own = (Widths(qk, given["v_channels"] or qk) for qk in (cross_qk, self_qk))
    if own.v != latents:
        raise CheckpointError(
            f"config.json: v_channels, or qk_channels without it, make the values of self-attention {own.v} wide, "
            f"which are added to latents of d_latents {latents}. Set v_channels to {latents}."
        )
    for kind, chosen in (("cross", cross), ("self", own)):
        heads = f"num_{kind}_attention_heads"
        for name, width in (("qk_channels", chosen.qk), ("v_channels", chosen.v)):
            if width % fields[heads]:
                raise CheckpointError(
                    f"config.json: {name} of {kind}-attention is {width}, no multiple of {heads} {fields[heads]}. "
                    "Correct these fields."
                )
    return cross, own
