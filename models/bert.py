"""BERT (Devlin et al., 2018, arXiv:1810.04805): a post-norm Transformer encoder and its task heads.

Shape letters as in attention.py; V vocabulary, L labels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.models.attention import Attention, key_mask
from transom.models.family import Family, Source, config_fields, label_count
from transom.models.layers import ACTIVATIONS, Dense, DenseAddNorm, SentencePooling
from transom.runtime.errors import CheckpointError
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec


@dataclass(frozen=True)
class BertConfig:
    """BERT-base by default; names as in transformers' config.json."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    tie_word_embeddings: bool = True
    num_labels: int = 2
    pooler: bool = True  # some checkpoints store no pooler
    pooling: str = "mean"  # of the sentence embedding: mean or cls
    normalize: bool = False  # the sentence embedding to length 1


class Embeddings(nn.Module):
    """Word + position + token type, normalised: section 3, "Input/Output Representations"."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        S = input_ids.shape[1]
        tokens = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(tokens + self.position_embeddings.weight[:S])  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """LayerNorm(x + Attention(x)); the parts are called ``self`` and ``output`` in checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = Attention(config.hidden_size, config.num_attention_heads)
        self.output = DenseAddNorm(config.hidden_size, config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.self(x, mask), x)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention, then the position-wise feed-forward block, each post-norm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.output = DenseAddNorm(config.intermediate_size, config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Transform(nn.Module):
    """Dense, activation, LayerNorm: the masked LM's transform before the product with the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(x)))  # type: ignore[no-any-return]


class MaskedLMHead(nn.Module):
    """Logits over the vocabulary, by the word embeddings unless they are untied: (B, S, E) -> (B, S, V)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.tied = config.tie_word_embeddings
        if self.tied:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        x = self.transform(hidden)
        return F.linear(x, word_embeddings, self.bias) if self.tied else self.decoder(x)


class Bert(nn.Module):
    """The encoder and the head of one task.

    ``forward(input_ids, attention_mask, token_type_ids)``, all int64 (B, S), returns the outputs of
    ``graph`` in order: the head's, then ``last_hidden_state`` (B, S, E) and ``sentence_embedding`` (B, E),
    which every BERT graph has, so that any of them can embed.
    """

    def __init__(self, config: BertConfig, task: str) -> None:
        super().__init__()
        self.task = task
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Dense(config.hidden_size, config.hidden_size, "tanh") if config.pooler else None
        self.sentence_pooling = SentencePooling(config.pooling, config.normalize)
        match task:
            case "fill-mask":
                self.cls = nn.ModuleDict({"predictions": MaskedLMHead(config)})
            case "next-sentence-prediction":
                self.cls = nn.ModuleDict({"seq_relationship": nn.Linear(config.hidden_size, 2)})
            case "text-classification" | "token-classification":
                self.classifier = nn.Linear(config.hidden_size, config.num_labels)
            case "question-answering":
                self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        x = self.encoder(self.embeddings(input_ids, token_type_ids), key_mask(attention_mask))
        return (*self.head(x), x, self.sentence_pooling(x, attention_mask))

    def head(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the task's own outputs from the last hidden state (B, S, E)."""
        pooled = None if self.pooler is None else self.pooler(x[:, 0])  # (B, E)
        match self.task:
            case "fill-mask":
                return (self.cls["predictions"](x, self.embeddings.word_embeddings.weight),)
            case "next-sentence-prediction":
                return (self.cls["seq_relationship"](pooled),)
            case "text-classification":
                return (self.classifier(pooled),)
            case "token-classification":
                return (self.classifier(x),)
            case "question-answering":
                start, end = self.qa_outputs(x).unbind(-1)
                return start, end
            case _:
                return () if pooled is None else (pooled,)


# Tasks of BERT, and what each one's head is called in a checkpoint.
HEADS = {
    "feature-extraction": "pooler.",
    "fill-mask": "cls.predictions.",
    "next-sentence-prediction": "cls.seq_relationship.",
    "text-classification": "classifier.",
    "token-classification": "classifier.",
    "question-answering": "qa_outputs.",
}
POOLED_TASKS = ("text-classification", "next-sentence-prediction")


def rename(name: str, config: BertConfig, task: str) -> str | None:
    """Return the module's name of a stored weight, the same but for prefixes; None for what ``task`` does not use."""
    name = name.removeprefix("bert.")
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # converted from TensorFlow
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    copies = "cls.predictions.decoder." if config.tie_word_embeddings else "cls.predictions.bias"
    if name == "embeddings.position_ids" or name.startswith(copies):  # a constant; what transformers ties or ignores
        return None
    used = {HEADS[task]} | ({"pooler."} if task in POOLED_TASKS else set())
    others = tuple(set(HEADS.values()) - used)
    return None if name.startswith(others) else name


def tied_to(name: str, config: BertConfig, task: str) -> str | None:
    """Return the weight that a tied head repeats: the embedding, and the bias beside it."""
    copies = {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    return copies.get(name) if task == "fill-mask" and config.tie_word_embeddings else None


SIZES = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}


def config_from_source(source: Source) -> BertConfig:
    """Read config.json; refuse what this definition would compute differently."""
    config_json = source.config_json
    others = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True}
    fields = config_fields(config_json, SIZES, others, ACTIVATIONS)
    if config_json.get("position_embedding_type", "absolute") != "absolute":
        raise CheckpointError(
            f"config.json: position_embedding_type is {config_json['position_embedding_type']!r}; only 'absolute' is "
            "defined."
        )
    if config_json.get("is_decoder") or config_json.get("add_cross_attention"):
        raise CheckpointError("config.json: is_decoder or add_cross_attention is set; BERT is exported as an encoder.")
    stored_pooler = any(name.startswith(("pooler.", "bert.pooler.")) for name in source.names)
    return BertConfig(
        **fields,
        num_labels=label_count(config_json),
        pooler=source.task in POOLED_TASKS or (source.task == "feature-extraction" and stored_pooler),
        pooling=source.pooling.get("mode", "mean"),
        normalize=source.pooling.get("normalize", False),
    )


def graphs(config: BertConfig, task: str) -> tuple[Graph, ...]:
    """Return the one graph, with transformers' tensor names; token types and mask are optional."""
    hidden = TensorSpec("last_hidden_state", "float32", ("B", "S", config.hidden_size))
    embedding = TensorSpec("sentence_embedding", "float32", ("B", config.hidden_size))
    inputs = (
        TensorSpec("input_ids", "int64", ("B", "S"), exclusive_max=config.vocab_size),
        TensorSpec("attention_mask", "int64", ("B", "S"), default=1),
        TensorSpec("token_type_ids", "int64", ("B", "S"), default=0, exclusive_max=config.type_vocab_size),
    )
    return (Graph("model", inputs, (*head_outputs(config, task), hidden, embedding)),)


def head_outputs(config: BertConfig, task: str) -> tuple[TensorSpec, ...]:
    """Return the outputs of the task's head."""
    if task == "feature-extraction":
        pooled = TensorSpec("pooler_output", "float32", ("B", config.hidden_size))
        return (pooled,) if config.pooler else ()
    if task == "question-answering":
        return tuple(TensorSpec(name, "float32", ("B", "S")) for name in ("start_logits", "end_logits"))
    shape: dict[str, tuple[str | int, ...]] = {
        "fill-mask": ("B", "S", config.vocab_size),
        "next-sentence-prediction": ("B", 2),
        "text-classification": ("B", config.num_labels),
        "token-classification": ("B", "S", config.num_labels),
    }
    return (TensorSpec("logits", "float32", shape[task]),)


def axes(config: BertConfig) -> dict[str, Axis]:
    """Return the bounds of B and S."""
    longest = config.max_position_embeddings
    return {"B": Axis(1, 1, 16), "S": Axis(1, min(128, longest), longest)}


FAMILY = Family(
    name="bert",
    model_types=("bert",),
    prefix="bert.",
    unprefixed_heads=("classifier.", "qa_outputs.", "cls."),
    architectures={
        "BertModel": "feature-extraction",
        "BertForPreTraining": "fill-mask",
        "BertForMaskedLM": "fill-mask",
        "BertForNextSentencePrediction": "next-sentence-prediction",
        "BertForSequenceClassification": "text-classification",
        "BertForTokenClassification": "token-classification",
        "BertForQuestionAnswering": "question-answering",
    },
    tasks=tuple(HEADS),
    config=config_from_source,
    build=Bert,
    rename=rename,
    tied_to=tied_to,
    convert=lambda name, stored, config: stored,
    graphs=graphs,
    axes=axes,
)
