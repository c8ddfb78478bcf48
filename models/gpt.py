"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"): a pre-norm decoder.

Shape letters as in attention.py and cache.py; P positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.models.attention import attend, split_heads
from transom.models.cache import cache_inputs, cache_outputs, causal_mask, positions, select_positions, write_cache
from transom.models.family import Family, Source, config_fields
from transom.models.layers import ACTIVATIONS
from transom.runtime.errors import CheckpointError
from transom.runtime.graph_spec import ARANGE, Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec


@dataclass(frozen=True)
class GPTConfig:
    """GPT-2 of 124 M parameters by default; names as in transformers' config.json."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True


class Conv1D(nn.Module):
    """A linear layer whose weight is stored as (in, out), as in GPT-2's checkpoints."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class CachedAttention(nn.Module):
    """Causal self-attention over the cache; query, key and value are packed in one matrix, ``c_attn``."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.num_heads = config.n_head
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, key_cache: Tensor, value_cache: Tensor, write_indices: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend over the cache: ``x`` (B, S, E), caches (B, H, C, D), ``mask`` (B, 1, S, C) -> (B, S, E), caches."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.c_attn(x).chunk(3, dim=-1))
        key_cache, value_cache = write_cache(key_cache, k, write_indices), write_cache(value_cache, v, write_indices)
        return self.c_proj(attend(q, key_cache, value_cache, mask, self.scale)), key_cache, value_cache


class MLP(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)
        self.c_proj = Conv1D(config.n_inner, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """LayerNorm before each sublayer, residual around it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CachedAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, key_cache: Tensor, value_cache: Tensor, write_indices: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended, key_cache, value_cache = self.attn(self.ln_1(x), key_cache, value_cache, write_indices, mask)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), key_cache, value_cache


class GPT(nn.Module):
    """The decoder and its language-modelling head.

    ``forward`` takes int64 ``input_ids`` (B, S), ``write_indices`` (B,) and ``logits_positions`` (B, P),
    then ``key_cache.<i>`` and ``value_cache.<i>``, float32 (B, H, C, D), of each layer. It returns
    ``logits`` (B, P, V) and the caches with the new keys and values written.
    """

    def __init__(self, config: GPTConfig, task: str) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, write_indices: Tensor, logits_positions: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        return self.run(input_ids, write_indices, logits_positions, caches, lambda layer, x: x)

    def run(
        self,
        input_ids: Tensor,
        write_indices: Tensor,
        logits_positions: Tensor,
        caches: Sequence[Tensor],
        before_block: Callable[[int, Tensor], Tensor],
    ) -> tuple[Tensor, ...]:
        """Compute ``forward`` with ``before_block(layer, x)`` (B, S, E) in front of each block."""
        S, C = input_ids.shape[1], caches[0].shape[2]
        mask = causal_mask(write_indices, S, C)
        x = self.wte(input_ids) + self.wpe(positions(write_indices, S))  # (B, S, E)
        updated: list[Tensor] = []
        for layer, block in enumerate(self.h):
            x = before_block(layer, x)
            x, keys, values = block(x, caches[2 * layer], caches[2 * layer + 1], write_indices, mask)
            updated += (keys, values)
        x = self.ln_f(select_positions(x, logits_positions))  # (B, P, E)
        return F.linear(x, self.wte.weight if self.lm_head is None else self.lm_head.weight), *updated


BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that older checkpoints store


def rename(name: str, config: GPTConfig, task: str) -> str | None:
    """Return the module's name of a stored weight, the same but for the prefix; None for masks and a tied head."""
    name = name.removeprefix("transformer.")
    if name.endswith(BUFFERS) or (config.tie_word_embeddings and name == "lm_head.weight"):
        return None
    return name


def tied_to(name: str, config: GPTConfig, task: str) -> str | None:
    """Return the weight that a tied head repeats: the embedding."""
    return "wte.weight" if name == "lm_head.weight" else None


def convert(name: str, stored: Tensor, config: GPTConfig) -> Tensor:
    """Return the tensor as it is stored: Conv1D keeps the checkpoint's layout."""
    return stored


SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
OTHERS = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


def config_from_source(source: Source) -> GPTConfig:
    """Read config.json; refuse what this definition would compute differently."""
    config_json, width = source.config_json, source.config_json.get("n_embd")
    sizes = SIZES | {"n_inner": 4 * width if type(width) is int else 3072}  # where n_inner is null or missing
    given = {name: value for name, value in config_json.items() if name != "n_inner" or value is not None}
    fields = config_fields(given, sizes, OTHERS, ACTIVATIONS, heads=(("n_embd", "n_head"),))
    if config_json.get("add_cross_attention"):
        raise CheckpointError("config.json: add_cross_attention is set; GPT-2 is exported as a decoder on its own.")
    return GPTConfig(**fields)


def graphs(config: GPTConfig, task: str) -> tuple[Graph, ...]:
    """Return the graph of prefill, chunked prefill and decode; transformers' tensor names beside the cache's."""
    cache = config.n_layer, config.n_head, config.n_embd // config.n_head
    tokens = (
        TensorSpec("input_ids", "int64", ("B", "S"), exclusive_max=config.vocab_size),
        TensorSpec("write_indices", "int64", ("B",), default=0, exclusive_max=config.n_positions),
        TensorSpec("logits_positions", "int64", ("B", "P"), default=ARANGE),
    )
    logits = TensorSpec("logits", "float32", ("B", "P", config.vocab_size))
    return (Graph("decoder", (*tokens, *cache_inputs(*cache)), (logits, *cache_outputs(*cache))),)


def axes(config: GPTConfig) -> dict[str, Axis]:
    """Return the bounds of B, S, C and P."""
    longest = config.n_positions
    opt = min(128, longest)
    return {
        "B": Axis(1, 1, 16),
        "S": Axis(1, opt, longest),
        "C": Axis(1, opt, longest, same_as="S"),
        "P": Axis(1, 1, longest, same_as="S"),
    }


FAMILY = Family(
    name="gpt",
    model_types=("gpt2",),
    prefix="transformer.",
    unprefixed_heads=("lm_head.",),
    architectures={"GPT2LMHeadModel": "text-generation"},
    tasks=("text-generation",),
    config=config_from_source,
    build=GPT,
    rename=rename,
    tied_to=tied_to,
    convert=convert,
    graphs=graphs,
    axes=axes,
    parts=lambda module: {"decoder": module},
)
