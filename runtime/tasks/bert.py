"""Texts to vectors, labels, spans and filled gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.tasks.answers import Answer, Entity, Ranked, best, label_scores, many, ranked, softmax
from transom.runtime.tasks.spans import best_spans
from transom.runtime.tasks.texts import TextBundle, take

if TYPE_CHECKING:
    from tokenizers import Encoding

Floats = NDArray[np.float32]
DOC_STRIDE = 128  # tokens two neighbouring windows of a long context share, as in transformers' pipeline


class Bert(TextBundle):
    """A loaded BERT. Each method belongs to a task; one that the bundle was not exported for says so.

    Methods take one text or a list of them and answer in kind. A text longer than the bundle's S is
    an error, unless ``truncate``; only ``embed`` always truncates, as sentence-transformers does. A
    text without a single token (empty, blank) is an error.
    """

    GRAPHS: ClassVar = {"model": ("input_ids", "attention_mask")}

    def embed(self, texts: str | Sequence[str]) -> Floats:
        """One vector per text, pooled as the checkpoint says: float32 (E,) for one text, (N, E) for a list."""
        single, batch = many(texts)
        prompt = str(self.manifest.options.get("prompt", ""))
        prompted = [prompt + text if isinstance(text, str) else text for text in batch]
        vectors = self.text_rows(prompted, None, "sentence_embedding", truncate=True)
        return vectors[0] if single else vectors

    def classify(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        truncate: bool = False,
    ) -> Any:
        """``[(label, score), ...]`` per text, best first; all labels unless ``top_k``.

        Scores are probabilities (softmax), independent ones for a multi-label checkpoint (sigmoid), the
        plain number for a regression. ``pairs`` are second texts, one per text.
        """
        self.need_task("text-classification")
        single, batch = many(texts)
        seconds = None if pairs is None else many(pairs)[1]
        logits = self.text_rows(batch, seconds, "logits", truncate=truncate)
        scores = label_scores(logits, self.manifest.options.get("problem_type"))
        labels = self.labels(scores.shape[1])
        answers: list[Ranked] = [ranked(row, labels, len(labels) if top_k is None else top_k) for row in scores]
        return answers[0] if single else answers

    def next_sentence(self, text: str, following: str, *, truncate: bool = False) -> float:
        """The probability that ``following`` comes after ``text``."""
        self.need_task("next-sentence-prediction")
        logits = self.text_rows([text], [following], "logits", truncate=truncate)
        return float(softmax(logits)[0, 0])

    def fill_mask(self, text: str, *, top_k: int = 5, truncate: bool = False) -> Any:
        """``[(token, probability), ...]`` for the gap in ``text``; a list of such lists where it has several."""
        self.need_task("fill-mask")
        encoder = self.encoder()
        batch = encoder.encode([text], truncate=truncate)
        gaps = np.flatnonzero(batch.input_ids[0] == encoder.spec.mask_id)
        if encoder.spec.mask_id is None or not len(gaps):
            word = encoder.spec.mask_token or "mask token"
            raise InputError(f"the text has no {word}; put one where a word is missing.")
        probabilities = softmax(self.run_texts(batch, "logits")["logits"][0, gaps])
        answers = [
            [(encoder.decode([token], skip_special_tokens=False), float(row[token])) for token in best(row, top_k)]
            for row in probabilities
        ]
        return answers[0] if len(answers) == 1 else answers

    def tag(self, texts: str | Sequence[str], *, truncate: bool = False, ignore: Sequence[str] = ("O",)) -> Any:
        """The labelled tokens of each text, in order; labels in ``ignore`` are left out."""
        self.need_task("token-classification")
        single, batch = many(texts)
        answers = []
        for text in batch:
            encoded = self.encoder().encode([text], truncate=truncate)
            probabilities = softmax(self.run_texts(encoded, "logits")["logits"][0])
            found = entities(text, encoded.rows[0], probabilities, self.labels(probabilities.shape[1]))
            answers.append([entity for entity in found if entity.label not in ignore])
        return answers[0] if single else answers

    def answer(self, question: str, context: str, *, top_k: int = 1, max_tokens: int = 15) -> list[Answer]:
        """The ``top_k`` most probable spans of ``context``, at most ``max_tokens`` tokens long, best first.

        A long context is read in windows that share 128 tokens; probabilities are softmax over a
        window, start times end, as in transformers' question-answering pipeline.
        """
        self.need_task("question-answering")
        encoder = self.encoder()
        length = encoder.max_tokens
        windows = encoder.windows(question, context, max_length=length, stride=min(length // 2, DOC_STRIDE))
        found: list[Answer] = []
        for index, encoding in enumerate(windows.rows):
            outputs = self.run_texts(take(windows, [index]), "start_logits", "end_logits")
            starts, ends = outputs["start_logits"][0], outputs["end_logits"][0]
            found += best_spans(encoding, starts, ends, context, top_k, max_tokens)
        return sorted(found, key=lambda span: -span.probability)[:top_k]


def entities(text: str, encoding: Encoding, probabilities: Floats, labels: Sequence[str]) -> list[Entity]:
    """Each token that stands for characters of the text, with its most probable label."""
    found = []
    for position, (start, end) in enumerate(encoding.offsets):
        if encoding.special_tokens_mask[position] or start == end:
            continue
        label = int(probabilities[position].argmax())
        found.append(Entity(text[start:end], labels[label], float(probabilities[position, label]), start, end))
    return found
