"""The operations of the hub's tasks: text or an image in; a vector, labels or text out.

One for each task that a family's bundle can be exported for, by the task's name alone: a new family of a known task is
served without a line here. Parameters are the keywords of the bundle's method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from transom.runtime.errors import InputError
from transom.runtime.generation import GenerationConfig, with_keywords
from transom.runtime.generation.field_specs import FieldSpec, boolean, integer
from transom.runtime.generation.validation import KEYWORDS
from transom.runtime.serving.operation import Operation, Parameters, Row
from transom.runtime.serving.ports import BYTES, Port
from transom.runtime.tasks.generator_task import has_tokenizer, trim, writes_text
from transom.runtime.tasks.image_bundle import ImageBundle
from transom.runtime.tasks.task import ranked_json

MOST = 65_536  # answers or tokens that a parameter may ask for
TEXT, PAIR = Port("text", BYTES, text=True), Port("pair", BYTES, text=True, optional=True)
IMAGE = Port("image", BYTES)
IDS = Port("input_ids", "int64", (None,))
LABELS = Port("label", BYTES, (None,), text=True), Port("score", "float32", (None,))
TOP_K = {"top_k": integer(1, MOST)}
TRUNCATE = {"truncate": boolean()}


def task_operation(bundle: Any) -> Operation:
    """Return the operation of the task that a loaded bundle was exported for.

    Raises InputError where it has none: its tensors are served, as ``tensors.graph_operation`` does.
    """
    task = bundle.manifest.task
    make = OPERATIONS.get(task)
    if make is None:
        raise InputError(f"a {bundle.manifest.family} bundle for {task} takes tensors only; serve those.")
    if isinstance(bundle, ImageBundle):
        bundle.preprocess()  # raises where it takes pixel_values alone
    elif make not in (continued, questions) and not writes_text(bundle):  # these two have a form with ids
        raise InputError("this bundle has no tokenizer, since its checkpoint had none; serve its tensors.")
    return make(bundle)


def embedding(bundle: Any) -> Operation:
    vectors = (Port("embedding", "float32", (None,)),)
    images = isinstance(bundle, ImageBundle)
    if images:
        return Operation((IMAGE,), vectors, lambda rows, keywords: single(bundle.features(first(rows))))
    return Operation((TEXT,), vectors, lambda rows, keywords: single(bundle.embed(first(rows))))


def text_labels(bundle: Any) -> Operation:
    def answer(rows: Sequence[Row], keywords: Parameters) -> list[Row]:
        texts, pairs = zip(*rows, strict=True)
        return ranked(bundle.classify(list(texts), None if pairs[0] is None else list(pairs), **keywords))

    return Operation((TEXT, PAIR), LABELS, answer, TOP_K | TRUNCATE, key=lambda row: row[1] is None)


def image_labels(bundle: Any) -> Operation:
    return Operation((IMAGE,), LABELS, lambda rows, keywords: ranked(bundle.classify(first(rows), **keywords)), TOP_K)


def zero_shot(bundle: Any) -> Operation:
    inputs = (
        IMAGE,
        Port("candidate_label", BYTES, (None,), text=True),
        Port("template", BYTES, (None,), text=True, optional=True),
    )

    def answer(rows: Sequence[Row], keywords: Parameters) -> list[Row]:
        _, labels, templates = rows[0]
        return ranked(bundle.zero_shot(first(rows), labels, templates=templates, **keywords))

    return Operation(inputs, LABELS, answer, TOP_K | TRUNCATE, key=lambda row: json.dumps(row[1:]))


def masked_tokens(bundle: Any) -> Operation:
    def answer(texts: list[str], keywords: Parameters) -> list[Any]:
        found = [bundle.fill_mask(text, **keywords) for text in texts]
        masks = [words if isinstance(words[0], list) else [words] for words in found]  # a text may have several
        return [[ranked_json("token", words) for words in of_text] for of_text in masks]

    return of_json("mask", answer, TOP_K | TRUNCATE)


def tags(bundle: Any) -> Operation:
    def answer(texts: list[str], keywords: Parameters) -> list[Any]:
        return [[entity._asdict() for entity in found] for found in bundle.tag(texts, **keywords)]

    return of_json("entity", answer, TRUNCATE)


def spans(bundle: Any) -> Operation:
    def answer(rows: Sequence[Row], keywords: Parameters) -> list[Row]:
        found = bundle.answer(*map(list, zip(*rows, strict=True)), **keywords)
        return [(json.dumps([span._asdict() for span in answers]),) for answers in found]

    inputs = Port("question", BYTES, text=True), Port("context", BYTES, text=True)
    parameters = {**TOP_K, "max_tokens": integer(1, MOST)}
    return Operation(inputs, (Port("answer", BYTES, text=True),), answer, parameters)


def following(bundle: Any) -> Operation:
    def answer(rows: Sequence[Row], keywords: Parameters) -> list[Row]:
        return single(bundle.next_sentence(*map(list, zip(*rows, strict=True)), **keywords))

    inputs = TEXT, Port("following", BYTES, text=True)
    return Operation(inputs, (Port("probability", "float32"),), answer, TRUNCATE)


def continued(bundle: Any) -> Operation:
    """Return the operation of new text after prompts, or of translations: ids in and out where no tokenizer is."""
    text = has_tokenizer(bundle)

    def prompt(row: Row) -> Any:
        return row[0] if text else row[0].tolist()

    def answers(rows: Sequence[Row], keywords: Parameters) -> Any:
        return bundle.generate([prompt(row) for row in rows], **keywords)

    return generated(bundle, (TEXT if text else IDS,), answers, prompt)


def captions(bundle: Any) -> Operation:
    return generated(
        bundle, (IMAGE,), lambda rows, keywords: bundle.generate(first(rows), **keywords), lambda row: row[0]
    )


def questions(bundle: Any) -> Operation:
    """Return the operation of questions about images, or of captions where a request has no text."""
    images = Port("image", BYTES, (None,), optional=True)
    if not has_tokenizer(bundle):

        def placed(row: Row) -> Any:
            return bundle.reader().placed(row[0].tolist(), row[1] or [])

        return generated(
            bundle,
            (IDS, images),
            lambda rows, keywords: bundle.generate([placed(row) for row in rows], **keywords),
            placed,
        )

    def parts(row: Row) -> Any:
        text, files = row[0], row[1] or []
        if text is None:
            if len(files) != 1:
                raise InputError(f"{len(files)} images were given without a text; expected one, or a question.")
            return bundle.caption_parts(files[0])
        placed = bundle.reader().placed(text, files) if bundle.reader().word() in text else [*files, text]
        return bundle.question_parts(placed)

    def answer(rows: Sequence[Row], keywords: Parameters) -> list[Any]:
        found = bundle.generate([parts(row) for row in rows], **keywords)
        return [[text.strip() for text in each] if isinstance(each, list) else each.strip() for each in found]

    text = Port("text", BYTES, text=True, optional=True)
    return generated(bundle, (text, images), answer, parts, trimmed=True)


OPERATIONS: Mapping[str, Callable[[Any], Operation]] = {
    "feature-extraction": embedding,
    "text-classification": text_labels,
    "image-classification": image_labels,
    "zero-shot-image-classification": zero_shot,
    "fill-mask": masked_tokens,
    "token-classification": tags,
    "question-answering": spans,
    "next-sentence-prediction": following,
    "text-generation": continued,
    "translation": continued,
    "image-to-text": captions,
    "image-text-to-text": questions,
}


def generated(
    bundle: Any,
    inputs: tuple[Port, ...],
    answers: Callable[[Sequence[Row], Parameters], Sequence[Any]],
    prompt: Callable[[Row], Any],
    *,
    trimmed: bool = False,
) -> Operation:
    """Return the operation of a bundle that generates; ``prompt`` is what ``stream`` takes of a row.

    ``trimmed`` leaves out blanks around a streamed text.
    """
    stored = GenerationConfig.from_json(bundle.manifest.generation or {})
    text = writes_text(bundle)

    def answer(rows: Sequence[Row], keywords: Parameters) -> list[Row]:
        found = answers(rows, keywords)
        several = with_keywords(stored, **keywords).num_return_sequences > 1
        return single(found if several else [[each] for each in found])

    def stream(row: Row, keywords: Parameters) -> Generator[Row, None, None]:
        return pieces(bundle.stream(prompt(row), **keywords))  # which checks everything before the first piece

    def pieces(stream: Any) -> Generator[Row, None, None]:
        try:
            for piece in trim(stream) if trimmed else stream:
                if piece != "":
                    yield ([piece] if text else [[piece]],)
        finally:
            stream.close()  # frees its cache where the caller leaves early

    made = Port("generated_text", BYTES, (None,), text=True) if text else Port("generated_ids", "int64", (None, None))
    return Operation(
        inputs, (made,), answer, KEYWORDS, stream, alone=lambda keywords: with_keywords(stored, **keywords).do_sample
    )


def of_json(
    name: str, answer: Callable[[list[str], Parameters], list[Any]], parameters: Mapping[str, FieldSpec]
) -> Operation:
    """Return an operation of texts whose answers are JSON: lists of any length, of objects."""
    return Operation(
        (TEXT,),
        (Port(name, BYTES, text=True),),
        lambda rows, keywords: [(json.dumps(found),) for found in answer(first(rows), keywords)],
        parameters,
    )


def first(rows: Sequence[Row]) -> list[Any]:
    """Return the first value of each row."""
    return [row[0] for row in rows]


def single(answers: Sequence[Any]) -> list[Row]:
    """Return answers of one output as rows."""
    return [(answer,) for answer in answers]


def ranked(answers: Sequence[Sequence[tuple[str, float]]]) -> list[Row]:
    """Return ranked labels as rows of two outputs: the labels, and their scores."""
    return [tuple(map(list, zip(*answer, strict=True))) for answer in answers]
