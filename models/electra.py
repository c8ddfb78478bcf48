"""ELECTRA (Clark et al., 2020, arXiv:2003.10555): BERT's encoder behind embeddings of their own size, and its heads.

Shape letters as in attention.py; V vocabulary, L labels, W size of the embeddings.

The discriminator of the paper (ElectraForPreTraining) is exported for token-classification, with the labels "original"
and "replaced". transformers gives one logit z per token; ours are the two logits 0 and z, since softmax over them is
1 - sigmoid(z) and sigmoid(z). Everything that reads a label per token reads the discriminator, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.models import bert
from transom.models.attention import key_mask
from transom.models.family import Family, Source, config_fields, label_count
from transom.models.layers import ACTIVATIONS, Dense, SentencePooling
from transom.runtime.errors import CheckpointError


@dataclass(frozen=True)
class ElectraConfig(bert.BertConfig):
    """ELECTRA-small by default; names as in transformers' config.json."""

    embedding_size: int = 128
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    pooler: bool = False  # no checkpoint has one
    discriminator: bool = False  # the labels of tokens are the discriminator's


class GeneratorPredictions(Dense):
    """Dense, GELU whatever ``hidden_act`` is, LayerNorm: (B, S, E) -> (B, S, W)."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config.hidden_size, config.embedding_size, "gelu")
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(super().forward(x))  # type: ignore[no-any-return]


class DiscriminatorPredictions(Dense):
    """Dense, activation, and the logits of "original", which is 0, and "replaced": (B, S, E) -> (B, S, 2)."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config.hidden_size, config.hidden_size, config.hidden_act)
        self.dense_prediction = nn.Linear(config.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_prediction(super().forward(x))  # type: ignore[no-any-return]


class ClassificationHead(Dense):
    """Dense, GELU whatever ``hidden_act`` is, and the labels, all of the first token: (B, S, E) -> (B, L)."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config.hidden_size, config.hidden_size, "gelu")
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(super().forward(x[:, 0]))  # type: ignore[no-any-return]


class Electra(nn.Module):
    """The encoder and the head of one task.

    ``forward(input_ids, attention_mask, token_type_ids)``, all int64 (B, S), returns the outputs of ``bert.graphs`` in
    order: the head's, then ``last_hidden_state`` (B, S, E) and ``sentence_embedding`` (B, E).
    """

    def __init__(self, config: ElectraConfig, task: str) -> None:
        super().__init__()
        E, W, V = config.hidden_size, config.embedding_size, config.vocab_size
        self.task, self.discriminator = task, config.discriminator
        self.embeddings = bert.Embeddings(replace(config, hidden_size=W))
        self.embeddings_project = None if W == E else nn.Linear(W, E)
        self.encoder = bert.Encoder(config)
        self.sentence_pooling = SentencePooling(config.pooling, config.normalize)
        match task:
            case "fill-mask":
                self.generator_predictions = GeneratorPredictions(config)
                stored = {} if config.tie_word_embeddings else {"weight": torch.zeros(V, W)}
                self.generator_lm_head = nn.ParameterDict({"bias": torch.zeros(V), **stored})
            case "text-classification":
                self.classifier: nn.Module = ClassificationHead(config)
            case "token-classification" if config.discriminator:
                self.discriminator_predictions = DiscriminatorPredictions(config)
            case "token-classification":
                self.classifier = nn.Linear(E, config.num_labels)
            case "question-answering":
                self.qa_outputs = nn.Linear(E, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embeddings(input_ids, token_type_ids)  # (B, S, W)
        if self.embeddings_project is not None:
            x = self.embeddings_project(x)
        x = self.encoder(x, key_mask(attention_mask))  # (B, S, E)
        return (*self.head(x), x, self.sentence_pooling(x, attention_mask))

    def head(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the task's own outputs of the last hidden state (B, S, E)."""
        match self.task:
            case "fill-mask":
                words, head = self.embeddings.word_embeddings.weight, self.generator_lm_head
                return (F.linear(self.generator_predictions(x), head.get("weight", words), head["bias"]),)
            case "text-classification":
                return (self.classifier(x),)
            case "token-classification":
                return (self.discriminator_predictions(x) if self.discriminator else self.classifier(x),)
            case "question-answering":
                start, end = self.qa_outputs(x).unbind(-1)
                return start, end
            case _:
                return ()


DISCRIMINATOR = "discriminator_predictions."
# Tasks of ELECTRA, and what each one's head is called in a checkpoint.
HEADS = {
    "feature-extraction": (),
    "fill-mask": ("generator_predictions.", "generator_lm_head."),
    "text-classification": ("classifier.",),
    "token-classification": ("classifier.",),
    "question-answering": ("qa_outputs.",),
}
ALL_HEADS = ("generator_predictions.", "generator_lm_head.", "classifier.", "qa_outputs.", DISCRIMINATOR)
TIED = "generator_lm_head.weight"


def rename(name: str, config: ElectraConfig, task: str) -> str | None:
    """Turn a stored name into the module's, which is the same but for prefixes; None for what ``task`` does not use."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name.removeprefix("electra."))  # converted from TensorFlow
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    if name == "embeddings.position_ids" or (name == TIED and config.tie_word_embeddings):
        return None
    used = (DISCRIMINATOR,) if config.discriminator else HEADS[task]
    other = name.startswith(("sequence_summary.", *ALL_HEADS)) and not name.startswith(used)
    return None if other else name


def tied_to(name: str, config: ElectraConfig, task: str) -> str | None:
    """Name the embedding, which the weight of a tied generator's head repeats."""
    tied = name == TIED and task == "fill-mask" and config.tie_word_embeddings
    return "embeddings.word_embeddings.weight" if tied else None


def convert(name: str, stored: Tensor, config: ElectraConfig) -> Tensor:
    """Put the logit 0 of "original" before the one that the discriminator stores; return other tensors as they are."""
    if name.startswith(f"{DISCRIMINATOR}dense_prediction.") and stored.shape[:1] == (1,):
        return torch.cat((torch.zeros_like(stored), stored))  # weight (2, E), bias (2,)
    return stored


SIZES = {
    **bert.SIZES,
    "embedding_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
OTHERS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True}


def config_from_source(source: Source) -> ElectraConfig:
    """Read config.json; refuse what this definition would compute differently."""
    config_json = source.config_json
    fields = config_fields(config_json, SIZES, OTHERS, ACTIVATIONS)
    positions = config_json.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise CheckpointError(
            f"config.json: position_embedding_type is {positions!r}, which adds positions inside attention; ELECTRA is "
            "defined with 'absolute'. Use a checkpoint that was trained so."
        )
    for name in ("is_decoder", "add_cross_attention"):
        if config_json.get(name):
            raise CheckpointError(
                f"config.json: {name} is set, with which attention differs; ELECTRA is defined as an encoder. Use a "
                "checkpoint of an encoder, or a GPT-2 to generate."
            )
    discriminator = reads_discriminator(source)
    return ElectraConfig(
        **fields,
        num_labels=2 if discriminator else label_count(config_json),
        pooling=source.pooling.get("mode", "mean"),
        normalize=source.pooling.get("normalize", False),
        discriminator=discriminator,
    )


def reads_discriminator(source: Source) -> bool:
    """Tell whether the labels of tokens are the discriminator's: by the architecture, else by the only head stored."""
    if source.task != "token-classification":
        return False
    if source.config_json.get("architectures") == ["ElectraForPreTraining"]:
        return True
    stored = {prefix for prefix in (DISCRIMINATOR, "classifier.") for name in source.names if name.startswith(prefix)}
    return stored == {DISCRIMINATOR}


FAMILY = Family(
    name="electra",
    model_types=("electra",),
    prefix="electra.",
    unprefixed_heads=ALL_HEADS,
    architectures={
        "ElectraModel": "feature-extraction",
        "ElectraForPreTraining": "token-classification",
        "ElectraForMaskedLM": "fill-mask",
        "ElectraForSequenceClassification": "text-classification",
        "ElectraForTokenClassification": "token-classification",
        "ElectraForQuestionAnswering": "question-answering",
    },
    tasks=tuple(HEADS),
    config=config_from_source,
    build=Electra,
    rename=rename,
    tied_to=tied_to,
    convert=convert,
    graphs=bert.graphs,
    axes=bert.axes,
    labels=lambda config: ("original", "replaced") if config.discriminator else (),
)
