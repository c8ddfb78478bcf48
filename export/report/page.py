"""The report of a bundle: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from transom.export.report.alignment import Alignment
from transom.export.report.heatmap import heatmap
from transom.runtime.bundle import Manifest

STYLE = """
:root { --paper: #fcfcfb; --ink: #1d1f22; --soft: #62666d; --line: #dfe1e4; --mark: #1f5fa8; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17191c; --ink: #e8e9eb; --soft: #9da2a9; --line: #34383d; --mark: #7db3f2; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2.5rem auto;
       max-width: 62rem; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p.sub { color: var(--soft); margin: .25rem 0 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.n, th.n { text-align: right; }
details { margin-top: .75rem; } summary { color: var(--soft); cursor: pointer; }
figure { margin: 0 0 2rem; overflow-x: auto; } figcaption { color: var(--soft); margin-bottom: .5rem; }
.heads { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .75rem; }
.heads div { color: var(--soft); font-size: .8rem; }
svg text { fill: var(--ink); font-family: ui-monospace, monospace; } svg .mark { fill: var(--mark); }
svg .frame { fill: none; stroke: var(--line); }
"""


def page(manifest: Manifest, pictures: Sequence[Alignment]) -> str:
    """The report as one string of HTML."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(manifest.name)} in {manifest.precision}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(manifest.name)}</h1>",
            f'<p class="sub">{escape(manifest.family)} for {escape(manifest.task)}, {manifest.precision}, from '
            f"{escape(str(manifest.source.get('checkpoint')))}</p>",
            facts(manifest),
            parity(manifest.parity),
            alignment_section(pictures),
            "</body></html>",
        ]
    )


def facts(manifest: Manifest) -> str:
    """Size, score and libraries."""
    size = sum(file.size for file in manifest.files.values())
    rows = [("size", f"{size / 2**20:.2f} MiB in {len(manifest.files)} files")]
    score = manifest.score
    if score:
        sides = ", ".join(f"{side} {score[side]['value']:.4f}" for side in ("pytorch", "bundle"))
        low, high = score["bundle"]["interval"]
        rows.append((str(score["name"]), f"{sides} (n = {score['n']}, 95 % {low:.4f} to {high:.4f}; {score['data']})"))
    rows.append(("made with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())))
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{body}</table>"


def parity(figures: Mapping[str, Any]) -> str:
    """The worst error, and every case behind a fold."""
    worst = figures.get("worst", {})
    cases = figures.get("cases", [])
    rows = "".join(
        f'<tr><td>{escape(sizes_text(case["sizes"]))}</td><td>{escape(tensor)}</td><td class="n">{error:.2e}</td></tr>'
        for case in cases
        for tensor, error in case["errors"].items()
    )
    return (
        "<h2>Against PyTorch</h2>"
        f"<p>Worst error {worst.get('error', 0):.2e} of {figures['tolerance']:g} allowed: "
        f"{escape(str(worst.get('tensor')))} at {escape(sizes_text(worst.get('sizes', {})))}.</p>"
        f"<details><summary>all {len(cases)} cases</summary><table><tr><th>case</th><th>output</th>"
        f'<th class="n">error</th></tr>{rows}</table></details>'
    )


def sizes_text(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def alignment_section(pictures: Sequence[Alignment]) -> str:
    """Per text the mean over heads of the last layer, then every head of every layer, small."""
    if not pictures:
        return ""
    return "<h2>Which source position each output attends to</h2>" + "".join(map(figure, pictures))


def figure(picture: Alignment) -> str:
    layers, heads = picture.weights.shape[:2]
    mean = heatmap(picture.weights[-1].mean(0), picture.target, picture.source)
    small = "".join(
        f"<div>layer {layer + 1}, head {head + 1}<br>"
        f"{heatmap(picture.weights[layer, head], picture.target, picture.source, cell=6, labels=False)}</div>"
        for layer in range(layers)
        for head in range(heads)
    )
    return (
        f"<figure><figcaption>Layer {layers} of {layers}, mean of {heads} heads; rows are outputs, columns the source."
        f"</figcaption>{mean}<details><summary>every head</summary>"
        f'<div class="heads">{small}</div></details></figure>'
    )
