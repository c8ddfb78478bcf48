"""Open calibration data: real samples of a built-in set or from the user's files, read one at a time.

Ranges are no better than the inputs they are taken on. Random inputs give ranges that no real input has, so they are
refused; so are sets too small to give a range that is more than chance.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from transom.calib.builtin_sets import NAMES, builtin_set
from transom.calib.npz_reader import NpzRows
from transom.calib.readers import ImageFolder, JsonLines, TextLines
from transom.calib.samples import IMAGE, PARTS, TEXT, Sample, Source, printable
from transom.runtime.errors import CalibrationError

__all__ = ["MIN_SAMPLES", "NAMES", "CalibrationData", "Sample", "open_calibration_data"]

MIN_SAMPLES = 8  # of fewer, a single unusual input sets the range of every tensor
MAX_SAMPLES = 1_000_000  # more would take days, and ranges settle after hundreds
RANDOM = ("random", "noise")
FILES: dict[str, Callable[[Path], Source]] = {".txt": TextLines, ".jsonl": JsonLines, ".npz": NpzRows}
KINDS_OF_FILES = "a .txt, .jsonl or .npz file, or a folder of images"


class Entry(NamedTuple):
    """The part of a sample that is kept in memory."""

    name: str
    digest: bytes
    kinds: frozenset[str]


class LazySamples(Sequence[Sample]):
    """Samples of several sources, some or all of them, each read when it is accessed."""

    def __init__(self, sources: Sequence[Source], chosen: NDArray[np.int64]) -> None:
        self._sources = sources
        self._ends = list(accumulate(len(source) for source in sources))
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> LazySamples: ...

    def __getitem__(self, index: int | slice) -> Sample | LazySamples:
        if isinstance(index, slice):
            return LazySamples(self._sources, self._chosen[index])
        return self.sample(range(len(self))[index])

    def sample(self, index: int) -> Sample:
        place = int(self._chosen[index])
        source = bisect_right(self._ends, place)
        return self._sources[source].sample(place - self._ends[source] + len(self._sources[source]))


@dataclass(frozen=True)
class CalibrationData:
    """Samples under a name. ``samples`` is lazy; ``sha256``, in hex, is over their names and contents in order."""

    name: str
    samples: LazySamples
    sha256: str
    entries: tuple[Entry, ...]

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of input in the samples: "text", "image", names of raw inputs."""
        return frozenset().union(*(entry.kinds for entry in self.entries))

    def split(self, parts: int, part: int = 0) -> tuple[CalibrationData, CalibrationData]:
        """Return (calibration, held out): the part number ``part`` of ``parts`` is held out; no two share a sample.

        Order is kept; the same call gives the same samples. Raises CalibrationError as ``part_numbers`` does.
        """
        if parts < 2 or not 0 <= part < parts:
            raise CalibrationError(f"part {part} of {parts} is to be held out; expected one of at least two parts.")
        held_out = self.part_numbers(parts) == part
        kept = self._part("for calibration", np.flatnonzero(~held_out))
        return kept, self._part("held out", np.flatnonzero(held_out))

    def part_numbers(self, parts: int) -> NDArray[np.int64]:
        """Return the part, 0..parts-1, of each sample: (N,).

        Samples are dealt to the parts at random, those of equal contents together. Raises CalibrationError where there
        are fewer distinct samples than parts.
        """
        groups: dict[bytes, list[int]] = {}
        for index, entry in enumerate(self.entries):
            groups.setdefault(entry.digest, []).append(index)
        if len(groups) < parts:
            raise CalibrationError(
                f"{self.name} has {len(self.entries)} samples, {len(groups)} distinct: too few for {parts} parts, one "
                "of them held out. Give more."
            )
        members = list(groups.values())
        shuffled = np.random.RandomState(0).permutation(len(groups))  # a stream that no version of numpy changes
        numbers = np.empty(len(self.entries), np.int64)
        for place, group in enumerate(shuffled):
            numbers[members[group]] = place % parts
        return numbers

    def chunks(self, size: int) -> Iterator[CalibrationData]:
        """Yield the samples ``size`` at a time, in their order."""
        for start in range(0, len(self.entries), size):
            entries = self.entries[start : start + size]
            yield CalibrationData(self.name, self.samples[start : start + size], sha256_of(entries), entries)

    def _part(self, which: str, chosen: NDArray[np.int64]) -> CalibrationData:
        entries = tuple(self.entries[index] for index in chosen)
        return CalibrationData(
            f"{self.name} ({len(chosen)} of {len(self.entries)}, {which})",
            LazySamples([self.samples], chosen),
            sha256_of(entries),
            entries,
        )


def open_calibration_data(given: Sequence[str]) -> CalibrationData:
    """Open calibration data: names among NAMES, files, folders, or several of them.

    Everything is read once, in pieces, to be checked and hashed; a sample is read again when it is asked for.
    Raises CalibrationError for what cannot be read, for random data, and where fewer than MIN_SAMPLES distinct
    texts, images or raw inputs are there.
    """
    if isinstance(given, str) or not given:
        got = repr(given)[:60] if given else "nothing"
        raise CalibrationError(
            f"calibration data is {got}; expected a list of names ({', '.join(NAMES)}) or files: {KINDS_OF_FILES}."
        )
    names, sources = zip(*(open_source(str(each)) for each in given), strict=True)
    count = sum(len(source) for source in sources)
    name = " + ".join(names)
    if count > MAX_SAMPLES:
        raise CalibrationError(
            f"{name} holds {count} samples, at most {MAX_SAMPLES} are read; some hundreds do. Choose among them."
        )
    samples = LazySamples(sources, np.arange(count))
    entries = tuple(Entry(sample.name, sample.digest(), sample.kinds) for sample in samples)
    require_enough(name, entries)
    return CalibrationData(name, samples, sha256_of(entries), entries)


def open_source(given: str) -> tuple[str, Source]:
    """Open one name, file or folder; return (name, samples)."""
    if given in NAMES:
        return given, builtin_set(given)
    path = Path(given)
    if given.casefold() in RANDOM:
        raise CalibrationError(
            f"calibration data {given!r} is refused: random inputs have ranges that no real input has, and the "
            f"quantised model would be wrong where it is used. Give {KINDS_OF_FILES}, or one of {', '.join(NAMES)}."
        )
    try:
        if given and path.is_dir():
            return printable(path.resolve().name), ImageFolder(path)
        if path.is_file():
            opener = FILES.get(path.suffix.lower())
            if opener is not None:
                return printable(path.name), opener(path)
            raise CalibrationError(f"calibration data {given} is no file of a known kind; expected {KINDS_OF_FILES}.")
        found = "no regular file" if given and path.exists() else "not there"
    except (OSError, ValueError) as error:  # a path may be too long, or hold a zero byte
        found = f"not readable ({getattr(error, 'strerror', None) or error})"
    raise CalibrationError(
        f"calibration data {given!r:.200} is {found}; expected one of {', '.join(NAMES)}, or {KINDS_OF_FILES}."
    )


def require_enough(name: str, entries: Sequence[Entry]) -> None:
    """Raise CalibrationError unless there are MIN_SAMPLES distinct samples of each kind that there is."""
    kinds = frozenset().union(*(entry.kinds for entry in entries)) - {PARTS}  # which are counted as texts and images
    for kind in sorted(kinds) or ["sample"]:
        distinct = len({entry.digest for entry in entries if kind in entry.kinds})
        if distinct < MIN_SAMPLES:
            what = {TEXT: "text", IMAGE: "image", "sample": "sample"}.get(kind, f"sample of {kind!r}")
            raise CalibrationError(
                f"{name} holds {distinct} distinct {what}{'' if distinct == 1 else 's'}, at least {MIN_SAMPLES} are "
                "needed: of fewer, one unusual input sets every range. Some hundreds are better; add more."
            )


def sha256_of(entries: Sequence[Entry]) -> str:
    total = hashlib.sha256()
    for entry in entries:
        total.update(hashlib.sha256(entry.name.encode()).digest() + entry.digest)
    return total.hexdigest()
