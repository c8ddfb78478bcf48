"""Define the generation options of ``transom run``, named as the keywords of ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

GENERATION = "Generation (text-generation, translation, image-to-text, image-text-to-text)"
SAMPLING = "Sampling (with --do-sample, and --top-k above)"
BEAMS = "Beam search (with --num-beams of 2 or more)"


class EarlyStopping(StrEnum):
    """Values of ``--early-stopping``: the keyword's False, True and "never"."""

    false = "false"
    true = "true"
    never = "never"

    @property
    def keyword(self) -> bool | str:
        return self.value if self is EarlyStopping.never else self is EarlyStopping.true


def option(panel: str, help: str, metavar: str | None = None, *names: str) -> Any:
    """Return an option whose default is not shown: it is the checkpoint's own, which the help text cannot know."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=False, rich_help_panel=panel)


@dataclass(frozen=True)
class GenerationOptions:
    """The generation options given; None, or an empty list, leaves a keyword to the checkpoint's own config.

    The runtime checks the values: the command line reports the same errors as Python does.
    """

    max_new_tokens: Annotated[int | None, option(GENERATION, "Most new tokens.", "N")] = None
    min_new_tokens: Annotated[int | None, option(GENERATION, "Fewest new tokens.", "N")] = None
    stop_strings: Annotated[
        list[str] | None, option(GENERATION, "End where the text contains this; repeatable.", "TEXT", "--stop-string")
    ] = None
    repetition_penalty: Annotated[
        float | None, option(GENERATION, "Above 1 makes tokens less likely that the text has already.", "NUMBER")
    ] = None
    no_repeat_ngram_size: Annotated[int | None, option(GENERATION, "No sequence of N tokens occurs twice.", "N")] = None
    num_return_sequences: Annotated[int | None, option(GENERATION, "Texts per prompt.", "N")] = None
    score: Annotated[bool, option(GENERATION, "Generate nothing: print each text's perplexity.", None, "--score")] = (
        False
    )
    do_sample: Annotated[bool | None, option(SAMPLING, "Sample tokens, or take the most likely one.")] = None
    temperature: Annotated[
        float | None, option(SAMPLING, "Below 1 favours likely tokens, above 1 unlikely ones.", "NUMBER")
    ] = None
    top_p: Annotated[
        float | None,
        option(SAMPLING, "Sample among the likeliest tokens of this total probability.", "SHARE"),
    ] = None
    seed: Annotated[int | None, option(SAMPLING, "The same seed gives the same text.", "N")] = None
    num_beams: Annotated[int | None, option(BEAMS, "Beams, the candidates kept at each step.", "N")] = None
    length_penalty: Annotated[float | None, option(BEAMS, "Above 0 favours longer texts.", "NUMBER")] = None
    early_stopping: Annotated[
        EarlyStopping | None,
        option(
            BEAMS,
            "End at --num-beams finished texts (true), or when better ones are unlikely (false) or impossible (never).",
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """Return the keywords for ``generate``, ``stream`` and ``translate``."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "score"}
        if self.early_stopping is not None:
            values["early_stopping"] = self.early_stopping.keyword
        return {name: value for name, value in values.items() if value is not None and value != []}


def option_of(name: str) -> str:
    """Return the option of a keyword: ``--max-new-tokens`` of ``max_new_tokens``; ``--stop-string`` takes one each."""
    return "--stop-string" if name == "stop_strings" else f"--{name.replace('_', '-')}"


def with_generation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with an option for each field of GenerationOptions in place of its parameter ``generation``.

    typer reads options from a signature: this one is assembled, and ``command`` gets them as one argument.
    """
    types = get_type_hints(GenerationOptions, include_extras=True)
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
        )
        for field in fields(GenerationOptions)
    ]
    signature = inspect.signature(command, eval_str=True)
    others = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name != "generation"
    ]

    @wraps(command)
    def call(**values: Any) -> None:
        generation = GenerationOptions(**{each.name: values.pop(each.name) for each in options})
        command(**values, generation=generation)

    parameters = [*others, *options]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    return call
