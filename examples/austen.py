"""Jane Austen's six novels as text for training, and the chapters of them that no reference model trains on.

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb janeausten
    python examples/austen.py janeausten export/data/austen_heldout.txt

writes the held-out chapters. The novels (1811 to 1817, public domain) are Project Gutenberg's as Julia Silge's R
package janeaustenr has them; Debian ships that package as r-cran-janeaustenr, and any system unpacks a .deb with
``ar x`` and ``tar x``.
"""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path

DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
STRINGS, STRING, MISSING = 16, 9, -1  # R's types STRSXP and CHARSXP; the length that stands for NA
HEADING = re.compile(r"chapter [0-9IVXL]+\.?", re.IGNORECASE)
NOT_HERS = re.compile(r"finis|the end|volume [IVX]+|\[(end volume|at this point).*", re.IGNORECASE)
NOTE = "A NOTE ON THE TEXT"  # a publisher's, at the end of Northanger Abbey
HELD_OUT, DEV = 20, 10  # which chapter of every novel, counted through its volumes from 1


def novels(package: Path) -> dict[str, list[str]]:
    """Title ("EMMA") -> lines of each novel, in the package's order. ``package`` is the unpacked .deb.

    Lazy-load databases of R: each object is its size as four bytes, big end first, and a zlib stream.
    """
    data = (package / DATABASE).read_bytes()
    found = {}
    while data:
        stream = zlib.decompressobj()
        raw = stream.decompress(data[4:])
        if len(raw) != int.from_bytes(data[:4], "big"):
            raise ValueError(f"{DATABASE} has an object of {len(raw)} bytes; its header says otherwise.")
        lines = character_vector(raw)
        found[lines[0].strip()] = lines
        data = stream.unused_data
    return found


def character_vector(raw: bytes) -> list[str]:
    """A character vector from R's binary serialisation, version 3 (R Internals, "Serialization Formats")."""
    position = 2

    def integer() -> int:
        nonlocal position
        position += 4
        return int.from_bytes(raw[position - 4 : position], "big", signed=True)

    version, _, _ = integer(), integer(), integer()
    if raw[:2] != b"X\n" or version != 3:
        raise ValueError(f"expected R's XDR serialisation, version 3, and found {raw[:6]!r}.")
    name = integer()  # length of the name of its writer's encoding
    position += name
    if (kind := integer() & 0xFF) != STRINGS:
        raise ValueError(f"expected a character vector and found R's type {kind}.")
    lines = []
    for _ in range(integer()):
        if (kind := integer() & 0xFF) != STRING or (length := integer()) == MISSING:
            raise ValueError(f"line {len(lines)} is no string: R's type {kind}, or NA.")
        lines.append(raw[position : position + length].decode("utf-8"))
        position += length
    return lines


def chapters(lines: list[str]) -> list[str]:
    """A novel's chapters without their headings: one paragraph per line, no marks of emphasis ("_")."""
    starts = [number for number, line in enumerate(lines) if HEADING.fullmatch(line.strip())]
    found = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        text = "\n".join(line.strip() for line in lines[start + 1 : end]).partition(NOTE)[0]
        paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\n+", text))
        found.append(
            "\n".join(part.replace("_", "") for part in paragraphs if part and not NOT_HERS.fullmatch(part)) + "\n"
        )
    return found


def split(package: Path, *, dev: bool = False) -> tuple[list[str], list[str]]:
    """The chapters that train, and those, one of every novel, that score.

    With ``dev`` the held-out chapters are in neither: others, for choosing settings, take their place.
    """
    train, test = [], []
    for lines in novels(package).values():
        for number, chapter in enumerate(chapters(lines), 1):
            if number == (DEV if dev else HELD_OUT):
                test.append(chapter)
            elif number != HELD_OUT:
                train.append(chapter)
    return train, test


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    _, test = split(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text("".join(test), encoding="utf-8")


if __name__ == "__main__":
    main()
