"""Compile the native library with the package, where there is a C compiler; pyproject.toml says everything else.

TRANSOM_PURE=1 leaves it out: a wheel for any system, which runs its bundles with ONNX Runtime alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path(__file__).resolve().parent / "runtime" / "native"
PURE = os.environ.get("TRANSOM_PURE") == "1"


def build_module() -> ModuleType:
    """Return runtime/native/build.py: the package that it belongs to is not installed yet."""
    spec = importlib.util.spec_from_file_location("transom_native_build", NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BUILD = build_module()


class BuildWithLibrary(build_py):
    """Copies the packages; compiles the library beside them, for editable installations where the sources are."""

    def run(self) -> None:
        """Without a compiler the package is whole all the same: it says so, and runs with ONNX Runtime."""
        super().run()
        if PURE:
            return
        folder = NATIVE if self.editable_mode else Path(self.build_lib, "transom", "runtime", "native")
        try:
            BUILD.compile_library(folder / BUILD.LIBRARY)
        except BUILD.BuildError as error:
            self.warn(f"transom is installed without its native kernels: {error}")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Name the library among the files of the build, where there is one."""
        library = Path(self.build_lib, "transom", "runtime", "native", BUILD.LIBRARY)
        return [*super().get_outputs(include_bytecode), *([str(library)] if library.is_file() else [])]


class PlatformWheel(bdist_wheel):
    """A wheel with the library is one system's, for any Python: it is loaded by ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return ``py3-none-linux_x86_64``, or ``py3-none-any`` where nothing was compiled."""
        library = Path(self.bdist_dir or "", "transom", "runtime", "native", BUILD.LIBRARY)
        self.root_is_pure = not library.is_file()
        if self.root_is_pure:
            return super().get_tag()
        self.plat_name_supplied = False
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel})
