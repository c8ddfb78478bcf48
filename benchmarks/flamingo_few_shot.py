"""Ask a bundle of the reference Flamingo the held-out questions, with 0, 1, 2 and 4 examples before each.

    python benchmarks/flamingo_few_shot.py bundles/flamingo             print the tables
    python benchmarks/flamingo_few_shot.py bundles/flamingo --write     ... and renew docs/results/flamingo_few_shot.md

The examples are images of scans that train, each with a question of the same kind and its answer. Everything is asked
twice: as ``answer`` does, and with no question said, neither in the examples nor at the end, so that only the examples
tell what is wanted. Decoding is greedy.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transom.calib.digit_questions import DigitQuestion
from transom.export.datasets import heldout_questions, question_examples
from transom.export.metrics import Accuracy
from transom.runtime import load
from transom.runtime.host import processor
from transom.runtime.tasks.flamingo import Flamingo

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "flamingo_few_shot.md"
SHOTS = (0, 1, 2, 4)
END = "<|endofchunk|>"
UNSAID = "Answer:"
COUNT, NEIGHBOUR = "how many sevens?", "what is left of the three?"  # examples of questions that name a digit
Answers = Mapping[str, list[bool]]  # right or not, by the kind of the question


def kind_of(question: str) -> str:
    """Return the question itself, or an example of its kind where it names a digit."""
    if question.startswith("what is "):
        return NEIGHBOUR
    return COUNT if question.startswith("how many ") and question != "how many digits?" else question


def said(each: DigitQuestion, scans: Any, shots: int, examples: list[Any]) -> list[Any]:
    """Return the prompt of ``Flamingo.answer``."""
    shown = [examples[number] for number in each.examples[:shots]]
    before = [part for image, question, answer in shown for part in (image, (question, answer))]
    return [*before, each.draw(scans), each.question]


def unsaid(each: DigitQuestion, scans: Any, shots: int, examples: list[Any]) -> list[Any]:
    """Return the prompt of ``Flamingo.generate`` in which no question stands."""
    shown = [examples[number] for number in each.examples[:shots]]
    before = [part for image, _, answer in shown for part in (image, f"{UNSAID} {answer}{END}")]
    return [*before, each.draw(scans), UNSAID]


def right(
    ask: Callable[[list[list[Any]]], list[str]], prompt: Callable[..., list[Any]], shots: int, kinds: list[str]
) -> Answers:
    """Return which of the held-out questions of these kinds are answered right."""
    scans, questions = heldout_questions()
    chosen = [each for each in questions if kind_of(each.question) in kinds]
    examples = question_examples()
    found = ask([prompt(each, scans, shots, examples) for each in chosen])
    answers: dict[str, list[bool]] = {kind: [] for kind in kinds}
    for each, text in zip(chosen, found, strict=True):
        answers[kind_of(each.question)].append(text.strip() == each.answer)
    return answers


def guesses(kinds: list[str]) -> list[str]:
    """Return the share of the most frequent answer of each kind, as cells of the table."""
    _, questions = heldout_questions()
    counts = [Counter(each.answer for each in questions if kind_of(each.question) == kind) for kind in kinds]
    return [f"{100 * count.most_common(1)[0][1] / count.total():.1f} %" for count in counts]


def cell(answers: list[bool], *, interval: bool = False) -> str:
    score = Accuracy.of_each("", "", answers)
    low, high = (100 * bound for bound in score.interval)
    shown = f"{score.correct} of {score.n} = {100 * score.correct / score.n:.1f} %"
    return f"{shown} ({low:.1f} to {high:.1f})" if interval else shown


def table(columns: Mapping[int, Answers]) -> list[str]:
    """Return Markdown: a row for each kind of question and one for all, a column for each number of examples."""
    kinds = list(next(iter(columns.values())))
    heads = " | ".join(f"{shots} example{'s' if shots != 1 else ''}" for shots in columns)
    lines = [f"| question | most frequent answer | {heads} |", "| --- |" + " --- |" * (1 + len(columns))]
    for kind, guess in zip(kinds, guesses(kinds), strict=True):
        lines.append(f"| {kind} | {guess} | " + " | ".join(cell(each[kind]) for each in columns.values()) + " |")
    every = (cell([answer for kind in kinds for answer in each[kind]], interval=True) for each in columns.values())
    return [*lines, "| all | | " + " | ".join(every) + " |"]


def measured(bundle: Flamingo) -> list[str]:
    """Ask everything; return the lines of the page."""
    kinds = list(dict.fromkeys(kind_of(each.question) for each in heldout_questions()[1]))
    whole = [kind for kind in kinds if kind not in (COUNT, NEIGHBOUR)]
    lines = []
    for title, ask, prompt, of in (
        ("The question is said", bundle.answer, said, kinds),
        ("The question is not said", bundle.generate, unsaid, whole),
    ):
        columns = {shots: right(lambda prompts: ask(prompts, num_beams=1), prompt, shots, of) for shots in SHOTS}  # noqa: B023
        lines += ["", f"## {title}", "", *table(columns)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--write", action="store_true", help=f"renew docs/results/{PAGE.name}")
    options = parser.parse_args()
    with load(options.bundle) as bundle:
        assert isinstance(bundle, Flamingo)
        lines = measured(bundle)
        precision = bundle.manifest.precision
    head = [
        "# The reference Flamingo against the number of examples",
        "",
        f"`python benchmarks/flamingo_few_shot.py bundles/flamingo --write`, {precision}, {processor()}.",
        "The examples are of the same kind of question, about images of scans that train; the questions are about",
        "scans that never did. Greedy, every word right; in brackets Wilson's 95 % interval.",
    ]
    print("\n".join(lines))
    if options.write:
        PAGE.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
