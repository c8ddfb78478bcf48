"""Select the tests that run without torch, and give them the bundles that another run exported.

A plugin of pytest: ``-p processors.without_torch``. Left out is a test that asks for a fixture which makes checkpoints,
or whose own code imports a library of LIBRARIES that its file as a whole does not: the rule decides, and not what
happens to be installed, so that the same tests run where torch is and where it is not. ``--exported FOLDER`` names the
``shared`` folder of a run of the same tests where torch is.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

FIXTURES = frozenset({"make_checkpoint", "traced_once"})
LIBRARIES = ("torch", "transformers", "onnx", "onnx_ir", "sentence_transformers", "sklearn")
PACKAGES = ("transom.export", "transom.models")  # most of their modules import the libraries


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exported", type=Path, help="bundles that another run's fixtures exported; nothing is exported")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Link the exported folders to where the fixture ``once`` looks for them, as finished."""
    exported = session.config.getoption("--exported")
    if exported is None:
        return
    from conftest import listing

    shared = session.config._tmp_path_factory.getbasetemp() / "shared"  # type: ignore[attr-defined]
    shared.mkdir()
    for finished in sorted(exported.glob("*.finished")):
        folder = shared / finished.stem
        folder.symlink_to(exported.absolute() / finished.stem)
        (shared / finished.name).write_text(listing(folder))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if isinstance(item, pytest.Function) and needs_torch(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def needs_torch(item: pytest.Function) -> bool:
    """Return whether a test asks for one of FIXTURES, also by a parameter's name, or imports what its file does not."""
    fixtures = set(item.fixturenames)
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        found = item.session._fixturemanager.getfixturedefs(value, item) if isinstance(value, str) else None
        fixtures |= {name for each in found or () for name in each.argnames}
    return bool(FIXTURES & fixtures or libraries_of(inspect.getsource(item.function)) - libraries_of_file(item.path))


@cache
def libraries_of_file(path: Path) -> frozenset[str]:
    return libraries_of(path.read_text("utf-8"))


def libraries_of(source: str) -> frozenset[str]:
    """Return which of LIBRARIES and PACKAGES a file imports when it is imported, or a function when it is called."""
    tree = ast.parse(textwrap.dedent(source))
    statements = tree.body
    if len(statements) == 1 and isinstance(statements[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return frozenset(
        known
        for name in imported_names(statements)
        for known in (*LIBRARIES, *PACKAGES)
        if f"{name}.".startswith(f"{known}.")
    )


def imported_names(statements: list[ast.stmt]) -> Iterator[str]:
    """Yield each imported name with its module: ``from a import b`` is a.b."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
