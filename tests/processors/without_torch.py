"""Select the tests that run without torch and onnx, and give them the bundles that another run exported.

A plugin of pytest: ``-p processors.without_torch``. Left out is a test that asks for a fixture which makes checkpoints,
or whose own code imports a library of LIBRARIES: the rule, not what happens to be installed, decides, so that the host
runs the same tests. ``--exported FOLDER`` names the ``shared`` folder of a run of the same tests where torch is.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

FIXTURES = frozenset({"make_checkpoint", "traced_once"})
LIBRARIES = frozenset({"torch", "transformers", "onnx", "onnx_ir", "sentence_transformers", "sklearn"})
PACKAGES = ("transom.export", "transom.models")  # they import the libraries


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
    """Return whether a test asks for one of FIXTURES, also by a parameter's name, or imports the libraries itself."""
    fixtures = set(item.fixturenames)
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        found = item.session._fixturemanager.getfixturedefs(value, item) if isinstance(value, str) else None
        fixtures |= {name for each in found or () for name in each.argnames}
    return bool(FIXTURES & fixtures) or imports_libraries(inspect.getsource(item.function))


def imports_libraries(source: str) -> bool:
    """Return whether a function's source imports a library of LIBRARIES, or a package that does."""
    return any(
        name.split(".")[0] in LIBRARIES or any(f"{name}.".startswith(f"{package}.") for package in PACKAGES)
        for name in imported_names(ast.parse(textwrap.dedent(source)))
    )


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield each imported name with its module: ``from a import b`` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
