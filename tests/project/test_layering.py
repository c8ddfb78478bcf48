"""The boundaries between the packages: who may import whom, which libraries, no cycle, and what an import loads.

An AST walk instead of import-linter, which cannot see that ``models/`` installs as ``transom.models``.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from paths import REPO
from time_limits import PATIENCE_S

PACKAGES = ("models", "export", "runtime", "calib", "cli")

# Prefixes of what each package may import of ours. A name counts as deep as it is written:
# `from transom.runtime import load` is `transom.runtime.load`.
OURS = {
    "models": ("transom.models", "transom.runtime.errors", "transom.runtime.graph_spec", "transom.runtime.families"),
    "runtime": ("transom.runtime",),
    "calib": ("transom.calib", "transom.runtime"),
    "export": ("transom.export", "transom.models", "transom.calib", "transom.runtime"),
    "cli": tuple(f"transom.{name}" for name in PACKAGES),
}
THEIRS = {
    "models": {"torch", "safetensors", "huggingface_hub"},
    "runtime": {"numpy", "onnxruntime", "tokenizers", "PIL", "safetensors", "cuda", "triton_python_backend_utils"},
    "calib": {"numpy", "onnx", "onnx_ir", "onnxruntime", "PIL", "safetensors"},
    "export": {"numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "ml_dtypes", "polygraphy", "triton"}
    | {"safetensors", "tokenizers", "sentencepiece", "PIL", "huggingface_hub", "jinja2", "markupsafe"},
    "cli": {"typer", "rich", "numpy", "PIL"},
}
TORCH_TOO = {"export/onnx_export.py", "export/parity/backends.py"}
TORCH_TOO |= {"export/plugins/interpreter.py"}  # inside functions: Triton's interpreter takes torch's tensors
# Only inside functions: `transom --help` must not wait for them, nor a local checkpoint for the hub's client.
LAZY = {
    "models": ("huggingface_hub",),
    "runtime": ("triton_python_backend_utils",),  # there is one in the processes of Triton's server alone
    "cli": ("transom", "numpy", "PIL"),
}
LIGHT = ("errors", "format", "probe", "progress")  # of the runtime: they import the standard library alone
EAGER_ALL_THE_SAME = {"cli": ("transom.cli", *(f"transom.runtime.{name}" for name in LIGHT))}

# What neither the runtime's import nor the command line's may load.
HEAVY = {"torch", "transformers", "onnx", "onnx_ir"} | THEIRS["runtime"]
TORCH = {"torch", "transformers", "onnxscript"}  # what only tracing and parity need


@dataclass(frozen=True)
class Import:
    """One imported name, absolute; ``lazy`` if it is not executed when the module is imported."""

    name: str
    line: int
    lazy: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module of `package`: statements anywhere, and import_module("literal")."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while pending:
        node, lazy = pending.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield from (Import(f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and last_name(node.func) in ("import_module", "__import__"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from (Import(str(name), node.lineno, lazy) for name in names)
        deferred: list[ast.AST] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING"
        ):
            deferred = [*node.body]
        pending += [(child, lazy or child in deferred) for child in ast.iter_child_nodes(node)]


def last_name(expression: ast.expr) -> str:
    """``import_module`` of ``importlib.import_module``."""
    return ast.unparse(expression).split(".")[-1]


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(path: str, source: str) -> list[str]:
    """What the module at `path` (relative to the repository, "/" between folders) may not import."""
    package, module_package = path.split("/")[0], ".".join(["transom", *path.split("/")[:-1]])
    found = []
    for item in sorted(imports(source, module_package), key=lambda item: item.line):
        top = item.name.split(".")[0]
        libraries = THEIRS[package] | ({"torch"} if path in TORCH_TOO else set())
        if top in PACKAGES:
            problem = f"is a second module beside transom.{item.name}"
        elif top == "transom" and not under(item.name, OURS[package]):
            problem = f"crosses the boundary of {package}/"
        elif top not in ("transom", *libraries, *sys.stdlib_module_names):
            problem = f"is no library of {package}/"
        elif (
            not item.lazy
            and under(item.name, LAZY.get(package, ()))
            and not under(item.name, EAGER_ALL_THE_SAME.get(package, ()))
        ):
            problem = "belongs inside the function that needs it"
        else:
            continue
        found.append(f"{path}:{item.line}: {item.name} {problem}")
    return found


def files(*folders: str) -> list[str]:
    return sorted(
        path.relative_to(REPO).as_posix()
        for folder in folders
        for path in (REPO / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    )


def test_the_repository_is_there() -> None:
    """Otherwise every test below would be parametrised over nothing, and pass."""
    assert {f"{name}/__init__.py" for name in PACKAGES} <= set(files(*PACKAGES)), f"no packages in {REPO}"


@pytest.mark.parametrize("path", files(*PACKAGES))
def test_a_package_keeps_its_boundary(path: str) -> None:
    assert violations(path, (REPO / path).read_text("utf-8")) == []


@pytest.mark.parametrize("path", files("tests", "examples", "benchmarks", "docs"))
def test_no_bare_names_outside_the_packages(path: str) -> None:
    """From the repository's root `import models.bert` works: a second module, with other classes."""
    names = [item.name for item in imports((REPO / path).read_text("utf-8"), package="")]
    assert [name for name in names if under(name, PACKAGES)] == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("models/bert.py", "from transom.runtime import load", "1: transom.runtime.load crosses the boundary"),
        ("models/bert.py", "from ..export.onnx_export import trace", "1: transom.export.onnx_export.trace crosses"),
        ("models/bert.py", "from .. import calib", "1: transom.calib crosses"),
        ("models/bert.py", "import numpy as np", "1: numpy is no library of models/"),
        ("models/bert.py", "from huggingface_hub import x", "1: huggingface_hub.x belongs inside"),
        ("runtime/backends/ort.py", "def f():\n    import torch", "2: torch is no library of runtime/"),
        ("runtime/tasks/bert.py", "from transom.models import bert", "1: transom.models.bert crosses"),
        ("runtime/backends/ort.py", "import importlib\nimportlib.import_module('onnx')", "2: onnx is no library"),
        ("calib/scales.py", "from transom.export import bundle_writer", "1: transom.export.bundle_writer crosses"),
        ("export/pipeline.py", "import torch.nn", "1: torch.nn is no library of export/"),
        ("export/passes/onnx.py", "import torch", "1: torch is no library of export/"),
        ("export/onnx_export.py", "import transformers", "1: transformers is no library of export/"),
        ("export/onnx_export.py", "from transom.cli import main", "1: transom.cli.main crosses"),
        ("export/onnx_export.py", "from models.bert import Bert", "1: models.bert.Bert is a second module"),
        ("cli/main.py", "class C:\n  from transom.export import x", "2: transom.export.x belongs inside"),
        ("cli/main.py", "if TYPE_CHECKING:\n  pass\nelse:\n  import transom.calib", "4: transom.calib bel"),
        ("cli/main.py", "def f():\n    import torch", "2: torch is no library of cli/"),
    ],
)
def test_the_checker_sees(path: str, source: str, problem: str) -> None:
    (found,) = violations(path, source)
    assert found.startswith(f"{path}:{problem}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/bert.py", "import torch, json\nfrom transom.runtime.errors import CheckpointError"),
        ("models/bert.py", "from ..runtime import graph_spec\nfrom . import attention"),
        ("export/onnx_export.py", "import torch\nfrom transom.models.bert import Bert"),
        ("cli/main.py", "import typer\nfrom transom.runtime.errors import TransomError\nfrom . import show"),
        ("cli/main.py", "def export():\n    from transom.export.pipeline import run"),
        ("cli/main.py", "if typing.TYPE_CHECKING:\n    from transom.runtime.bundle import Bundle"),
    ],
)
def test_the_checker_lets_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


def module_name(path: str) -> str:
    """``transom.export.passes`` of ``export/passes/__init__.py``."""
    return ".".join(("transom", *Path(path).with_suffix("").parts)).removesuffix(".__init__")


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules among ``sources`` (path -> text) that it imports, in functions and for types, too."""
    modules = {module_name(path): path for path in sources}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
        graph[name] = set()
        for item in imports(sources[path], package):
            found = item.name
            while found and found not in modules:
                found = found.rpartition(".")[0]
            graph[name] |= {found} - {"", name}
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The nodes of each ring: what is left when nodes that lead nowhere, or that nothing leads to, are taken away."""
    left = {node: set(targets) for node, targets in graph.items()}
    while True:
        reached = set().union(*left.values())
        ends = {node for node, targets in left.items() if not targets or node not in reached}
        if not ends:
            break
        left = {node: targets - ends for node, targets in left.items() if node not in ends}
    rings: list[list[str]] = []
    while left:
        ring, pending = set(), [min(left)]
        while pending:
            node = pending.pop()
            if node in left and node not in ring:
                ring.add(node)
                pending += left[node]
        rings.append(sorted(ring))
        left = {node: targets for node, targets in left.items() if node not in ring}
    return rings


def test_no_module_imports_itself_by_a_detour() -> None:
    """Not in a function, not for a type: a reader who follows the imports only ever goes down."""
    graph = import_graph({path: (REPO / path).read_text("utf-8") for path in files(*PACKAGES)})
    assert len(graph) > 200
    assert cycles(graph) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"runtime/a.py": "from transom.runtime import b", "runtime/b.py": ""}, []),
        (
            {
                "runtime/a.py": "from transom.runtime.b import x",
                "runtime/b.py": "def f():\n    import transom.runtime.a",
            },
            [["transom.runtime.a", "transom.runtime.b"]],
        ),
        (
            {
                "cli/a.py": "if TYPE_CHECKING:\n    from transom.cli.b import B",
                "cli/b.py": "from transom.cli import c",
                "cli/c.py": "from . import a",
                "cli/d.py": "from . import a",
            },
            [["transom.cli.a", "transom.cli.b", "transom.cli.c"]],
        ),
    ],
)
def test_the_checker_sees_cycles(sources: dict[str, str], expected: list[list[str]]) -> None:
    assert cycles(import_graph(sources)) == expected


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs away from the repository's root, where the packages could be imported bare."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "module",
    ["transom.runtime", *(f"transom.runtime.{name}" for name in LIGHT), "transom.cli.main"],
)
def test_import_loads_nothing_heavy(module: str, tmp_path: Path) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(python("-c", code, folder=tmp_path).stdout))
    assert module in loaded
    assert loaded.isdisjoint(HEAVY)


def test_what_works_on_graphs_alone_loads_no_torch(tmp_path: Path) -> None:
    """Calibration, passes, and what writes a bundle, in one process: each by itself would start as slowly."""
    paths = [
        *files("calib", "export/passes", "export/engine", "export/triton"),
        "export/variants.py",
        "export/bundle_writer.py",
    ]
    modules = [".".join(("transom", *Path(path).with_suffix("").parts)).removesuffix(".__init__") for path in paths]
    code = f"import sys, {', '.join(modules)}; print('onnx_ir' in sys.modules, {TORCH!r} & sys.modules.keys())"
    assert python("-c", code, folder=tmp_path).stdout == "True set()\n"


def import_times_us(folder: Path) -> dict[str, tuple[int, int]]:
    """Module → (self, cumulative) microseconds of `import transom.runtime` for what is ours."""
    report = python("-X", "importtime", "-c", "import transom.runtime", folder=folder).stderr
    lines = re.findall(r"^import time:\s*(\d+) \|\s*(\d+) \|\s*(transom[\w.]*)$", report, re.MULTILINE)
    return {name: (int(own), int(cumulative)) for own, cumulative, name in lines}


def test_importing_the_runtime_takes_under_20_ms(tmp_path: Path) -> None:
    """The best of five runs, each module by itself: a busy machine slows some of them, not the code."""
    runs = [import_times_us(tmp_path) for _ in range(5)]
    assert "transom.runtime" in runs[0]
    best_us = {name: min(max(run[name]) for run in runs) for name in runs[0]}
    assert {name: us for name, us in best_us.items() if us >= 20_000} == {}
