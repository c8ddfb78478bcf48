"""Sequence to sequence with GRUs: with attention (Bahdanau et al., 2015, arXiv:1409.0473), and without.

Without attention the context is one vector for the whole source (Sutskever et al., 2014, arXiv:1409.3215; Cho et al.,
2014, arXiv:1406.1078). Two graphs: ``encoder`` runs once per source, ``decoder`` once per new token, over a state that
the caller owns.

Shape letters as in recurrent.py; T new tokens, always one; V target vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transom.models.family import Family, GraphModule, Source, config_fields
from transom.models.recurrent import (
    AdditiveAttention,
    BidirectionalGRU,
    GRUCell,
    check_positions,
    state_inputs,
    state_outputs,
)
from transom.runtime.errors import CheckpointError
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec

PREFIX = "model."
ATTENTION = "decoder.attention."  # how the names of weights begin that only the form with attention has


@dataclass(frozen=True)
class Seq2SeqConfig:
    """The sizes of RNNsearch by default: appendix A.2.3, and section 4.2 for the vocabulary."""

    vocab_size: int = 30000
    decoder_vocab_size: int = 30000
    embedding_size: int = 620
    encoder_hidden_size: int = 1000  # of each direction
    decoder_hidden_size: int = 1000
    encoder_layers: int = 1
    decoder_layers: int = 1
    attention_size: int = 1000
    readout_size: int = 500
    attention: bool = True
    max_source_positions: int = 512
    max_target_positions: int = 512


class Encoder(nn.Module):
    """Annotations of the source, and the decoder's first states: appendix A.2.1."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.layers = config.decoder_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.gru = BidirectionalGRU(config.embedding_size, config.encoder_hidden_size, config.encoder_layers)
        self.bridge = nn.Linear(2 * config.encoder_hidden_size, self.layers * config.decoder_hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Encode int64 (B, S) each: annotations (B, S, 2H), final states (B, 2H), and a state (B, H) per layer."""
        annotations, final = self.gru(self.embed_tokens(input_ids), attention_mask.sum(1).clamp(min=1))
        return annotations, final, torch.tanh(self.bridge(final)).chunk(self.layers, dim=1)


class Decoder(nn.Module):
    """One step: attend with the last state, move every layer's state, and read the next token's logits out."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        context, hidden = 2 * config.encoder_hidden_size, config.decoder_hidden_size
        self.embed_tokens = nn.Embedding(config.decoder_vocab_size, config.embedding_size)
        self.attention = AdditiveAttention(hidden, context, config.attention_size) if config.attention else None
        inputs = [config.embedding_size + context, *[hidden] * (config.decoder_layers - 1)]
        self.cells = nn.ModuleList(GRUCell(size, hidden) for size in inputs)
        self.readout = nn.Linear(hidden + config.embedding_size + context, 2 * config.readout_size)
        self.lm_head = nn.Linear(config.readout_size, config.decoder_vocab_size)

    def forward(self, tokens: Tensor, context: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """Read ``tokens`` int64 (B,) with the context (B, 2H): logits (B, V), and each layer's next state (B, H).

        The logits come from the new state, the token and the context by a maxout layer: section A.2.2, where it is the
        state before.
        """
        embedded = self.embed_tokens(tokens)
        x = torch.cat((embedded, context), dim=1)
        moved: list[Tensor] = []
        for cell, state in zip(self.cells, states, strict=True):
            x = cell(x, state)
            moved.append(x)
        pairs = self.readout(torch.cat((x, embedded, context), dim=1)).unflatten(1, (-1, 2))
        return self.lm_head(pairs.amax(2)), moved


class Seq2Seq(nn.Module):
    """Encoder and decoder. The graphs compute ``encode`` and ``decode``."""

    def __init__(self, config: Seq2SeqConfig, task: str) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Encode int64 (B, S) each: what ``decode`` reads of the source, then a first state (B, H) per layer.

        With attention the former are keys (B, S, A) and values (B, S, 2H), without it the context (B, 2H).
        """
        annotations, final, states = self.encoder(input_ids, attention_mask)
        attention = self.decoder.attention
        source = (final,) if attention is None else (attention.keys(annotations), annotations)
        return *source, *states

    def decode(self, decoder_input_ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Compute ``logits`` (B, 1, V), the weights of the source (B, 1, S) with attention, and the next states.

        ``decoder_input_ids`` is int64 (B, 1). ``given``: the source's mask int64 (B, S), keys and values with
        attention, else the context; then the states.
        """
        attention, layers = self.decoder.attention, len(self.decoder.cells)
        source, states = given[:-layers], given[-layers:]
        weights: tuple[Tensor, ...] = ()
        if attention is None:
            (context,) = source
        else:
            mask, keys, values = source
            context, found = attention(states[-1], keys, values, mask.to(torch.bool))
            weights = (found[:, None],)
        logits, moved = self.decoder(decoder_input_ids[:, 0], context, states)
        return logits[:, None], *weights, *moved


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module behind each graph; they share the weights."""
    assert isinstance(model, Seq2Seq)
    model.encoder.gru.pack()
    return {"encoder": GraphModule(model, "encode"), "decoder": GraphModule(model, "decode")}


def rename(name: str, config: Seq2SeqConfig, task: str) -> str | None:
    """Return the module's name of a stored weight, the same but for the prefix."""
    return name.removeprefix(PREFIX)


def convert(name: str, stored: Tensor, config: Seq2SeqConfig) -> Tensor:
    """Return the tensor as it is stored."""
    return stored


SIZES = {name: value for name, value in vars(Seq2SeqConfig()).items() if type(value) is int}


def config_from_source(source: Source) -> Seq2SeqConfig:
    """Read config.json of model_type "seq2seq". Raises CheckpointError where the weights are of the other form."""
    config = Seq2SeqConfig(**config_fields(source.config_json, SIZES, {"attention": True}, {}, heads=()))
    stored = any(name.removeprefix(PREFIX).startswith(ATTENTION) for name in source.names)
    if stored != config.attention:
        forms = {True: "with attention", False: "without attention, whose context is one vector"}
        raise CheckpointError(
            f"config.json: attention is {str(config.attention).lower()}, and the weights are of the form "
            f"{forms[stored]}: {'there are' if stored else 'there are no'} weights {ATTENTION}*. Set attention to "
            f"{str(stored).lower()}, or give the checkpoint's own weights."
        )
    check_positions("max_source_positions", config.max_source_positions, least=1)
    check_positions("max_target_positions", config.max_target_positions, least=2)
    return config


def graphs(config: Seq2SeqConfig, task: str) -> tuple[Graph, ...]:
    """Return encoder and decoder, with transformers' tensor names where it has any."""
    context = 2 * config.encoder_hidden_size
    mask = TensorSpec("attention_mask", "int64", ("B", "S"), default=1)
    source = (
        (
            TensorSpec("cross_key", "float32", ("B", "S", config.attention_size), state=True),
            TensorSpec("cross_value", "float32", ("B", "S", context), state=True),
        )
        if config.attention
        else (TensorSpec("context", "float32", ("B", context), state=True),)
    )
    states = state_inputs("hidden_state", config.decoder_layers, config.decoder_hidden_size)
    encoder = Graph(
        "encoder",
        (TensorSpec("input_ids", "int64", ("B", "S"), exclusive_max=config.vocab_size), mask),
        (*source, *states),
    )
    tokens = TensorSpec("decoder_input_ids", "int64", ("B", "T"), exclusive_max=config.decoder_vocab_size)
    logits = TensorSpec("logits", "float32", ("B", "T", config.decoder_vocab_size))
    attended = (mask,) if config.attention else ()
    weights = (TensorSpec("cross_attentions", "float32", ("B", "T", "S")),) if config.attention else ()
    decoder = Graph("decoder", (tokens, *attended, *source, *states), (logits, *weights, *state_outputs(states)))
    return encoder, decoder


def axes(config: Seq2SeqConfig) -> dict[str, Axis]:
    """Return the bounds of B, S and T."""
    longest = config.max_source_positions
    return {"B": Axis(1, 1, 16), "S": Axis(1, min(64, longest), longest), "T": Axis(1, 1, 1)}


def options(model: nn.Module) -> dict[str, int]:
    """Return how many tokens an output may have: the state has the same size after any number of them."""
    assert isinstance(model, Seq2Seq)
    return {"max_target_positions": model.config.max_target_positions}


FAMILY = Family(
    name="seq2seq",
    model_types=("seq2seq",),
    prefix=PREFIX,
    architectures={"Seq2SeqForConditionalGeneration": "translation"},
    tasks=("translation",),
    config=config_from_source,
    build=Seq2Seq,
    rename=rename,
    convert=convert,
    graphs=graphs,
    axes=axes,
    parts=parts,
    options=options,
)
