"""What is installed is what is on disk: the package list, the data files, the wheel, the two commands.

A subpackage that `packages` forgets works in an editable install and is silently absent from the wheel.
"""

from __future__ import annotations

import email
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from paths import REPO
from time_limits import PATIENCE_S
from transom.runtime.native.build import LIBRARY, BuildError, compiler

PACKAGES = ("models", "export", "runtime", "calib", "cli")
if not (REPO / "Makefile").is_file():
    pytest.skip(f"no Makefile in {REPO}: set TRANSOM_REPO to the repository", allow_module_level=True)

FROM_WHEEL = os.environ.get("TRANSOM_TEST_WHEEL") == "1"


def setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    return table


def files_of(package: str) -> list[Path]:
    """Every file of a package, relative to the repository; what Python and the C compiler wrote is not counted."""
    return sorted(
        path.relative_to(REPO)
        for path in (REPO / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != LIBRARY
    )


def packages_on_disk() -> set[str]:
    """Folders that hold Python files; those of reference data are the data of transom.models."""
    folders = {path.parent for package in PACKAGES for path in files_of(package) if path.suffix == ".py"}
    return {".".join(("transom", *folder.parts)) for folder in folders if folder.parts[:2] != ("models", "reference")}


def test_the_package_list_is_the_folders_with_python_files() -> None:
    packages = setuptools_table()["packages"]
    assert sorted(packages) == sorted(packages_on_disk())


def test_every_package_lies_where_package_dir_says() -> None:
    folders = {name: folder.replace("/", ".") for name, folder in setuptools_table()["package-dir"].items()}
    assert folders == {name: name.removeprefix("transom.") for name in packages_on_disk()}


def test_every_package_has_an_init_and_every_room_is_typed() -> None:
    """Without __init__.py setuptools still packs it, but mypy and the import system treat it otherwise."""
    wanted = {Path(*name.split(".")[1:], "__init__.py") for name in packages_on_disk()}
    wanted |= {Path(package, "py.typed") for package in PACKAGES}
    assert wanted - {path for package in PACKAGES for path in files_of(package)} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_package_data_names_the_data_files_and_nothing_else(package: str) -> None:
    globs = setuptools_table()["package-data"][f"transom.{package}"]
    matched = {glob: {path for path in (REPO / package).glob(glob) if path.is_file()} for glob in globs}
    assert [glob for glob, paths in matched.items() if not paths] == []
    named = {path.relative_to(REPO) for paths in matched.values() for path in paths}
    assert {path for path in files_of(package) if path.suffix != ".py"} - named == set()


def built(folder: Path, what: str, **environment: str) -> tuple[Path, str]:
    """A wheel or an sdist of a copy of the working tree, and what the build printed.

    A build in place would leave, and reuse, build/lib.
    """
    made_here = ("build", "dist", "bundles", "__pycache__", "*.egg-info", ".*", LIBRARY)
    shutil.copytree(REPO, folder / "source", ignore=shutil.ignore_patterns(*made_here))
    # --no-isolation: the build backend is in the dev extra, so no network is needed
    command = [sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", str(folder), "."]
    inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "TRANSOM_PURE")}
    done = subprocess.run(
        command,
        cwd=folder / "source",
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (path for path in folder.iterdir() if path.is_file())
    return path, done.stdout + done.stderr


def packed_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"), "wheel")[0]


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("pure"), "wheel", TRANSOM_PURE="1")[0]


def package_files() -> set[str]:
    return {f"transom/{path.as_posix()}" for package in PACKAGES for path in files_of(package)}


def test_the_wheel_holds_the_rooms_the_library_and_nothing_else(wheel: Path) -> None:
    """Of this system, for any Python: ctypes loads the library. Without a compiler it is the wheel for any system."""
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))
    assert packed_in(wheel) == package_files() | {f"transom/runtime/native/{LIBRARY}"}
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"transom-{importlib.metadata.version('transom')}-py3-none-{tag}.whl"
    assert wheel.stat().st_size < 11 << 20


def test_a_pure_wheel_holds_all_but_the_library(pure_wheel: Path) -> None:
    assert packed_in(pure_wheel) == package_files()
    assert pure_wheel.name == f"transom-{importlib.metadata.version('transom')}-py3-none-any.whl"


def test_a_build_without_a_compiler_says_so_and_succeeds(tmp_path: Path) -> None:
    wheel, said = built(tmp_path, "wheel", CC="/no/such/compiler")
    assert packed_in(wheel) == package_files()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "transom is installed without its native kernels: no C compiler: CC names '/no/such/compiler'" in said


def test_an_archive_of_sources_has_what_the_library_is_compiled_from(tmp_path: Path) -> None:
    archive, _ = built(tmp_path, "sdist")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {path.as_posix() for path in files_of("runtime") if path.suffix in (".c", ".h")}
    assert {"setup.py", "pyproject.toml", "runtime/native/build.py"} | sources <= names
    assert f"runtime/native/{LIBRARY}" not in names
    assert len(sources) > 20


def test_the_wheel_carries_licence_command_and_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            name.split(".dist-info/")[1]: archive.read(name).decode("utf-8")
            for name in archive.namelist()
            if ".dist-info/" in name
        }
    assert "Apache License" in texts["licenses/LICENSE"]
    assert "transom = transom.cli.main:main" in texts["entry_points.txt"]
    needs = email.message_from_string(texts["METADATA"]).get_all("Requires-Dist", [])
    plain = {need.split(">")[0] for need in needs if "extra ==" not in need}
    assert plain == {"numpy", "onnxruntime", "tokenizers", "pillow", "safetensors", "typer", "rich"}


def test_the_command_line_knows_the_export_extra() -> None:
    from transom.cli.extras import EXPORT_EXTRA

    extra = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["export"]
    assert [need.split(">")[0] for need in extra] == list(EXPORT_EXTRA)


def test_the_version_is_the_installed_one() -> None:
    declared = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert importlib.metadata.version("transom") == declared


@pytest.mark.parametrize("package", PACKAGES)
def test_an_app_never_gets_a_module_called_like_a_package(package: str, tmp_path: Path) -> None:
    code = f"import transom.runtime, {package}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert f"ModuleNotFoundError: No module named '{package}'" in done.stderr


@pytest.mark.parametrize("name", sorted(packages_on_disk()))
def test_the_suite_runs_on_what_it_says_it_runs_on(name: str) -> None:
    """With TRANSOM_TEST_WHEEL=1 on the wheel in this environment, otherwise on the working tree."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    origin = Path(spec.origin).resolve()
    if FROM_WHEEL:
        assert origin.is_relative_to(Path(sys.prefix).resolve())
        assert "site-packages" in origin.parts
        assert not origin.is_relative_to(REPO / name.split(".")[1])
    else:
        assert origin == (REPO / Path(*name.split(".")[1:]) / "__init__.py").resolve()


@pytest.mark.skipif(not FROM_WHEEL, reason="of the installed wheel: `make test-wheel` runs it")
def test_the_installed_wheel_has_every_file() -> None:
    names = {str(path) for path in importlib.metadata.files("transom") or []}
    assert package_files() - names == set()
    assert not any("__editable__" in name for name in names)


def test_the_command_is_installed(tmp_path: Path) -> None:
    command = [str(Path(sys.prefix, "bin", "transom")), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"transom {importlib.metadata.version('transom')}\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_can_be_imported(package: str) -> None:
    """On the wheel, from the wheel: the tests of numbers that would import some of them do not run there."""
    for path in files_of(package):
        if path.suffix == ".py" and path.parts[:2] != ("models", "reference"):
            importlib.import_module(".".join(("transom", *path.with_suffix("").parts)).removesuffix(".__init__"))


def test_what_runs_on_the_wheel_looks_into_every_package() -> None:
    """Without the first two nothing there would ask whether files are missing, or what the families' tables name."""
    (line,) = re.findall(r"^ON_WHEEL := (.*)$", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {"project/test_packaging", "project/test_families"} <= set(line.split())
    texts = [(REPO / "tests" / f"{name}.py").read_text("utf-8") for name in line.split()]
    assert [package for package in PACKAGES if not any(f"transom.{package}" in text for text in texts)] == []


# The Makefile, with a stand-in for the command line that fails where its argument says so.
TRANSOM = """#!/bin/sh
echo "transom $*" >>calls
[ -z "$BREAK" ] || case "$*" in *"$BREAK"*) exit 1 ;; esac
"""


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A folder with the Makefile and a .venv that it takes for finished."""
    folder = tmp_path / "a clone"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPO / name, folder)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    (folder / ".venv/bin/transom").write_text(TRANSOM)
    (folder / ".venv/bin/transom").chmod(0o755)
    (folder / ".venv/.transom-dev").write_text(f"{folder.resolve()}\n")
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs make as from a fresh shell: with nothing of the make that may be running this suite."""
    handed_down = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CHECKPOINT", "PRECISIONS", "PYTHON", "PIP_ARGS"}
    inherited = {name: value for name, value in os.environ.items() if name not in handed_down}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_make_alone_is_the_table_of_contents(workshop: Path) -> None:
    shown = make(workshop).stdout
    for target in ("help", "dev", "export", "check", "test", "test-wheel", "wheel", "clean"):
        assert f"  make {target} " in shown
    assert not (workshop / "calls").exists()


def test_make_export_knows_every_reference_model() -> None:
    from transom.export.reference_models import REFERENCE_MODELS

    (line,) = re.findall(r"^REFERENCES := (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert sorted(line.split()) == sorted(REFERENCE_MODELS)


def test_make_export_goes_on_after_a_failure_and_then_fails(workshop: Path) -> None:
    done = make(workshop, "export", "REFERENCES=vit minilm", BREAK="export vit --precision fp16")
    assert (workshop / "calls").read_text().splitlines() == [
        "transom export vit --precision fp32 --out bundles/vit --force",
        "transom selftest bundles/vit",
        "transom report bundles/vit --out reports/vit.html --force",
        "transom export vit --precision fp16 --out bundles/vit-fp16 --force",
        "transom export minilm --precision fp32 --out bundles/minilm --force",
        "transom selftest bundles/minilm",
        "transom report bundles/minilm --out reports/minilm.html --force",
        "transom export minilm --precision fp16 --out bundles/minilm-fp16 --force",
        "transom selftest bundles/minilm-fp16",
        "transom report bundles/minilm-fp16 --out reports/minilm-fp16.html --force",
        "transom table bundles/vit bundles/minilm bundles/minilm-fp16",
    ]
    assert done.returncode != 0
    assert "make export: failed: vit in fp16;" in done.stderr


def test_make_export_takes_a_path_with_spaces_and_dollars(workshop: Path) -> None:
    (workshop / "my $HOME's model").mkdir()
    done = make(workshop, "export", "CHECKPOINT=my $HOME's model/", "PRECISIONS=bf16")
    assert done.returncode == 0, done.stderr
    assert (workshop / "calls").read_text().splitlines() == [
        "transom export my $HOME's model/ --precision bf16 --out bundles/my $HOME's model-bf16 --force",
        "transom selftest bundles/my $HOME's model-bf16",
        "transom report bundles/my $HOME's model-bf16 --out reports/my $HOME's model-bf16.html --force",
        "transom table bundles/my $HOME's model-bf16",
    ]


@pytest.mark.parametrize("wrong", ["selftest bundles/vit-fp16", "report bundles/vit", "table"])
def test_make_export_fails_with_its_checks_and_its_table(workshop: Path, wrong: str) -> None:
    assert make(workshop, "export").returncode == 0
    assert make(workshop, "export", BREAK=wrong).returncode != 0


@pytest.mark.parametrize("damage", ["unfinished", "moved", "no python"])
def test_a_damaged_environment_is_made_again(workshop: Path, damage: str) -> None:
    assert "-m venv" not in make(workshop, "--dry-run", "dev").stdout
    if damage == "unfinished":
        (workshop / ".venv/.transom-dev").unlink()
    elif damage == "moved":
        workshop = workshop.rename(workshop.with_name("elsewhere"))
    else:
        (workshop / ".venv/bin/python").unlink()
    assert "python3 -m venv --clear .venv" in make(workshop, "--dry-run", "dev").stdout


def test_a_newer_pyproject_updates_the_environment(workshop: Path) -> None:
    os.utime(workshop / ".venv/.transom-dev", (0, 0))
    planned = make(workshop, "--dry-run", "dev").stdout
    assert "-e '.[dev]'" in planned
    assert "-m venv" not in planned


def test_an_old_python_is_named_before_anything_is_made(workshop: Path) -> None:
    shutil.rmtree(workshop / ".venv")
    old = workshop / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.10" || exit 1\n')
    old.chmod(0o755)
    done = make(workshop, "dev", "PYTHON=./python3.8")
    assert done.returncode != 0
    assert "PYTHON=./python3.8 is 'Python 3.8.10'; Transom needs Python 3.11 or newer" in done.stderr
    assert not (workshop / ".venv").exists()
