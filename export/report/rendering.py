"""Render the report's templates: Jinja escapes every value; values from outside are cut and made visible as well."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from transom.runtime.format import bytes_text, count_text, error_text, milliseconds, object_of, short

MOST_CHARACTERS = 160  # of a name or a sentence from a bundle or a user
MOST_AXES = 8  # of a shape's sizes in text
TEMPLATES = Path(__file__).parent / "templates"


def visible(value: Any, most: int = MOST_CHARACTERS) -> str:
    """Return a value from outside as one line of at most ``most`` characters, cut with an ellipsis; None is a dash.

    Control characters and those that turn the direction of text become their code points.
    """
    if value is None:
        return "–"
    text = " ".join(str(value)[: 4 * most].split(" "))
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(character if character.isprintable() else f"U+{ord(character):04X}" for character in cut)


def visible_token(token: str, most: int = 40) -> str:
    """Return a token for display: blanks as ␣, what cannot be printed by its code point."""
    return visible(token.replace(" ", "␣").replace("▁", "␣"), most)


def sizes_text(sizes: Any) -> str:
    """Return sizes of axes as ``B=1 S=128``; a dash where there are none."""
    named = list(object_of(sizes).items())[:MOST_AXES]
    return " ".join(f"{visible(name, 20)}={visible(size, 12)}" for name, size in named) or "–"


@cache
def environment() -> Environment:
    """Return the templates' environment: autoescaped, an undefined name is an error."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    templates.filters |= {"visible": visible, "token": visible_token, "sizes": sizes_text}
    templates.filters |= {"short": short, "count": count_text, "error": error_text}
    templates.filters |= {"bytes": bytes_text, "ms": milliseconds}
    return templates


def render(template: str, /, **context: Any) -> Markup:
    """Render a template below ``templates/``, without its suffix."""
    return Markup(environment().get_template(f"{template}.html.j2").render(context))
