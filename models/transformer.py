"""The encoder-decoder of "Attention Is All You Need" (Vaswani et al., 2017, arXiv:1706.03762), and Marian.

Post-norm, sinusoidal positions, one embedding for source, target and the output layer. Marian's
checkpoints (Junczys-Dowmunt et al., 2018) are the same with SiLU, all sines before all cosines, and a
bias on the logits. Two graphs: ``encoder`` runs once per source and gives the keys and values that the
decoder's cross-attention reads, ``decoder`` runs for prefill, chunked prefill and each new token.

Shape letters as in attention.py and cache.py; T target tokens, P positions whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.models.attention import Projections, SelfAttention, attend, key_mask
from transom.models.cache import cache_inputs, cache_outputs, causal_mask, positions, select_positions, write_cache
from transom.models.family import Family, GraphModule, Source, config_fields
from transom.models.layers import ACTIVATIONS
from transom.runtime.errors import CheckpointError
from transom.runtime.graph_spec import ARANGE, Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec

LAYOUTS = ("interleaved", "halves")  # of sines and cosines: the paper's section 3.5, and Marian's


@dataclass(frozen=True)
class TransformerConfig:
    """The paper's base model by default (table 3); names as in transformers' MarianConfig."""

    vocab_size: int = 37000
    decoder_vocab_size: int = 37000
    max_position_embeddings: int = 512
    d_model: int = 512
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    position_layout: str = "interleaved"
    scale_embedding: bool = True
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    embedding: str = "shared.weight"  # the name under which the checkpoint stores a shared embedding


class CachedAttention(Projections):
    """Causal attention over the cache."""

    def forward(
        self, x: Tensor, key_cache: Tensor, value_cache: Tensor, write_indices: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend over the cache: ``x`` (B, T, E), caches (B, H, C, D), ``mask`` (B, 1, T, C) -> (B, T, E), caches."""
        keys, values = self.keys_values(x)
        keys, values = write_cache(key_cache, keys, write_indices), write_cache(value_cache, values, write_indices)
        return self.out_proj(attend(self.queries(x), keys, values, mask)), keys, values


class CrossAttention(Projections):
    """Attention over keys and values that the encoder computed once."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return self.out_proj(attend(self.queries(x), keys, values, mask))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """LayerNorm(x + sublayer(x)), twice: section 3.1."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.d_model, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask))
        return self.final_layer_norm(x + self.fc2(self.activation(self.fc1(x))))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """LayerNorm(x + sublayer(x)), three times, with attention over the encoder's output in between: section 3.1."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = CachedAttention(config.d_model, config.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = CrossAttention(config.d_model, config.decoder_attention_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(
        self, x: Tensor, cross: tuple[Tensor, Tensor, Tensor], cached: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the layer; ``cross``: keys, values and mask of the source; ``cached``: caches, indices and mask."""
        attended, keys, values = self.self_attn(x, *cached)
        x = self.self_attn_layer_norm(x + attended)
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x, *cross))
        return self.final_layer_norm(x + self.fc2(self.activation(self.fc1(x)))), keys, values


class Side(nn.Module):
    """Encoder or decoder: layers, positions, and an embedding of its own where none is shared."""

    def __init__(self, layers: list[nn.Module], vocab_size: int, config: TransformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        own = not config.share_encoder_decoder_embeddings
        self.embed_tokens = nn.Embedding(vocab_size, config.d_model) if own else None


class Transformer(nn.Module):
    """Encoder, decoder and the output layer. The graphs compute ``encode`` and ``decode``."""

    def __init__(self, config: TransformerConfig, task: str) -> None:
        super().__init__()
        shared = config.share_encoder_decoder_embeddings
        self.shared = nn.Embedding(config.vocab_size, config.d_model) if shared else None
        self.encoder = Side([EncoderLayer(config) for _ in range(config.encoder_layers)], config.vocab_size, config)
        vocabulary = target_vocabulary(config)
        self.decoder = Side([DecoderLayer(config) for _ in range(config.decoder_layers)], vocabulary, config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.d_model, vocabulary, bias=False)
        self.final_logits_bias = nn.Parameter(torch.empty(1, vocabulary))
        self.embed_scale = config.d_model**0.5 if config.scale_embedding else 1.0

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Encode int64 (B, S) each: ``last_hidden_state`` (B, S, E), and each decoder layer's cross keys and values."""
        table = self.embedding(self.encoder)
        x = table(input_ids) * self.embed_scale + self.encoder.embed_positions.weight[: input_ids.shape[1]]
        mask = key_mask(attention_mask)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        cross: list[Tensor] = []
        for layer in self.decoder.layers:
            assert isinstance(layer, DecoderLayer)
            cross += layer.encoder_attn.keys_values(x)
        return x, *cross

    def decode(
        self,
        decoder_input_ids: Tensor,
        attention_mask: Tensor,
        write_indices: Tensor,
        logits_positions: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute ``logits`` (B, P, V) and the caches; ``state`` is each layer's cross pair, then each cache pair."""
        layers = len(self.decoder.layers)
        cross, caches = state[: 2 * layers], state[2 * layers :]
        T, C = decoder_input_ids.shape[1], caches[0].shape[2]
        mask, source_mask = causal_mask(write_indices, T, C), key_mask(attention_mask, T)
        table = self.embedding(self.decoder)
        x = table(decoder_input_ids) * self.embed_scale
        x = x + self.decoder.embed_positions(positions(write_indices, T))
        updated: list[Tensor] = []
        for i, layer in enumerate(self.decoder.layers):
            source = cross[2 * i], cross[2 * i + 1], source_mask
            x, keys, values = layer(x, source, (caches[2 * i], caches[2 * i + 1], write_indices, mask))
            updated += (keys, values)
        x = select_positions(x, logits_positions)
        head = table.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(x, head) + self.final_logits_bias, *updated

    def embedding(self, side: Side) -> nn.Embedding:
        """Return the embedding of encoder or decoder, which may be shared."""
        table = side.embed_tokens if self.shared is None else self.shared
        assert table is not None
        return table


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module behind each graph; they share the weights."""
    assert isinstance(model, Transformer)
    return {"encoder": GraphModule(model, "encode"), "decoder": GraphModule(model, "decode")}


def target_vocabulary(config: TransformerConfig) -> int:
    """Return the number of tokens that the decoder chooses from."""
    return config.vocab_size if config.share_encoder_decoder_embeddings else config.decoder_vocab_size


def sinusoids(length: int, d_model: int, layout: str) -> Tensor:
    """Compute sin and cos of pos / 10000^(2i/d_model), float32 (length, d_model), in one of LAYOUTS: section 3.5."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(0, d_model, 2, dtype=torch.float64) / d_model
    )
    sines, cosines = angles.sin(), angles[:, : d_model // 2].cos()  # one sine more where d_model is odd
    table = torch.cat((sines, cosines), dim=1)
    if layout == "interleaved":
        table[:, 0::2], table[:, 1::2] = sines, cosines
    return table.float()


def computed(config: TransformerConfig) -> dict[str, Tensor]:
    """Compute the weights that a checkpoint need not store: positions, and a bias of zeros."""
    table = sinusoids(config.max_position_embeddings, config.d_model, config.position_layout)
    return {
        "encoder.embed_positions.weight": table,
        "decoder.embed_positions.weight": table,
        "final_logits_bias": torch.zeros(1, target_vocabulary(config)),
    }


EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def rename(name: str, config: TransformerConfig, task: str) -> str | None:
    """Return the module's name of a stored weight, the same but for the prefix; None for copies of a shared one."""
    name = name.removeprefix("model.")
    if config.share_encoder_decoder_embeddings and name in EMBEDDINGS[: 4 if config.tie_word_embeddings else 3]:
        return "shared.weight" if name == config.embedding else None
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return None
    return name


def tied_to(name: str, config: TransformerConfig, task: str) -> str | None:
    """Return the embedding that a stored weight repeats; None for other weights."""
    if name.removeprefix("model.") not in EMBEDDINGS:
        return None
    return "shared.weight" if config.share_encoder_decoder_embeddings else "decoder.embed_tokens.weight"


def convert(name: str, stored: Tensor, config: TransformerConfig) -> Tensor:
    """Return the tensor as it is stored; a bias of (V,) becomes (1, V)."""
    return stored[None] if name == "final_logits_bias" and stored.ndim == 1 else stored


SIZES = {  # the paper's base model, and transformers' defaults for Marian
    "vocab_size": (37000, 58101),
    "max_position_embeddings": (512, 1024),
    "d_model": (512, 1024),
    "encoder_layers": (6, 12),
    "encoder_attention_heads": (8, 16),
    "encoder_ffn_dim": (2048, 4096),
    "decoder_layers": (6, 12),
    "decoder_attention_heads": (8, 16),
    "decoder_ffn_dim": (2048, 4096),
}
MOST_POSITIONS = 1_000_000
HEADS = (("d_model", "encoder_attention_heads"), ("d_model", "decoder_attention_heads"))


def config_from_source(source: Source) -> TransformerConfig:
    """Read config.json of model_type "transformer" or "marian"; each has its own defaults."""
    config_json = source.config_json
    marian = config_json.get("model_type") == "marian"
    others = {
        "activation_function": "gelu" if marian else "relu",
        "scale_embedding": not marian,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
    }
    sizes = {name: defaults[marian] for name, defaults in SIZES.items()}
    fields = config_fields(config_json, sizes, others, ACTIVATIONS, heads=HEADS)
    if fields["max_position_embeddings"] > MOST_POSITIONS:  # they are computed, so no stored shape contradicts them
        raise CheckpointError(
            f"config.json: max_position_embeddings is {fields['max_position_embeddings']}, expected at most "
            f"{MOST_POSITIONS}. Correct it."
        )
    layout = "halves" if marian else config_json.get("position_layout", "interleaved")
    if layout not in LAYOUTS:
        raise CheckpointError(f"config.json: position_layout is {layout!r}, expected one of {', '.join(LAYOUTS)}.")
    target = config_json.get("decoder_vocab_size") or fields["vocab_size"]
    if type(target) is not int or target < 1:
        raise CheckpointError(f"config.json: decoder_vocab_size is {target!r}, expected a positive integer.")
    stored = {name.removeprefix("model.") for name in source.names}
    embedding = next((name for name in EMBEDDINGS if name in stored), EMBEDDINGS[0])
    return TransformerConfig(**fields, position_layout=layout, decoder_vocab_size=target, embedding=embedding)


def graphs(config: TransformerConfig, task: str) -> tuple[Graph, ...]:
    """Return encoder and decoder, with transformers' tensor names; both have the source's ``attention_mask``."""
    heads = config.decoder_attention_heads
    head_size = config.d_model // heads
    cross = tuple(
        TensorSpec(f"cross_{kind}.{layer}", "float32", ("B", heads, "S", head_size), state=True)
        for layer in range(config.decoder_layers)
        for kind in ("key", "value")
    )
    cache = config.decoder_layers, heads, head_size
    mask = TensorSpec("attention_mask", "int64", ("B", "S"), default=1)
    encoder = Graph(
        "encoder",
        (TensorSpec("input_ids", "int64", ("B", "S"), exclusive_max=config.vocab_size), mask),
        (TensorSpec("last_hidden_state", "float32", ("B", "S", config.d_model)), *cross),
    )
    tokens = (
        TensorSpec("decoder_input_ids", "int64", ("B", "T"), exclusive_max=target_vocabulary(config)),
        mask,
        TensorSpec("write_indices", "int64", ("B",), default=0, exclusive_max=config.max_position_embeddings),
        TensorSpec("logits_positions", "int64", ("B", "P"), default=ARANGE),
    )
    logits = TensorSpec("logits", "float32", ("B", "P", target_vocabulary(config)))
    decoder = Graph("decoder", (*tokens, *cross, *cache_inputs(*cache)), (logits, *cache_outputs(*cache)))
    return encoder, decoder


def axes(config: TransformerConfig) -> dict[str, Axis]:
    """Return the bounds of B, S, T, C and P."""
    longest = config.max_position_embeddings
    opt = min(64, longest)
    return {
        "B": Axis(1, 1, 16),
        "S": Axis(1, opt, longest),
        "T": Axis(1, 1, longest),
        "C": Axis(1, opt, longest, same_as="T"),
        "P": Axis(1, 1, longest, same_as="T"),
    }


FAMILY = Family(
    name="transformer",
    model_types=("transformer", "marian"),
    prefix="model.",
    unprefixed_heads=("lm_head.",),
    architectures={"TransformerForConditionalGeneration": "translation", "MarianMTModel": "translation"},
    tasks=("translation",),
    config=config_from_source,
    build=Transformer,
    rename=rename,
    tied_to=tied_to,
    convert=convert,
    graphs=graphs,
    axes=axes,
    computed=computed,
    parts=parts,
)
