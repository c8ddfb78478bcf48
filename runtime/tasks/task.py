"""Describe what a family's bundles can be asked for: by name, with options, with an answer that prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transom.runtime.session import LoadedBundle

Result = Mapping[str, Any]
TOP_K = 5  # answers shown where several are usual
FIRST_NUMBERS = 5  # of a vector, shown


@dataclass(frozen=True)
class RunOptions:
    """The options of `transom run` that a task may or may not use."""

    top_k: int | None
    truncate: bool
    keywords: Mapping[str, Any] = field(default_factory=dict)  # of generation
    score: bool = False
    labels: Sequence[str] = ()
    templates: Sequence[str] = ()
    images: Sequence[str] = ()


@dataclass(frozen=True)
class Task:
    """One task of a family.

    ask        bundle, INPUTs, options -> one result per INPUT, or one for the pair of them
    lines      results -> what a person reads
    example    INPUTs to try, as typed after `transom run BUNDLE`
    ranks      whether ``--top-k`` means something
    generates  whether it takes the options of generation
    prompt     of a task that generates: bundle, INPUT, options -> what ``stream`` takes
    scores     whether it takes ``--score``
    array      the result's key that holds a vector, for ``--out``
    labelled   whether it chooses among ``--label``
    pair       what the two INPUTs are, where the task takes exactly two
    asks       whether INPUTs may be questions about the files of ``--image``; blanks around an answer are not printed
    """

    ask: Callable[[Any, Sequence[str], RunOptions], list[Result]]
    lines: Callable[[Sequence[Result]], Iterator[str]]
    example: str
    ranks: bool = False
    generates: bool = False
    prompt: Callable[[Any, str, RunOptions], Any] | None = None
    scores: bool = False
    array: str | None = None
    labelled: bool = False
    pair: str | None = None
    asks: bool = False

    @property
    def whole(self) -> bool:
        """True where stdin is one text: one of a pair, or a prompt, both of which may have many lines."""
        return self.pair is not None or self.scores


@dataclass(frozen=True)
class FamilyTasks:
    """The class that loads bundles of a family, and their tasks by the hub's names.

    ``by_task`` has the class of a task that takes other inputs, for families of both texts and images.
    """

    bundle: type[LoadedBundle]
    tasks: Mapping[str, Task]
    by_task: Mapping[str, type[LoadedBundle]] = field(default_factory=dict)


def ranked_json(name: str, ranked: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return ``(word, probability)`` pairs as objects whose word is called ``name``."""
    return [{name: word, "probability": probability} for word, probability in ranked]


def each(lines: Callable[[Result], Iterator[str]]) -> Callable[[Sequence[Result]], Iterator[str]]:
    """Return what prints results one by one, from what prints one of them."""
    return lambda results: (line for result in results for line in lines(result))


def subject(result: Result) -> str:
    """Return the INPUT that a result belongs to."""
    return str(next(iter(result.values())))


def label_lines(result: Result) -> Iterator[str]:
    """Yield the INPUT and its labels, the most probable first."""
    yield subject(result)
    yield from ranked_lines("label", result["labels"])


def ranked_lines(name: str, ranked: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield one line per answer: its probability, then the word called ``name``."""
    for answer in ranked:
        yield f"  {answer['probability']:.4f}  {answer[name]}"


def vector_lines(result: Result) -> Iterator[str]:
    """Yield the INPUT, and of its vector the first numbers, the size and the norm."""
    name, vector = list(result.items())[-1]
    norm = float((vector.astype("float64") ** 2).sum() ** 0.5)
    yield subject(result)
    yield f"  {name} {first_numbers(vector)}  {len(vector)} numbers, norm {norm:.4f}"


def first_numbers(vector: Any, count: int = FIRST_NUMBERS) -> str:
    """Return the first numbers of an array (n,) as text."""
    shown = " ".join(f"{value:.4f}" for value in vector[:count])
    return f"{shown} ..." if len(vector) > count else shown
