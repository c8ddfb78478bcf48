"""Makes the 1,000 retrieval pairs that score sentence embeddings, out of a folder of WordNet 3.0.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet        (Debian's 1:3.0-37)
    python examples/make_wordnet_pairs.py wordnet/usr/share/wordnet export/data/wordnet_pairs.tsv

One line is one noun synset: its definition, a tab, its words (``medal, medallion``). A synset is taken when the two
sides mean the same, in different words, and nothing else among the thousand means it too:

case 1  its words are those that have a single sense in all of WordNet; one of them occurs in SemCor (is not rare);
case 2  the definition has 4 to 30 words and shares at most one content word with the other side;
case 3  it carries no field (medicine, slang, slur, ...) and is fit for any reader;
case 4  no other taken synset has its definition, one of its words, or one of its direct hypernyms.

They are taken by ascending SHA-256 of "seed:offset", which no version of Python or numpy can change.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 20
PAIRS = 1000
DEFINITION_WORDS = range(4, 31)
SHARED_WORDS = 1
FIELD = {";c", ";u"}  # wndb(5): domain of synset, topic and usage
HYPERNYM = {"@", "@i"}
FUNCTION_WORDS = """
a about an and any are as at be been being but by for from had has have he her his i in into is it its no not of off on
one or other out over she some someone something such that the their them they this to too up used very was we were
which who whom whose with you your
"""
STOP_WORDS = frozenset(FUNCTION_WORDS.split())
ENDINGS = ("ingly", "edly", "ing", "ed", "ly", "es", "s", "er", "e")
UNFIT = re.compile(
    r"\b(sex\w*|breasts?|genital\w*|testi[sc]\w*|penis|vagina\w*|prostitut\w*|whore\w*|rap(?:e|ed|ist)|murder\w*|"
    r"suicid\w*|nazi\w*|negro\w*|blacks?|jew\w*|muslims?|gays?|homosexual\w*|slave\w*|wom[ae]n|girls?|fat|incest|"
    r"drunk\w*|excre\w*|urin\w*|feces|vomit\w*|naked|nud\w*|ass|arse|damn\w*|hell|stupid\w*|idiot\w*|offensive|pejorative|insan\w*|races?)\b"
)


@dataclass(frozen=True)
class Synset:
    offset: str
    words: tuple[str, ...]
    pointers: tuple[tuple[str, str], ...]  # (symbol, offset)
    definition: str

    @property
    def hypernyms(self) -> set[str]:
        return {offset for symbol, offset in self.pointers if symbol in HYPERNYM}


def synsets(file: Path) -> Iterator[Synset]:
    """Every line of a data file, in the fields of wndb(5)."""
    for line in file.read_text("latin-1").splitlines():
        if line.startswith("  "):  # the licence at the head
            continue
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        last_word = 4 + 2 * int(fields[3], 16)
        pointers = fields[last_word + 1 : last_word + 1 + 4 * int(fields[last_word])]
        yield Synset(
            fields[0],
            tuple(re.sub(r"\(\w+\)$", "", word) for word in fields[4:last_word:2]),
            tuple(zip(pointers[::4], pointers[1::4], strict=True)),
            gloss.split('"')[0].strip(" ;"),
        )


def content(text: str) -> set[str]:
    """The words that carry meaning, cut back to a crude stem."""
    stems = set()
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in STOP_WORDS or len(word) < 3:
            continue
        ending = next((e for e in ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "")
        stems.add(word.removesuffix(ending))
    return stems


def fitting(synset: Synset, senses: Counter[str], common: set[str]) -> tuple[str, ...] | None:
    """The words of the synset's other side, where cases 1 to 3 hold."""
    words = tuple(w for w in synset.words if senses[w.lower()] == 1 and re.fullmatch(r"[a-z_-]+", w))
    if not common.intersection(words) or any(symbol in FIELD for symbol, _ in synset.pointers):
        return None
    spoken = " ".join(words).replace("_", " ")
    if len(synset.definition.split()) not in DEFINITION_WORDS or not synset.definition.isascii():
        return None
    if len(content(synset.definition) & content(spoken)) > SHARED_WORDS:
        return None
    return None if UNFIT.search(f"{synset.definition} {spoken}".lower()) else words


def pairs(folder: Path) -> tuple[list[tuple[str, str]], int]:
    """(definition, words) of the PAIRS that are taken, by alphabet of the words; and how many there were."""
    found = candidates(folder)
    return sorted(found[:PAIRS], key=lambda made: made[1]), len(found)


def candidates(folder: Path) -> list[tuple[str, str]]:
    """(definition, words) of every pair where cases 1 to 4 hold; the first PAIRS of them score."""
    senses = Counter(
        word
        for part in ("noun", "verb", "adj", "adv")
        for synset in synsets(folder / f"data.{part}")
        for word in {w.lower() for w in synset.words}
    )
    tagged = (folder / "cntlist.rev").read_text("ascii").splitlines()  # "medal%1:06:00:: 1 2"; 1 is a noun
    common = {line.split("%")[0] for line in tagged if "%1:" in line}
    nouns = sorted(
        synsets(folder / "data.noun"), key=lambda s: hashlib.sha256(f"{SEED}:{s.offset}".encode()).hexdigest()
    )
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    for synset in nouns:
        words = fitting(synset, senses, common)
        claims = {synset.definition, *synset.hypernyms}  # words need no claim: each has a single sense
        if words is not None and not seen & claims:
            seen |= claims
            found.append((synset.definition, ", ".join(words).replace("_", " ")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="folder with data.noun, data.verb, ... and cntlist.rev")
    parser.add_argument("out", type=Path, help="the TSV to write")
    arguments = parser.parse_args()
    taken, available = pairs(arguments.wordnet)
    if len(taken) < PAIRS:
        parser.error(f"{arguments.wordnet} yields {len(taken)} pairs, {PAIRS} are needed: is it WordNet 3.0?")
    arguments.out.write_text("".join(f"{definition}\t{words}\n" for definition, words in taken), "ascii")
    print(f"{len(taken)} of {available} pairs, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
