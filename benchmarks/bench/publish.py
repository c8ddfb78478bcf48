"""Write results into docs/results/ under the processor's name, and the README's table from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.paths import Paths
from bench.run import save
from bench.table import circumstances, page, summary

MARKERS = "<!-- bench: begin -->", "<!-- bench: end -->"


class PublishError(Exception):
    """The README has no place for the table, or there are no results."""


def name_of(results: dict[str, Any]) -> str:
    """Return the files' name without an ending: bench-amd-epyc-family-26-model-2-avx512_vnni."""
    cpu = re.sub(r"\(r\)|\(tm\)|@.*|\d+-core processor|processor|cpu", " ", results["cpu"].lower())
    return f"bench-{'-'.join(re.findall(r'[a-z0-9]+', cpu))}-{results['instruction_set']}"


def publish(repo: Path, paths: Paths, results: dict[str, Any] | None = None) -> list[Path]:
    """Write JSON, Markdown and SVG, then the README's table; return the files.

    Without ``results`` all is made again from the JSON that lies in docs/results/. Raises PublishError.
    """
    from bench.plot import draw

    folder = repo / "docs" / "results"
    if results is None:
        known = sorted(folder.glob("bench-*.json"))
        if not known:
            raise PublishError(f"{folder} has no bench-*.json; run `make bench`")
        results = json.loads(known[-1].read_text(encoding="utf-8"))
    assert results is not None
    folder.mkdir(parents=True, exist_ok=True)
    name = name_of(results)
    written = readme_with(results, (repo / "README.md").read_text(encoding="utf-8"))
    files = [folder / f"{name}{ending}" for ending in (".json", ".md", ".svg")]
    partial = paths.root / f"{name}.svg.partial"
    paths.root.mkdir(parents=True, exist_ok=True)
    draw(results, partial)
    save(files[0], results)
    replace_text(files[1], page(results, f"{name}.svg"))
    replace_text(files[2], partial.read_text(encoding="utf-8"))
    partial.unlink()
    replace_text(repo / "README.md", written)
    return [*files, repo / "README.md"]


def readme_with(results: dict[str, Any], readme: str) -> str:
    """Return the README with its table between MARKERS renewed. Raises PublishError."""
    begin, end = MARKERS
    if begin not in readme or end not in readme.partition(begin)[2]:
        raise PublishError(f"README.md lacks the lines {begin} and {end}; put them where the table belongs.")
    head, _, rest = readme.partition(begin)
    name = name_of(results)
    more = f"[Every variant, errors, spread](docs/results/{name}.md),\n[plot](docs/results/{name}.svg)."
    block = f"{circumstances(results)}\n{more}\n\n{summary(results)}"
    return f"{head}{begin}\n{block}\n{end}{rest.partition(end)[2]}"


def replace_text(path: Path, text: str) -> None:
    """Replace a file whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
