"""What ``transom run`` asks of a bundle, task by task: INPUTs in, results as plain data and as lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import typer

from transom.cli.arrays import first_numbers
from transom.cli.generate import generate, generated_lines

Result = Mapping[str, Any]
TOP_K = 5  # answers shown where several are usual


@dataclass(frozen=True)
class Wishes:
    """The options that a task may or may not heed."""

    top_k: int | None
    truncate: bool
    keywords: Mapping[str, Any] = field(default_factory=dict)  # of generation
    score: bool = False
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()


@dataclass(frozen=True)
class Task:
    """One row of TASKS.

    ask        bundle, INPUTs, options -> one result per INPUT, or one for the pair of them
    lines      results -> what a person reads
    example    INPUTs to try, as typed after `transom run BUNDLE`
    ranks      whether ``--top-k`` means something
    generates  whether it takes the options of generation
    scores     whether it takes ``--score``
    array      the result's key that holds a vector, for ``--out``
    labelled   whether it chooses among ``--label``
    pair       what the two INPUTs are, where the task takes exactly two
    """

    ask: Callable[[Any, Sequence[str], Wishes], list[Result]]
    lines: Callable[[Sequence[Result]], Iterator[str]]
    example: str
    ranks: bool = False
    generates: bool = False
    scores: bool = False
    array: str | None = None
    labelled: bool = False
    pair: str | None = None

    @property
    def whole(self) -> bool:
        """Whether stdin is one text: a half of a pair, or a prompt, both of which may have many lines."""
        return self.pair is not None or self.scores


def embed(bundle: Any, texts: Sequence[str], wishes: Wishes) -> list[Result]:
    vectors = bundle.embed(list(texts))  # always truncates, as sentence-transformers does
    return [{"text": text, "embedding": vector} for text, vector in zip(texts, vectors, strict=True)]


def features(bundle: Any, images: Sequence[str], wishes: Wishes) -> list[Result]:
    vectors = bundle.features(list(images))
    return [{"image": image, "features": vector} for image, vector in zip(images, vectors, strict=True)]


def fill_mask(bundle: Any, texts: Sequence[str], wishes: Wishes) -> list[Result]:
    results: list[Result] = []
    for text in texts:
        found = bundle.fill_mask(text, top_k=wishes.top_k or TOP_K, truncate=wishes.truncate)
        masks = found if found and isinstance(found[0], list) else [found]
        results.append({"text": text, "masks": [pairs("token", ranked) for ranked in masks]})
    return results


def classify_texts(bundle: Any, texts: Sequence[str], wishes: Wishes) -> list[Result]:
    found = bundle.classify(list(texts), top_k=wishes.top_k, truncate=wishes.truncate)
    return [{"text": text, "labels": pairs("label", ranked)} for text, ranked in zip(texts, found, strict=True)]


def classify_images(bundle: Any, images: Sequence[str], wishes: Wishes) -> list[Result]:
    found = bundle.classify(list(images), top_k=wishes.top_k or TOP_K)
    return [{"image": image, "labels": pairs("label", ranked)} for image, ranked in zip(images, found, strict=True)]


def zero_shot(bundle: Any, images: Sequence[str], wishes: Wishes) -> list[Result]:
    found = bundle.zero_shot(
        list(images),
        list(wishes.labels),
        templates=list(wishes.templates) or None,
        top_k=wishes.top_k,
        truncate=wishes.truncate,
    )
    return [{"image": image, "labels": pairs("label", ranked)} for image, ranked in zip(images, found, strict=True)]


def tag(bundle: Any, texts: Sequence[str], wishes: Wishes) -> list[Result]:
    found = bundle.tag(list(texts), truncate=wishes.truncate)
    return [
        {"text": text, "entities": [entity._asdict() for entity in entities]}
        for text, entities in zip(texts, found, strict=True)
    ]


def answer(bundle: Any, texts: Sequence[str], wishes: Wishes) -> list[Result]:
    question, context = texts
    found = bundle.answer(question, context, top_k=wishes.top_k or 1)  # reads a long context in windows
    return [{"question": question, "context": context, "answers": [each._asdict() for each in found]}]


def next_sentence(bundle: Any, texts: Sequence[str], wishes: Wishes) -> list[Result]:
    first, second = texts
    probability = bundle.next_sentence(first, second, truncate=wishes.truncate)
    return [{"first": first, "second": second, "probability": probability}]


def pairs(name: str, ranked: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{name: word, "probability": probability} for word, probability in ranked]


def vector_lines(result: Result) -> Iterator[str]:
    name, vector = list(result.items())[-1]
    norm = float((vector.astype("float64") ** 2).sum() ** 0.5)
    yield subject(result)
    yield f"  {name} {first_numbers(vector)}  {len(vector)} numbers, norm {norm:.4f}"


def mask_lines(result: Result) -> Iterator[str]:
    yield subject(result)
    for number, ranked in enumerate(result["masks"], start=1):
        if len(result["masks"]) > 1:
            yield f"  mask {number}"
        yield from ranked_lines("token", ranked)


def label_lines(result: Result) -> Iterator[str]:
    yield subject(result)
    yield from ranked_lines("label", result["labels"])


def entity_lines(result: Result) -> Iterator[str]:
    yield subject(result)
    for each in result["entities"]:
        yield f"  {each['probability']:.4f}  {each['label']}  {each['text']}  {each['start']}..{each['end']}"
    if not result["entities"]:
        yield "  nothing found"


def answer_lines(result: Result) -> Iterator[str]:
    yield subject(result)
    for each in result["answers"]:
        yield f"  {each['probability']:.4f}  {each['text']}  {each['start']}..{each['end']}"


def pair_lines(result: Result) -> Iterator[str]:
    yield f"{result['probability']:.4f} that the second text follows the first"


def each(lines: Callable[[Result], Iterator[str]]) -> Callable[[Sequence[Result]], Iterator[str]]:
    """The lines of results that are shown one by one."""
    return lambda results: (line for result in results for line in lines(result))


def subject(result: Result) -> str:
    """The INPUT that a result belongs to."""
    return str(next(iter(result.values())))


def ranked_lines(name: str, ranked: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in ranked:
        yield f"  {each['probability']:.4f}  {each[name]}"


TASKS = {  # (family, task) -> how it is asked
    ("bert", "feature-extraction"): Task(
        embed, each(vector_lines), array="embedding", example="'A sentence.' 'Another one.'"
    ),
    ("bert", "fill-mask"): Task(fill_mask, each(mask_lines), ranks=True, example="'The capital of France is [MASK].'"),
    ("bert", "text-classification"): Task(
        classify_texts, each(label_lines), ranks=True, example="'What a lovely day.'"
    ),
    ("bert", "token-classification"): Task(tag, each(entity_lines), example="'Ada Lovelace lived in London.'"),
    ("bert", "question-answering"): Task(
        answer,
        each(answer_lines),
        ranks=True,
        pair="QUESTION and CONTEXT",
        example="'Who wrote it?' 'Ada Lovelace wrote it in 1843.'",
    ),
    ("bert", "next-sentence-prediction"): Task(
        next_sentence,
        each(pair_lines),
        pair="two texts, A and B",
        example="'It began to rain.' 'She opened her umbrella.'",
    ),
    ("vit", "image-classification"): Task(classify_images, each(label_lines), ranks=True, example="photo.png"),
    ("vit", "feature-extraction"): Task(features, each(vector_lines), array="features", example="photo.png"),
    ("clip", "zero-shot-image-classification"): Task(
        zero_shot,
        each(label_lines),
        ranks=True,
        labelled=True,
        example="photo.png --label 'a photo of a cat' --label 'a photo of a dog'",
    ),
    ("gpt", "text-generation"): Task(
        generate, generated_lines, generates=True, scores=True, example="'It is a truth universally acknowledged'"
    ),
    ("transformer", "translation"): Task(generate, generated_lines, generates=True, example="'3 May 1921'"),
}


def task_of(family: str, task: str) -> Task:
    """The row of a bundle's task; a wrong call where there is none but raw arrays can still be run."""
    if (family, task) not in TASKS:
        raise typer.BadParameter(f"a {family} bundle for {task} takes arrays only; give one INPUT that ends in .npz.")
    return TASKS[family, task]
