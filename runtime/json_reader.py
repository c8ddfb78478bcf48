"""Read untrusted JSON: parse it within limits, then check it field by field, all problems reported at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from transom.runtime.errors import BundleError

MAX_DEPTH = 32  # files of Transom have 6
MAX_PROBLEM = 300  # characters of one problem in a message


def parse_json(data: bytes, what: str) -> Any:
    """Parse UTF-8 JSON; BundleError on NaN, Infinity, a key given twice, or nesting without end."""
    try:
        value = json.loads(data, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_object)
        _check_depth(value)
        return value
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BundleError(f"{what} is not usable JSON ({reason[:200]}); copy the bundle again.") from None


def _check_depth(value: Any) -> None:
    """Raise ValueError for values nested so deeply that a recursive reader would run out of stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [part for item in inner if isinstance(item, list) for part in item]
    if level:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is out of range")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


class Fields:
    """Reader of one JSON object: each ``take`` checks a field and notes what is wrong with it.

    Nothing is raised until ``done``, which raises one BundleError with every problem noted, among
    them the keys that were not taken.
    """

    def __init__(self, value: Any, where: str, problems: list[str] | None = None) -> None:
        self.where = where
        self.problems = [] if problems is None else problems
        self._nested = problems is not None
        self._left = dict(value) if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            self.problems.append(f"{where} is a {type(value).__name__}, expected an object")

    def take(self, key: str, check: Callable[[Any], bool], expected: str, default: Any = ...) -> Any:
        """Return the value of ``key`` if it passes ``check``; else ``default``, a problem unless absent and optional.

        A required field that is wrong gives None: the caller goes on and ``done`` raises.
        """
        if key not in self._left:
            if default is ...:
                self.problems.append(f"{self.where}.{key} is missing")
                return None
            return default
        value = self._left.pop(key)
        if check(value):
            return value
        self.problems.append(f"{self.where}.{key} is {repr(value)[:60]}, expected {expected}")
        return None if default is ... else default

    def text(self, key: str, default: Any = ..., among: Iterable[str] = ()) -> Any:
        allowed = tuple(among)
        expected = f"one of {', '.join(allowed)}" if allowed else "a string"
        return self.take(key, lambda v: isinstance(v, str) and (not allowed or v in allowed), expected, default)

    def integer(self, key: str, least: int, most: int, default: Any = ...) -> Any:
        return self.take(key, lambda v: type(v) is int and least <= v <= most, f"{least}..{most}", default)

    def boolean(self, key: str, default: Any = ...) -> Any:
        return self.take(key, lambda v: isinstance(v, bool), "true or false", default)

    def mapping(self, key: str, default: Any = ...) -> Any:
        found = self.take(key, lambda v: isinstance(v, dict), "an object", default)
        return {} if found is None and default is ... else found

    def sequence(self, key: str, default: Any = ...) -> Any:
        found = self.take(key, lambda v: isinstance(v, list), "an array", default)
        return [] if found is None and default is ... else found

    def done(self) -> None:
        """Raise BundleError if anything was wrong; objects inside another leave that to the outermost."""
        self.problems += [f"{self.where} has the unknown key {key!r}" for key in self._left]
        self._left = {}
        if self.problems and not self._nested:
            shown = "; ".join(map(shortened, self.problems[:8]))
            more = f" (and {len(self.problems) - 8} more)" if len(self.problems) > 8 else ""
            raise BundleError(f"{shown}{more}. The bundle is damaged or not one of Transom; export it again.")


def shortened(problem: str) -> str:
    """Return a problem on one line of at most MAX_PROBLEM characters, whatever keys of the file it quotes."""
    problem = problem if len(problem) <= MAX_PROBLEM else f"{problem[:MAX_PROBLEM]}..."
    return problem if problem.isprintable() else problem.encode("unicode_escape").decode()
