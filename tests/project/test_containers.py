"""The container files of examples/: their steps, the files that they name, and that no engine needs another's library.

No container is built here. `make serving-env` makes environments by the same steps, and `make test-serving` uses them.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from container_steps import Step, commands, container_file, copy_all, engines, python_of, steps_of
from paths import REPO, TESTS
from serving_engines import SERVED
from time_limits import PATIENCE_S

if not (REPO / "examples" / "containers").is_dir():
    pytest.skip(f"no examples in {REPO}: set TRANSOM_REPO to the repository", allow_module_level=True)

ENGINES = engines()
LIBRARIES = {  # what an example may import beside the standard library, the runtime and what the runtime needs
    "triton": {"pytriton", "tritonclient"},
    "ray": {"ray", "pyarrow", "starlette"},
    "kserve": {"kserve", "grpc", "starlette"},
}
OF_RUNTIME = {"transom", "numpy", "PIL", "rich", "typer"}  # "pip install transom" brings them


def steps(engine: str) -> list[Step]:
    return steps_of(container_file(engine).read_text("utf-8"))


def texts(engine: str, instruction: str) -> list[str]:
    return [step.text for step in steps(engine) if step.instruction == instruction]


def extras() -> dict[str, list[str]]:
    found: dict[str, list[str]] = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    return found


def scripts(engine: str) -> list[Path]:
    """Return the examples that a container file copies."""
    sources = [source for step in steps(engine) if step.instruction == "COPY" for source in step.copied()[0]]
    return [REPO / source for source in sources if source.endswith(".py")]


def test_there_is_one_for_each_engine() -> None:
    (line,) = re.findall(r"^ENGINES +\?= (.*)$", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
    folders = sorted(path.name for path in (TESTS / "serving").iterdir() if path.is_dir() and path.name[0] != "_")
    assert ENGINES == sorted(line.split()) == sorted(LIBRARIES) == folders


def test_the_makefile_exports_what_the_tests_serve() -> None:
    (line,) = re.findall(r"^SERVED +:= (.*)$", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert line.split() == list(SERVED)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_starts_from_a_python_and_needs_pip_alone(engine: str) -> None:
    assert python_of(steps(engine)) == "3.11"
    (installed,) = commands(steps(engine))
    assert installed.endswith(f'"$(echo container/wheels/transom-*.whl)[{engine}]"')
    assert engine in extras()


@pytest.mark.parametrize("engine", ENGINES)
def test_it_copies_files_that_exist(engine: str) -> None:
    sources = [source for step in steps(engine) if step.instruction == "COPY" for source in step.copied()[0]]
    assert [source for source in sources if source.startswith("dist/")] == ["dist/transom-*.whl"]
    assert scripts(engine)
    assert [path for path in scripts(engine) if not path.is_file()] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_it_serves_as_a_user_who_is_not_root(engine: str) -> None:
    user, entry, arguments = texts(engine, "USER"), texts(engine, "ENTRYPOINT"), texts(engine, "CMD")
    assert [name.split(":")[0] for name in user] == ["65534"]
    order = [step.instruction for step in steps(engine)]
    assert order.index("RUN") < order.index("USER") < order.index("ENTRYPOINT") < order.index("CMD")
    python, script, *options = json.loads(entry[0])
    assert (python, options) == ("python", ["--host", "0.0.0.0"])  # the container's own network
    assert Path(script).name in [path.name for path in scripts(engine)]
    assert json.loads(arguments[0])[0].startswith("/")


@pytest.mark.parametrize("engine", ENGINES)
def test_its_examples_import_nothing_of_another_engine(engine: str) -> None:
    beside = {script.stem for script in scripts(engine)}
    known = LIBRARIES[engine] | OF_RUNTIME | beside | sys.stdlib_module_names
    for script in scripts(engine):
        found = imports(script)
        assert {name.split(".")[0] for name in found} - known == set(), script.name
        assert {name for name in found if re.match(r"transom\.(?!runtime)", name)} == set(), script.name


def imports(script: Path) -> set[str]:
    """Return the modules that a file imports, within functions too."""
    tree = ast.walk(ast.parse(script.read_text("utf-8")))
    nodes = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_no_extra_brings_another_engine() -> None:
    """And none is in [dev]: each wants versions of its own."""
    brought = {"triton": "nvidia-pytriton", "ray": "ray", "kserve": "kserve"}
    for name, needs in extras().items():
        packages = {re.split(r"[^\w-]", need)[0] for need in needs}
        selves = set(re.findall(r"transom\[([\w,]+)\]", " ".join(needs)))
        assert packages & set(brought.values()) == ({brought[name]} if name in brought else set())
        assert not {extra for extras_ in selves for extra in extras_.split(",")} & set(brought)


def test_the_runtime_loads_nothing_of_serving(tmp_path: Path) -> None:
    code = "import sys, transom.runtime; print([name for name in sys.modules if 'serving' in name])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_step_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'ADD' is no instruction that is known here"):
        steps_of("FROM python:3.11-slim\nADD x /y/\n")
    with pytest.raises(ValueError, match="RUN apt-get install curl: expected pip install"):
        list(commands([Step("RUN", "apt-get install curl")]))
    with pytest.raises(ValueError, match="FROM debian: expected python:VERSION-slim"):
        python_of([Step("FROM", "debian")])


def test_steps_are_read_over_several_lines() -> None:
    found = steps_of("# a comment\nCOPY a \\\n    b /c/\n\n  # another\nUSER 1\n")
    assert found == [Step("COPY", "a b /c/"), Step("USER", "1")]
    assert found[0].copied() == (["a", "b"], "/c/")


def test_files_are_copied_where_the_commands_look_for_them(tmp_path: Path) -> None:
    pip = "pip install --no-cache-dir $PIP_ARGS"
    copied = [Step("COPY", "LICENSE pyproject.toml /wheels/"), Step("RUN", f"{pip} /wheels/x")]
    copy_all(copied, tmp_path / "container")
    assert sorted(path.name for path in (tmp_path / "container/wheels").iterdir()) == ["LICENSE", "pyproject.toml"]
    assert list(commands(copied)) == [f"{pip} container/wheels/x"]
    with pytest.raises(FileNotFoundError, match=r"COPY absent\.py: there is no such file"):
        copy_all([Step("COPY", "absent.py /app/")], tmp_path)
