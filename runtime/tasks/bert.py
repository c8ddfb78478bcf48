"""Tasks of BERT: embeddings, labels, answers and masked tokens of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.finite import check_finite
from transom.runtime.numeric import softmax
from transom.runtime.tasks.postprocess import Answer, Entity, Ranked, as_list, best, best_spans, label_scores, ranked
from transom.runtime.tasks.task import (
    TOP_K,
    FamilyTasks,
    Result,
    RunOptions,
    Task,
    each,
    label_lines,
    ranked_json,
    ranked_lines,
    subject,
    vector_lines,
)
from transom.runtime.tasks.text_bundle import TEXT, TextBundle, take

if TYPE_CHECKING:
    from tokenizers import Encoding

    from transom.runtime.text.batch import EncodedBatch

Floats = NDArray[np.float32]


class TextHeads(TextBundle):
    """The tasks that heads on texts answer. Each method belongs to one; InputError where the bundle has another.

    Methods take one text or a list of them: a list gets a list. A text longer than the bundle's S is an error, unless
    ``truncate``. A text without a single token (empty, blank) is an error.
    """

    GRAPHS: ClassVar = {"model": ("input_ids", "attention_mask")}

    def classify(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        truncate: bool = False,
    ) -> Any:
        """Return ``[(label, score), ...]`` per text, best first; all labels unless ``top_k``.

        Scores are probabilities (softmax), independent ones for a multi-label checkpoint (sigmoid), the
        plain number for a regression. ``pairs`` are second texts, one per text.
        """
        self.need_task("text-classification")
        single, batch = as_list(texts)
        seconds = None if pairs is None else as_list(pairs)[1]
        answers: list[Ranked] = [[]] * len(batch)
        for places, logits in self.text_batches(batch, seconds, "logits", truncate=truncate):
            scores = label_scores(logits, self.manifest.options.get("problem_type"))
            labels = self.labels(scores.shape[1])
            for place, row in zip(places, scores, strict=True):
                answers[place] = ranked(row, labels, len(labels) if top_k is None else top_k)
        return answers[0] if single else answers

    def next_sentence(
        self, text: str | Sequence[str], following: str | Sequence[str], *, truncate: bool = False
    ) -> Any:
        """Return the probability that ``following`` follows ``text``; for lists of equal length a list of them."""
        self.need_task("next-sentence-prediction")
        single, batch = as_list(text)
        answers = [0.0] * len(batch)
        for places, logits in self.text_batches(batch, as_list(following)[1], "logits", truncate=truncate):
            for place, row in zip(places, softmax(logits), strict=True):
                answers[place] = float(row[0])
        return answers[0] if single else answers

    def fill_mask(self, text: str | Sequence[str], *, top_k: int = 5, truncate: bool = False) -> Any:
        """Return ``[(token, probability), ...]`` per text for its mask token; a list of those where it has several.

        Nested as in transformers' pipeline, except that a list of one text gets a list of one answer.
        """
        self.need_task("fill-mask")
        encoder = self.tokenizer()
        mask_id = encoder.spec.mask_id
        single, batch = as_list(text)
        answers: list[Any] = []
        for place, row in enumerate(self._encodings(batch, truncate=truncate)):
            masks = [position for position, token in enumerate(row.ids) if token == mask_id]
            if not masks:
                word = encoder.spec.mask_token or "mask token"
                raise InputError(f"{TEXT(place)} has no {word}; put one where a word is missing.")
            (logits,) = self._read(encoder.padded([row]), TEXT(place), "logits", positions=masks)
            found = [self._words(of_mask, top_k) for of_mask in softmax(logits)]
            answers.append(found[0] if len(masks) == 1 else found)
        return answers[0] if single else answers

    def tag(self, texts: str | Sequence[str], *, truncate: bool = False, ignore: Sequence[str] = ("O",)) -> Any:
        """Return the labelled tokens of each text, in order; labels in ``ignore`` are left out."""
        self.need_task("token-classification")
        single, batch = as_list(texts)
        answers = []
        for place, row in enumerate(self._encodings(batch, truncate=truncate)):
            (logits,) = self._read(self.tokenizer().padded([row]), TEXT(place), "logits")
            probabilities = softmax(logits)
            found = entities(batch[place], row, probabilities, self.labels(probabilities.shape[1]))
            answers.append([entity for entity in found if entity.label not in ignore])
        return answers[0] if single else answers

    def answer(
        self, question: str | Sequence[str], context: str | Sequence[str], *, top_k: int = 1, max_tokens: int = 15
    ) -> Any:
        """Return the ``top_k`` most probable spans of ``context``, at most ``max_tokens`` tokens long, best first.

        ``[Answer, ...]``; for lists of equal length a list of those, where a single question or context is used for
        each of the others. A long context is read in windows that share 128 tokens, half a row where S is below 256;
        probabilities are softmax over a window, start times end, as in transformers' question-answering pipeline.
        InputError for a question so long that there is no room for the context, with what would do.
        """
        self.need_task("question-answering")
        asked, given = as_list(question), as_list(context)
        count = max(len(asked[1]), len(given[1]))
        questions, contexts = (each * count if single else each for single, each in (asked, given))
        for what, texts in (("questions", questions), ("contexts", contexts)):
            if not texts:
                raise InputError(f"{what} is empty; give at least one.")
        if len(questions) != len(contexts):
            raise InputError(
                f"{len(questions)} questions and {len(contexts)} contexts; expected as many of each, or one of either."
            )
        if asked[0] and given[0]:
            return self._spans(question, context, "", top_k, max_tokens)
        pairs = zip(questions, contexts, strict=True)
        return [self._spans(*pair, f" {place}", top_k, max_tokens) for place, pair in enumerate(pairs)]

    def _spans(self, question: Any, context: Any, place: str, top_k: int, max_tokens: int) -> list[Answer]:
        """Return the answers to one question; ``place`` numbers it in errors."""
        windows = self.tokenizer().windows(question, context, place=place)
        found: list[Answer] = []
        for index, encoding in enumerate(windows.rows):
            starts, ends = self._read(take(windows, [index]), f"question{place}", "start_logits", "end_logits")
            found += best_spans(encoding, starts, ends, context, top_k, max_tokens)
        return sorted(found, key=lambda span: -span.probability)[:top_k]

    def _words(self, probabilities: Floats, top_k: int) -> Ranked:
        """Return the ``top_k`` most probable tokens of (V,), as text."""
        decode, chosen = self.tokenizer().decode, best(probabilities, top_k)
        return [(decode([token], skip_special_tokens=False), float(probabilities[token])) for token in chosen]

    def _encodings(self, texts: Sequence[str], *, truncate: bool) -> Iterator[Encoding]:
        """Encode the texts one by one, for tasks whose results are per token."""
        encoder = self.tokenizer()
        encoder.check(texts)
        for place, text in enumerate(texts):
            yield encoder.row(text, truncate=truncate, name=TEXT(place))

    def _read(
        self, row: EncodedBatch, name: str, *outputs: str, positions: Sequence[int] | slice = slice(None)
    ) -> list[Floats]:
        """Compute ``outputs`` of one row at ``positions``, (S, ...) each; NotFiniteError calls the row ``name``."""
        found = self.run_texts(row, *outputs)
        values = [found[output][0, positions] for output in outputs]
        for output, array in zip(outputs, values, strict=True):
            check_finite(array, output, lambda _: name)
        return values


class Bert(TextHeads):
    """A loaded BERT: the tasks of its head, and embeddings."""

    def embed(self, texts: str | Sequence[str]) -> Floats:
        """Return a vector per text, pooled as the checkpoint defines: float32 (E,) for one text, (N, E) for a list.

        A text longer than the bundle's S is always truncated, as sentence-transformers does.
        """
        single, batch = as_list(texts)
        prompt = str(self.manifest.options.get("prompt", ""))
        vectors = self.text_rows(batch, "sentence_embedding", truncate=True, prefix=prompt)
        return vectors[0] if single else vectors


def entities(text: str, encoding: Encoding, probabilities: Floats, labels: Sequence[str]) -> list[Entity]:
    """Return each token that covers characters of the text, with its most probable label."""
    found = []
    for position, (start, end) in enumerate(encoding.offsets):
        if encoding.special_tokens_mask[position] or start == end:
            continue
        label = int(probabilities[position].argmax())
        found.append(Entity(text[start:end], labels[label], float(probabilities[position, label]), start, end))
    return found


def ask_embed(bundle: Bert, texts: Sequence[str], options: RunOptions) -> list[Result]:
    vectors = bundle.embed(list(texts))  # always truncates, as sentence-transformers does
    return [{"text": text, "embedding": vector} for text, vector in zip(texts, vectors, strict=True)]


def ask_fill_mask(bundle: TextHeads, texts: Sequence[str], options: RunOptions) -> list[Result]:
    results: list[Result] = []
    for text in texts:
        found = bundle.fill_mask(text, top_k=options.top_k or TOP_K, truncate=options.truncate)
        masks = found if found and isinstance(found[0], list) else [found]
        results.append({"text": text, "masks": [ranked_json("token", ranked) for ranked in masks]})
    return results


def ask_classify(bundle: TextHeads, texts: Sequence[str], options: RunOptions) -> list[Result]:
    found = bundle.classify(list(texts), top_k=options.top_k, truncate=options.truncate)
    return [{"text": text, "labels": ranked_json("label", ranked)} for text, ranked in zip(texts, found, strict=True)]


def ask_tag(bundle: TextHeads, texts: Sequence[str], options: RunOptions) -> list[Result]:
    found = bundle.tag(list(texts), truncate=options.truncate)
    return [
        {"text": text, "entities": [entity._asdict() for entity in entities]}
        for text, entities in zip(texts, found, strict=True)
    ]


def ask_answer(bundle: TextHeads, texts: Sequence[str], options: RunOptions) -> list[Result]:
    question, context = texts
    found = bundle.answer(question, context, top_k=options.top_k or 1)  # reads a long context in windows
    return [{"question": question, "context": context, "answers": [answer._asdict() for answer in found]}]


def ask_next_sentence(bundle: TextHeads, texts: Sequence[str], options: RunOptions) -> list[Result]:
    first, second = texts
    probability = bundle.next_sentence(first, second, truncate=options.truncate)
    return [{"first": first, "second": second, "probability": probability}]


def mask_lines(result: Result) -> Iterator[str]:
    yield subject(result)
    for number, tokens in enumerate(result["masks"], start=1):
        if len(result["masks"]) > 1:
            yield f"  mask {number}"
        yield from ranked_lines("token", tokens)


def entity_lines(result: Result) -> Iterator[str]:
    yield subject(result)
    for entity in result["entities"]:
        yield f"  {entity['probability']:.4f}  {entity['label']}  {entity['text']}  {entity['start']}..{entity['end']}"
    if not result["entities"]:
        yield "  nothing found"


def answer_lines(result: Result) -> Iterator[str]:
    yield subject(result)
    for answer in result["answers"]:
        yield f"  {answer['probability']:.4f}  {answer['text']}  {answer['start']}..{answer['end']}"


def pair_lines(result: Result) -> Iterator[str]:
    yield f"{result['probability']:.4f} that the second text follows the first"


FAMILY = FamilyTasks(
    Bert,
    {
        "feature-extraction": Task(
            ask_embed, each(vector_lines), array="embedding", example="'A sentence.' 'Another one.'"
        ),
        "fill-mask": Task(ask_fill_mask, each(mask_lines), ranks=True, example="'The capital of France is [MASK].'"),
        "text-classification": Task(ask_classify, each(label_lines), ranks=True, example="'What a lovely day.'"),
        "token-classification": Task(ask_tag, each(entity_lines), example="'Ada Lovelace lived in London.'"),
        "question-answering": Task(
            ask_answer,
            each(answer_lines),
            ranks=True,
            pair="QUESTION and CONTEXT",
            example="'Who wrote it?' 'Ada Lovelace wrote it in 1843.'",
        ),
        "next-sentence-prediction": Task(
            ask_next_sentence,
            each(pair_lines),
            pair="two texts, A and B",
            example="'It began to rain.' 'She opened her umbrella.'",
        ),
    },
)
