"""Keep what an export computed in its long stages, so that one that is interrupted goes on where it stopped.

Kept are SmoothQuant's factors, the ranges of each CHUNK of samples, and each layer's sensitivity: JSON in the user's
cache folder, by a hash of all that they depend on. What took less than WORTH_SECONDS is not kept: writing and reading
it takes some of the time that it saves. Neither are outputs, which are large, nor parity, which is proven on the
artefact that ships. A bundle is the same with and without.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import transom.calib
import transom.export
import transom.runtime
from transom.runtime.bundle import Bundle
from transom.runtime.disk_cache import Cache, our_version
from transom.runtime.errors import TransomError
from transom.runtime.host import cpu_name, instruction_set, usable_cores
from transom.runtime.json_reader import parse_json

CHUNK = 100  # samples
WORTH_SECONDS = 5.0
KIND = "exports"
COSTS = "An export that is interrupted begins anew."

T = TypeVar("T")


class Format(Protocol[T]):
    """Writes results of one kind to JSON and reads them; ``read`` raises a TransomError for anything else."""

    def write(self, result: T) -> Any: ...

    def read(self, value: Any) -> T: ...


class Kept:
    """Results of the stages of one export of ``bundle``, the FP32 model: looked up, else computed and kept.

    Keys are hashes of the bundle's manifest, with every file in it, of this package's code and version, of the
    processor, and of what ``compute`` says.
    """

    def __init__(self, bundle: Bundle, clock: Callable[[], float] = time.monotonic) -> None:
        self._cache = Cache(KIND, COSTS)
        self._clock = clock
        made = json.dumps(bundle.manifest.to_json(), default=str, sort_keys=True)
        machine = (cpu_name(), instruction_set(), usable_cores())
        self._base = repr((our_version(), code_sha256(), machine, made))

    def compute(self, what: Mapping[str, Any], format: Format[T], compute: Callable[[], T]) -> T:
        """Return what is kept of ``what``, plain data with a stage's name and inputs; else what ``compute`` returns."""
        words = json.dumps(what, sort_keys=True)
        key = hashlib.sha256(f"{self._base}\n{words}".encode()).hexdigest()
        found = self._read(key, format)
        if found is not None:
            return found
        began = self._clock()
        result = compute()
        if self._clock() - began >= WORTH_SECONDS:
            data = json.dumps(format.write(result), separators=(",", ":")).encode()
            self._cache.add(key, lambda path: path.write_bytes(data))
        return result

    def _read(self, key: str, format: Format[T]) -> T | None:
        path = self._cache.entry(key)
        try:
            if path is None or not path.is_file():
                return None
            result = format.read(parse_json(path.read_bytes(), str(path)))
        except (OSError, TransomError):  # damaged: computed anew, and replaced
            return None
        self._cache.used(key)
        return result


class KeepsNothing(Kept):
    """Computes everything, as ``--no-resume`` asks."""

    def __init__(self) -> None:
        pass

    def compute(self, what: Mapping[str, Any], format: Format[T], compute: Callable[[], T]) -> T:
        """Return what ``compute`` returns."""
        return compute()


@cache
def code_sha256() -> str:
    """Return the SHA-256 of this package's own code: a change of it may change a result, whatever the version says."""
    total = hashlib.sha256()
    for package in (transom.calib, transom.export, transom.runtime):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            total.update(f"{package.__name__}/{path.relative_to(folder)}".encode() + path.read_bytes())
    return total.hexdigest()


class Number:
    """A finite float."""

    def write(self, result: float) -> Any:
        return result

    def read(self, value: Any) -> float:
        if type(value) is not float:
            raise TransomError(f"{value!r:.40} is no number.")
        return value
