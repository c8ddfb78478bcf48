"""Perceiver (Jaegle et al., 2021, arXiv:2103.03206) and Perceiver IO (Jaegle et al., 2021, arXiv:2107.14795).

A few latents read an input of any length by cross-attention, so that its cost grows linearly with that length; a block
of self-attention among the latents is applied several times with the same weights; output queries read the latents.
``perceiver_inputs.py`` turns images and bytes into the rows that are read, ``perceiver_config.py`` reads config.json.

Shape letters as in attention.py; N latents, M rows of the input (pixels or bytes), C channels of such a row, O queries
of the output, V vocabulary, L labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.models.attention import attend, key_mask, split_heads
from transom.models.family import Family
from transom.models.layers import ACTIVATIONS, Dense
from transom.models.perceiver_config import (
    ARCHITECTURES,
    DECODER_HEADS,
    DECODER_QK,
    UNDEFINED,
    PerceiverConfig,
    Widths,
    config_from_source,
)
from transom.models.perceiver_inputs import INPUTS, PositionEmbeddings, TextInputs, resized
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec

NORM_EPS = 1e-5  # transformers leaves config.json's layer_norm_eps unread


class AttentionHeads(nn.Module):
    """LayerNorm and projections of one attention; ``kv_dim`` where its keys and values come from elsewhere."""

    def __init__(self, q_dim: int, widths: Widths, num_heads: int, kv_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.layernorm1 = nn.LayerNorm(q_dim, eps=NORM_EPS)
        self.layernorm2 = None if kv_dim is None else nn.LayerNorm(kv_dim, eps=NORM_EPS)
        kv_dim = q_dim if kv_dim is None else kv_dim
        self.query = nn.Linear(q_dim, widths.qk)
        self.key = nn.Linear(kv_dim, widths.qk)
        self.value = nn.Linear(kv_dim, widths.v)

    def queries(self, x: Tensor) -> Tensor:
        """Project what asks: (B, S, q_dim) -> (B, H, S, D)."""
        return split_heads(self.query(self.layernorm1(x)), self.num_heads)

    def forward(self, q: Tensor, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let queries (B, H, S, D) read ``inputs`` (B, C, kv_dim): (B, S, v)."""
        norm = self.layernorm1 if self.layernorm2 is None else self.layernorm2
        inputs = norm(inputs)
        k, v = (split_heads(project(inputs), self.num_heads) for project in (self.key, self.value))
        return attend(q, k, v, mask)


class AttentionBlock(nn.Module):
    """Attention and its output projection; the parts are called ``self`` and ``output`` in checkpoints."""

    def __init__(self, q_dim: int, widths: Widths, num_heads: int, kv_dim: int | None = None) -> None:
        super().__init__()
        self.self = AttentionHeads(q_dim, widths, num_heads, kv_dim)
        self.output = Dense(widths.v, q_dim)


class MLP(nn.Module):
    """Two linear layers around an activation: (B, S, E) -> (B, S, E)."""

    def __init__(self, width: int, widening_factor: int, activation: str) -> None:
        super().__init__()
        self.dense1 = nn.Linear(width, widening_factor * width)
        self.dense2 = nn.Linear(widening_factor * width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(self.activation(self.dense1(x)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm: x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)): Perceiver IO, appendix E."""

    def __init__(
        self,
        config: PerceiverConfig,
        q_dim: int,
        widths: Widths,
        num_heads: int,
        widening_factor: int,
        kv_dim: int | None = None,
        *,
        query_residual: bool = True,
    ) -> None:
        super().__init__()
        self.attention = AttentionBlock(q_dim, widths, num_heads, kv_dim)
        self.layernorm = nn.LayerNorm(q_dim, eps=NORM_EPS)
        self.mlp = MLP(q_dim, widening_factor, config.hidden_act)
        self.query_residual = query_residual

    def forward(self, x: Tensor, inputs: Tensor, q: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Let ``x`` (1 or B, S, q_dim) read ``inputs`` (B, C, kv_dim): (B, S, q_dim).

        ``q`` (1 or B, H, S, D) are the queries of ``x`` where they are known.
        """
        q = self.attention.self.queries(x) if q is None else q
        q = q.expand(inputs.shape[0], -1, -1, -1)  # Attention takes no rows of one for many
        y = self.attention.output(self.attention.self(q, inputs, mask))
        if self.query_residual:
            y = y + x
        return y + self.mlp(self.layernorm(y))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Latents that read the input once, then a block of self-attention, ``num_blocks`` times with the same weights."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.num_blocks = config.num_blocks
        self.cross_attention = Layer(
            config,
            config.d_latents,
            config.cross_widths,
            config.num_cross_attention_heads,
            config.cross_attention_widening_factor,
            config.input_channels,
            query_residual=config.use_query_residual,
        )
        self.self_attends = nn.ModuleList(
            Layer(
                config,
                config.d_latents,
                config.self_widths,
                config.num_self_attention_heads,
                config.self_attention_widening_factor,
            )
            for _ in range(config.num_self_attends_per_block)
        )

    def forward(self, latents: Tensor, queries: Tensor, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Encode ``inputs`` (B, M, C): (B, N, d_latents)."""
        x: Tensor = self.cross_attention(latents, inputs, queries, mask)
        for _ in range(self.num_blocks):
            for layer in self.self_attends:
                x = layer(x, x)
        return x


class Latents(nn.Module):
    """The learned vectors that read the input."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(config.num_latents, config.d_latents))


class Decoder(nn.Module):
    """Output queries that read the latents; for classification a single one and a linear layer behind it."""

    def __init__(self, config: PerceiverConfig, task: str) -> None:
        super().__init__()
        masked = task == "fill-mask"
        width = config.d_model if masked else config.d_latents
        rows = config.max_position_embeddings if masked else 1
        self.output_position_encodings = PositionEmbeddings(rows, width)
        self.decoding_cross_attention = Layer(
            config,
            width,
            Widths(DECODER_QK, width) if masked else Widths(width, width),
            DECODER_HEADS if masked else 1,
            1,
            config.d_latents,
            query_residual=not masked,
        )
        self.final_layer = None if masked else nn.Linear(width, config.num_labels)

    def forward(self, x: Tensor, q: Tensor, latents: Tensor) -> Tensor:
        """Read ``latents`` (B, N, d_latents): (B, O, width), or (B, L) behind the linear layer."""
        y: Tensor = self.decoding_cross_attention(x, latents, q)
        return y if self.final_layer is None else self.final_layer(y[:, 0])


class LogitBias(nn.Module):
    """The bias of the logits over bytes, whose weights are the embeddings."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))


class Perceiver(nn.Module):
    """The weights of a Perceiver with the head of ``task``; ``Folded`` computes it."""

    def __init__(self, config: PerceiverConfig, task: str) -> None:
        super().__init__()
        self.task = task
        self.input_preprocessor = INPUTS[config.inputs](config)
        self.embeddings = Latents(config)
        self.encoder = Encoder(config)
        decoder = Decoder(config, task)
        if task == "fill-mask":
            self.decoder: nn.Module = decoder
            self.embedding_decoder = LogitBias(config.vocab_size)
        else:
            self.decoder = nn.ModuleDict({"decoder": decoder})

    @property
    def reader(self) -> Decoder:
        """The decoder, which classifiers nest one level deeper."""
        found = self.decoder["decoder"] if isinstance(self.decoder, nn.ModuleDict) else self.decoder
        assert isinstance(found, Decoder)
        return found

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = Folded(self)(*inputs)
        return outputs


class Folded(nn.Module):
    """A Perceiver with everything that no input changes computed once: queries of latents and output, positions.

    ``forward(pixel_values)``, float32 (B, 3, height, width), or ``forward(input_ids, attention_mask)``, int64 (B, S),
    returns ``logits``, (B, L) of a classifier or (B, S, V) of bytes, and ``last_hidden_state`` (B, N, d_latents), the
    latents.
    """

    latents: Tensor  # (1, N, d_latents)
    queries: Tensor  # (1, H, N, D)
    output_rows: Tensor  # (1, O, width)
    output_queries: Tensor  # (1, H, O, D)

    def __init__(self, model: Perceiver) -> None:
        super().__init__()
        self.input_preprocessor, self.encoder, self.decoder = model.input_preprocessor, model.encoder, model.reader
        self.bias = model.embedding_decoder.bias if model.task == "fill-mask" else None
        self.constants = []
        with torch.no_grad():
            rows = self.decoder.output_position_encodings.position_embeddings[None]
            self.register_buffer("latents", model.embeddings.latents[None])
            self.register_buffer("queries", self.encoder.cross_attention.attention.self.queries(self.latents))
            self.register_buffer("output_rows", rows)
            self.register_buffer("output_queries", self.decoder.decoding_cross_attention.attention.self.queries(rows))
            for name, constant in self.input_preprocessor.constants().items():
                self.register_buffer(name, constant)
                self.constants.append(name)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.input_preprocessor, TextInputs):
            return self.from_text(self.input_preprocessor, *inputs)
        return self.from_image(*inputs)

    def from_image(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        rows = self.input_preprocessor(pixel_values, *(getattr(self, name) for name in self.constants))  # (B, M, C)
        x = self.encoder(self.latents, self.queries, rows, None)
        return self.decoder(self.output_rows, self.output_queries, x), x

    def from_text(self, embedded: TextInputs, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        S = input_ids.shape[1]
        mask = key_mask(attention_mask, self.latents.shape[1])  # (B, 1, N, S)
        x = self.encoder(self.latents, self.queries, embedded(input_ids), mask)
        if self.bias is None:
            return self.decoder(self.output_rows, self.output_queries, x), x
        # transformers asks at every position there is; queries do not see each other, so the first S give the same
        y = self.decoder(self.output_rows[:, :S], self.output_queries[:, :, :S], x)
        return F.linear(y, embedded.embeddings.weight, self.bias), x


def rename(name: str, config: PerceiverConfig, task: str) -> str | None:
    """Return the module's name of a stored weight, the same but for a prefix; None for a counter of training."""
    return None if name.endswith("num_batches_tracked") else name.removeprefix("perceiver.")


def convert(name: str, stored: Tensor, config: PerceiverConfig) -> Tensor:
    """Resize learned positions of pixels from the trained image size to the exported one; keep the rest."""
    if config.inputs != "learned" or name != "input_preprocessor.position_embeddings.position_embeddings":
        return stored
    return resized(stored, config.trained_image_size, config.image_size)


def graphs(config: PerceiverConfig, task: str) -> tuple[Graph, ...]:
    """Return the one graph; the image size is fixed at export, the mask of a text is optional."""
    latents = TensorSpec("last_hidden_state", "float32", ("B", config.num_latents, config.d_latents))
    if config.inputs == "text":
        inputs: tuple[TensorSpec, ...] = (
            TensorSpec("input_ids", "int64", ("B", "S"), exclusive_max=config.vocab_size),
            TensorSpec("attention_mask", "int64", ("B", "S"), default=1),
        )
    else:
        inputs = (TensorSpec("pixel_values", "float32", ("B", 3, *config.image_size)),)
    shape = ("B", "S", config.vocab_size) if task == "fill-mask" else ("B", config.num_labels)
    return (Graph("model", inputs, (TensorSpec("logits", "float32", shape), latents)),)


def axes(config: PerceiverConfig) -> dict[str, Axis]:
    """Return the bounds of B, and of S where texts are read."""
    if config.inputs != "text":
        return {"B": Axis(1, 1, 16)}
    longest = config.max_position_embeddings
    return {"B": Axis(1, 1, 16), "S": Axis(1, min(128, longest), longest)}


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module behind the graph."""
    assert isinstance(model, Perceiver)
    return {"model": Folded(model)}


FAMILY = Family(
    name="perceiver",
    model_types=("perceiver",),
    prefix="perceiver.",
    unprefixed_heads=("embedding_decoder.",),
    architectures=ARCHITECTURES,
    undefined=UNDEFINED,
    tasks=tuple(dict.fromkeys(ARCHITECTURES.values())),
    config=config_from_source,
    build=Perceiver,
    rename=rename,
    convert=convert,
    graphs=graphs,
    axes=axes,
    parts=parts,
)
