"""Show, Attend and Tell (Xu et al., 2015, arXiv:1502.03044): captions of images, with soft attention.

Two graphs: ``encoder`` runs once per image, ``decoder`` once per new word, over a state that the caller owns.

Shape letters as in recurrent.py; C channels, L annotation vectors of an image, D their size, T new words, always one;
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.models.family import MAX_LAYERS, MAX_SIZE, Family, GraphModule, Source, config_fields
from transom.models.patches import size_pair
from transom.models.recurrent import AdditiveAttention, LSTMCell, check_positions, state_inputs, state_outputs
from transom.runtime.errors import CheckpointError
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec

PREFIX = "model."
POOLING = 2  # pixels a side, between stages


@dataclass(frozen=True)
class ShowAttendTellConfig:
    """VGG-19's convolutions by default, with the vocabulary of section 5.1.

    The other sizes are those of the authors' code for COCO (github.com/kelvinxu/arctic-captions, evaluate_coco.py).
    """

    image_size: tuple[int, int] = (224, 224)  # (height, width)
    num_channels: int = 3
    depths: tuple[int, ...] = (2, 2, 4, 4, 4)  # convolutions of each stage
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512, 512)  # channels of each stage
    decoder_vocab_size: int = 10000
    embedding_size: int = 512
    decoder_hidden_size: int = 1800
    attention_size: int = 512
    max_target_positions: int = 512

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of annotation vectors."""
        cell = POOLING ** (len(self.depths) - 1)
        return self.image_size[0] // cell, self.image_size[1] // cell


class Convolutions(nn.Module):
    """Stages of 3x3 convolutions, each with a ReLU, and a max-pool between two stages: section 3.1.1.

    The last stage is not pooled, so that VGG gives 14x14 vectors of 512 for an image of 224 pixels.
    """

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        channels = config.num_channels
        for depth, size in zip(config.depths, config.hidden_sizes, strict=True):
            inputs = [channels, *[size] * (depth - 1)]
            self.stages.append(nn.ModuleList(nn.Conv2d(given, size, kernel_size=3, padding=1) for given in inputs))
            channels = size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the feature map (B, D, rows, columns) of ``pixel_values`` (B, C, height, width)."""
        x = pixel_values
        for number, stage in enumerate(self.stages):
            if number:
                x = F.max_pool2d(x, POOLING)
            assert isinstance(stage, nn.ModuleList)
            for convolution in stage:
                x = torch.relu(convolution(x))
        return x


class Encoder(nn.Module):
    """Annotation vectors of an image, and the decoder's first states."""

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__()
        self.convolutions = Convolutions(config)
        self.hidden_state = nn.Linear(config.hidden_sizes[-1], config.decoder_hidden_size)
        self.cell_state = nn.Linear(config.hidden_sizes[-1], config.decoder_hidden_size)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode ``pixel_values`` (B, C, height, width): annotations (B, L, D), first state and cell (B, H).

        State and cell come from the mean annotation by a perceptron each: section 3.1.2. Here the mean of the
        projections, which is the same: as integers, the projection's input then has the range of an annotation, which
        one object in the image sets, and not the range of their mean, which depends on how much else is there.
        """
        annotations = self.convolutions(pixel_values).flatten(2).transpose(1, 2)  # (B, L, D), row by row
        hidden, cell = mean_of(self.hidden_state(annotations)), mean_of(self.cell_state(annotations))  # (B, H)
        return annotations, torch.tanh(hidden), torch.tanh(cell)


def mean_of(vectors: Tensor) -> Tensor:
    """Return the mean over an image's vectors: (B, L, H) -> (B, H).

    A product of two equal rows, one of which is taken: ONNX Runtime adds up a ReduceMean, and a product of one row, in
    an order that depends on the batch size, and this one in the order of the vectors.
    """
    L = vectors.shape[1]
    mean: Tensor = (torch.full((2, L), 1 / L, dtype=vectors.dtype) @ vectors)[:, 0]
    return mean


class Decoder(nn.Module):
    """One step: attend with the last state, move the LSTM, and read the next word's logits out."""

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__()
        hidden, context, embedding = config.decoder_hidden_size, config.hidden_sizes[-1], config.embedding_size
        self.embed_tokens = nn.Embedding(config.decoder_vocab_size, embedding)
        self.attention = AdditiveAttention(hidden, context, config.attention_size)
        self.gate = nn.Linear(hidden, 1)
        self.cell = LSTMCell(embedding + context, hidden)
        self.hidden_readout = nn.Linear(hidden, embedding)
        self.context_readout = nn.Linear(context, embedding, bias=False)
        self.lm_head = nn.Linear(embedding, config.decoder_vocab_size)

    def forward(
        self, tokens: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read ``tokens`` int64 (B,) with the image's ``keys`` (B, L, A) and ``values`` (B, L, D).

        Returns the logits (B, V) by equation 7, the attention's weights (B, L), and the next state and cell (B, H).
        """
        embedded = self.embed_tokens(tokens)
        context, weights = self.attention(hidden, keys, values)
        context = torch.sigmoid(self.gate(hidden)) * context  # the gate beta of section 4.2.1
        hidden, cell = self.cell(torch.cat((embedded, context), dim=1), hidden, cell)
        logits = self.lm_head(embedded + self.hidden_readout(hidden) + self.context_readout(context))
        return logits, weights, hidden, cell


class ShowAttendTell(nn.Module):
    """Encoder and decoder. The graphs compute ``encode`` and ``decode``."""

    def __init__(self, config: ShowAttendTellConfig, task: str) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode float32 (B, C, height, width): keys (B, L, A), values (B, L, D), first state and cell (B, H)."""
        annotations, hidden, cell = self.encoder(pixel_values)
        return self.decoder.attention.keys(annotations), annotations, hidden, cell

    def decode(
        self, decoder_input_ids: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute ``logits`` (B, 1, V), the weights of the annotations (B, 1, L), the next state and cell (B, H).

        ``decoder_input_ids`` is int64 (B, 1); the rest as ``encode`` returns it, or the step before.
        """
        logits, weights, hidden, cell = self.decoder(decoder_input_ids[:, 0], keys, values, hidden, cell)
        return logits[:, None], weights[:, None], hidden, cell


def doubly_stochastic_penalty(weights: Tensor, words: Tensor) -> Tensor:
    """Return the penalty of equation 14 without its factor lambda: sum_i (1 - sum_t weights_ti)^2, for each caption.

    ``weights`` (B, T, L) are the attention's at every step, ``words`` bool (B, T) is False at the steps behind a
    caption's end, which do not count. Returns (B,); a training loss adds it, times lambda, to the log-likelihood.
    """
    return (1 - (weights * words[:, :, None]).sum(1)).square().sum(1)


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module behind each graph; they share the weights."""
    return {"encoder": GraphModule(model, "encode"), "decoder": GraphModule(model, "decode")}


def rename(name: str, config: ShowAttendTellConfig, task: str) -> str | None:
    """Return the module's name of a stored weight, the same but for the prefix."""
    return name.removeprefix(PREFIX)


def convert(name: str, stored: Tensor, config: ShowAttendTellConfig) -> Tensor:
    """Return the tensor as it is stored."""
    return stored


DEFAULTS = ShowAttendTellConfig()
SIZES = {name: value for name, value in vars(DEFAULTS).items() if type(value) is int}


def config_from_source(source: Source) -> ShowAttendTellConfig:
    """Read config.json; the image size is the checkpoint's unless the user asked for another."""
    config_json = source.config_json
    trained = size_pair(config_json, "image_size", DEFAULTS.image_size[0])
    config = ShowAttendTellConfig(
        **config_fields(config_json, SIZES, {}, {}, heads=()),
        image_size=source.image_size or trained,
        depths=stages(config_json, "depths", DEFAULTS.depths, MAX_LAYERS),
        hidden_sizes=stages(config_json, "hidden_sizes", DEFAULTS.hidden_sizes, MAX_SIZE),
    )
    if len(config.depths) != len(config.hidden_sizes):
        raise CheckpointError(
            f"config.json: depths has {len(config.depths)} stages and hidden_sizes {len(config.hidden_sizes)}; "
            "expected a number for each stage in both. Correct them."
        )
    if sum(config.depths) > MAX_LAYERS:
        raise CheckpointError(
            f"config.json: depths has {sum(config.depths)} convolutions, expected at most {MAX_LAYERS}. Correct it."
        )
    cell = POOLING ** (len(config.depths) - 1)
    for name, size in {"config.json: image_size": trained, "the image size asked for": config.image_size}.items():
        if any(side % cell for side in size):
            raise CheckpointError(
                f"{name} is {size[0]}x{size[1]}; {len(config.depths)} stages need a multiple of {cell}, which is "
                "halved between two stages. Give such a size."
            )
    check_positions("max_target_positions", config.max_target_positions, least=2)
    return config


def stages(config_json: Mapping[str, Any], name: str, default: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Read a list with a number for each stage, each in 1..limit."""
    value = config_json.get(name, list(default))
    if not isinstance(value, list) or not value or not all(type(n) is int and 1 <= n <= limit for n in value):
        raise CheckpointError(
            f"config.json: {name} is {value!r:.200}, expected a list of integers in 1..{limit}, one for each stage. "
            "Correct it."
        )
    return tuple(value)


def graphs(config: ShowAttendTellConfig, task: str) -> tuple[Graph, ...]:
    """Return encoder and decoder, with transformers' tensor names where it has any; the image size is fixed."""
    L, D = config.grid[0] * config.grid[1], config.hidden_sizes[-1]
    source = (
        TensorSpec("cross_key", "float32", ("B", L, config.attention_size), state=True),
        TensorSpec("cross_value", "float32", ("B", L, D), state=True),
    )
    states = (
        *state_inputs("hidden_state", 1, config.decoder_hidden_size),
        *state_inputs("cell_state", 1, config.decoder_hidden_size),
    )
    pixels = TensorSpec("pixel_values", "float32", ("B", config.num_channels, *config.image_size))
    encoder = Graph("encoder", (pixels,), (*source, *states))
    tokens = TensorSpec("decoder_input_ids", "int64", ("B", "T"), exclusive_max=config.decoder_vocab_size)
    logits = TensorSpec("logits", "float32", ("B", "T", config.decoder_vocab_size))
    weights = TensorSpec("cross_attentions", "float32", ("B", "T", L))
    decoder = Graph("decoder", (tokens, *source, *states), (logits, weights, *state_outputs(states)))
    return encoder, decoder


def axes(config: ShowAttendTellConfig) -> dict[str, Axis]:
    """Return the bounds of B and T."""
    return {"B": Axis(1, 1, 16), "T": Axis(1, 1, 1)}


def options(model: nn.Module) -> dict[str, int]:
    """Return how many tokens an output may have: the state has the same size after any number of them."""
    assert isinstance(model, ShowAttendTell)
    return {"max_target_positions": model.config.max_target_positions}


FAMILY = Family(
    name="show_attend_tell",
    model_types=("show_attend_tell",),
    prefix=PREFIX,
    architectures={"ShowAttendTellForImageToText": "image-to-text"},
    tasks=("image-to-text",),
    config=config_from_source,
    build=ShowAttendTell,
    rename=rename,
    convert=convert,
    graphs=graphs,
    axes=axes,
    parts=parts,
    options=options,
)
