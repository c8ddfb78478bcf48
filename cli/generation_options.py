"""The options of ``transom run`` for bundles that generate, named as the keywords of ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

GENERATION = "Generation (text-generation, translation)"
SAMPLING = "Sampling (with --do-sample, and --top-k above)"
BEAMS = "Beam search (with --num-beams of 2 or more)"


class EarlyStopping(StrEnum):
    """What ``--early-stopping`` takes: the keyword's False, True and "never"."""

    false = "false"
    true = "true"
    never = "never"

    @property
    def keyword(self) -> bool | str:
        return self.value if self is EarlyStopping.never else self is EarlyStopping.true


def option(panel: str, help: str, metavar: str | None = None, *names: str) -> Any:
    """An option without a default to show: the checkpoint's holds, which help cannot know."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=False, rich_help_panel=panel)


@dataclass(frozen=True)
class GenerationOptions:
    """What was given; None, or an empty list, leaves a keyword to the checkpoint's generation_config.json.

    The runtime checks the values, so that a command line hears what a program hears.
    """

    max_new_tokens: Annotated[int | None, option(GENERATION, "At most so many tokens.", "N")] = None
    min_new_tokens: Annotated[int | None, option(GENERATION, "No end before so many tokens.", "N")] = None
    stop_strings: Annotated[
        list[str] | None, option(GENERATION, "End where the text has this; repeatable.", "TEXT", "--stop-string")
    ] = None
    repetition_penalty: Annotated[
        float | None, option(GENERATION, "Above 1 avoids tokens that are there already.", "NUMBER")
    ] = None
    no_repeat_ngram_size: Annotated[int | None, option(GENERATION, "Never repeat so many tokens in a row.", "N")] = None
    num_return_sequences: Annotated[int | None, option(GENERATION, "Texts per prompt.", "N")] = None
    score: Annotated[bool, option(GENERATION, "Generate nothing: print each text's perplexity.", None, "--score")] = (
        False
    )
    do_sample: Annotated[bool | None, option(SAMPLING, "Draw tokens, or take the likeliest.")] = None
    temperature: Annotated[float | None, option(SAMPLING, "Below 1 draws likely tokens more often.", "NUMBER")] = None
    top_p: Annotated[float | None, option(SAMPLING, "Draw from the likeliest that make up this share.", "SHARE")] = None
    seed: Annotated[int | None, option(SAMPLING, "The same seed draws the same text.", "N")] = None
    num_beams: Annotated[int | None, option(BEAMS, "Rows that are followed at once.", "N")] = None
    length_penalty: Annotated[float | None, option(BEAMS, "Above 0 favours long texts.", "NUMBER")] = None
    early_stopping: Annotated[
        EarlyStopping | None, option(BEAMS, "End as soon as there are enough texts, or look for better ones.")
    ] = None

    def keywords(self) -> dict[str, Any]:
        """For ``generate``, ``stream`` and ``translate``."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "score"}
        if self.early_stopping is not None:
            values["early_stopping"] = self.early_stopping.keyword
        return {name: value for name, value in values.items() if value is not None and value != []}


def option_of(name: str) -> str:
    """``max_new_tokens`` -> ``--max-new-tokens``; the one that is given string by string is called so."""
    return "--stop-string" if name == "stop_strings" else f"--{name.replace('_', '-')}"


def with_generation_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of GenerationOptions in place of its parameter ``generation``.

    typer reads options from a signature: this one is put together, so that ``command`` sees one argument.
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
