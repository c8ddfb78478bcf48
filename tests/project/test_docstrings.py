"""Docstrings speak the field's words: a function's first line says what it does, and no word is ours alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from paths import REPO

PACKAGES = ("models", "export", "runtime", "calib", "cli")
CLAUSE = re.compile(r"(What|Where|Who|How|Which|Whether|When|That)\b")
NOUN = re.compile(r"(The|A|An|One|Each|Every|All|Of|In|As)\b")
PRIVATE = re.compile(
    r"\b(flavours?|verdicts?|wishes|yardstick|recipe|whoever|held against|put through|of ours|rooms|walls?)\b", re.I
)


def first_lines(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, first line of the docstring, whether a verb has to begin it) of the module and all in it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
        is_property = any(each.endswith("property") for each in decorators)
        yield getattr(node, "lineno", 1), text.splitlines()[0], function and not is_property


def problems(source: str) -> list[str]:
    found = []
    for line, text, verb in first_lines(source):
        if CLAUSE.match(text) or (verb and NOUN.match(text)) or PRIVATE.search(text):
            found.append(f"{line}: {text}")
    return found


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(REPO).as_posix() for folder in PACKAGES for p in (REPO / folder).rglob("*.py"))
)
def test_first_lines_of_docstrings(path: str) -> None:
    """A verb and an object; of a property or a class a noun phrase; never a relative clause."""
    assert problems((REPO / path).read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('def f():\n    """What it is."""', 1),
        ('def f():\n    """The name of a tensor."""', 1),
        ('def f():\n    """Return the name of a tensor."""', 0),
        ('class C:\n    """The name of a tensor."""\n\n    @property\n    def n(self):\n        """The size."""', 0),
        ('"""How it works."""', 1),
        ('"""Compare graphs, whoever made them."""', 1),
        ('class C:\n    @property\n    def n(self):\n        """Whether it is there."""', 1),
    ],
)
def test_the_checker_sees(source: str, count: int) -> None:
    assert len(problems(source)) == count


def test_the_packages_are_there() -> None:
    assert all(Path(REPO / folder / "__init__.py").is_file() for folder in PACKAGES)
