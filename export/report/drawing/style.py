"""How the page looks: one accent and one warm colour against it, light or dark as the reader's system says."""

from __future__ import annotations

STYLE = """
:root {
  --paper: 252 252 251; --ink: 27 30 34; --soft: 93 98 106; --line: 223 225 229;
  --mark: 28 93 168; --warm: 204 92 24; --limit: 190 38 48; color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: 22 24 27; --ink: 231 233 236; --soft: 158 164 173; --line: 52 57 63;
    --mark: 116 176 245; --warm: 246 158 92; --limit: 255 122 122;
  }
}
* { box-sizing: border-box; }
body {
  background: rgb(var(--paper)); color: rgb(var(--ink)); font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; margin: 0 auto; max-width: 64rem; padding: 2.5rem 1.25rem 4rem;
}
h1 { font-size: 2rem; letter-spacing: -.015em; line-height: 1.15; margin: 0; overflow-wrap: anywhere; }
h2 { border-top: 1px solid rgb(var(--line)); font-size: 1.2rem; margin: 3rem 0 .75rem; padding-top: 1.1rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 1.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
footer { color: rgb(var(--soft)); font-size: .85rem; margin-top: 3rem; }
.soft, figcaption, summary, th { color: rgb(var(--soft)); }
.limit { color: rgb(var(--limit)); }
.nb { white-space: nowrap; }
.scroll { overflow-x: auto; }
details { margin-top: .9rem; }
summary { cursor: pointer; }
details[open] summary { margin-bottom: .6rem; }
figure { margin: 1rem 0 2.25rem; }
figcaption { font-size: .88rem; margin: .2rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }
figcaption b { color: rgb(var(--ink)); font-weight: 600; }

/* The headline */
.verdict { font-size: 1.15rem; margin: 1.4rem 0 1.6rem; max-width: none; }
.verdict b { font-weight: 600; }
.tiles { display: grid; gap: 1.25rem 2rem; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); margin: 0; }
.tiles div { border-top: 2px solid rgb(var(--mark)); display: flex; flex-direction: column; padding-top: .55rem; }
.tiles dt { font-size: .9rem; overflow-wrap: anywhere; }
.tiles dd { margin: 0; overflow-wrap: anywhere; }
.tiles dd.big { font-size: 1.7rem; letter-spacing: -.02em; line-height: 1.25; order: -1; }
.tiles dd.small { color: rgb(var(--soft)); font-size: .85rem; }

/* Tables, and bars in them */
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td {
  border-bottom: 1px solid rgb(var(--line)); padding: .32rem 1.1rem .32rem 0; text-align: left;
  vertical-align: baseline;
}
th { font-weight: 500; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
td.name { overflow-wrap: anywhere; }
td:last-child, th:last-child { padding-right: 0; }
tr.sum td { border-bottom: 0; font-weight: 600; }
td.bar { min-width: 6rem; width: 40%; }
td.bar i { background: rgb(var(--mark) / .3); display: block; height: .6rem; }
td.bar i b { background: rgb(var(--mark)); display: block; height: 100%; }

/* Charts: a column of names, a column of drawings; on a phone one below the other */
.rows {
  align-items: center; display: grid; gap: .55rem 1.25rem; grid-template-columns: 13.5rem minmax(0, 1fr);
}
.rows.named { font-size: .9rem; grid-template-columns: 21rem minmax(0, 1fr); }
.rows > div { line-height: 1.3; min-width: 0; overflow-wrap: anywhere; }
.rows small { color: rgb(var(--soft)); display: block; font-size: .8rem; }
svg { display: block; }
svg text { fill: rgb(var(--soft)); font: 12px system-ui, sans-serif; }
svg text.mono { fill: rgb(var(--ink)); font-family: ui-monospace, monospace; }
svg .mark { fill: rgb(var(--mark)); }
svg .warm { fill: rgb(var(--warm)); }
svg .veil { fill: rgb(128 128 128); }
svg .frame { fill: none; stroke: rgb(var(--line)); }
svg .rule { stroke: rgb(var(--line)); }
svg .average { stroke: rgb(var(--ink)); stroke-dasharray: 2 3; }
svg .reach { stroke: rgb(var(--mark)); stroke-width: 2; }
svg .end { stroke: rgb(var(--limit)); stroke-dasharray: 3 3; stroke-width: 1.5; }
svg text.in { fill: rgb(var(--ink)); }
svg text.on { fill: rgb(var(--paper)); }
svg text.end { fill: rgb(var(--limit)); stroke: none; }
.key {
  align-items: center; color: rgb(var(--soft)); display: flex; flex-wrap: wrap; font-size: .8rem;
  gap: .25rem .5rem; margin: .5rem 0;
}
.key i { background: rgb(var(--mark) / var(--p)); height: .8rem; outline: 1px solid rgb(var(--line)); width: 1.6rem; }
.key i.w { background: rgb(var(--warm) / var(--p)); }
.key i.v { background: rgb(128 128 128 / var(--p)); }
.key span { margin-right: .5rem; white-space: nowrap; }
.key span i { display: inline-block; margin-right: .4rem; vertical-align: -.15rem; }

/* Attention: a row per layer, a column per head */
.heads {
  align-items: center; display: grid; gap: 6px; grid-template-columns: 3.6rem repeat(var(--n), minmax(0, 7rem));
}
.heads span { color: rgb(var(--soft)); font-size: .75rem; text-align: center; }
.heads span.l { text-align: left; }
.heads svg, .tiled svg, .seen svg { height: auto; outline: 1px solid rgb(var(--line)); width: 100%; }
.heads svg.chosen { outline: 2px solid rgb(var(--warm)); }

/* Images and maps of their patches */
.tiled { display: grid; gap: 10px; grid-template-columns: repeat(var(--n), minmax(0, 6rem)); }
.seen { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.seen.large { grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); }
.seen .pair { display: grid; gap: 4px; grid-template-columns: 1fr 1fr; }
.seen small { color: rgb(var(--soft)); display: block; font-size: .8rem; margin-top: .3rem; overflow-wrap: anywhere; }
.pixels { image-rendering: pixelated; }

/* A text, token by token */
.text { font: 1.02rem/1.95 Georgia, serif; white-space: pre-wrap; }
.text span { background: rgb(var(--warm) / var(--p)); border-radius: 2px; padding: .12em 0; }

/* Images against texts */
table.matrix { width: auto; }
.matrix td { border: 1px solid rgb(var(--paper)); vertical-align: middle; }
.matrix th {
  border: 0; font-size: .8rem; max-width: 8rem; min-width: 3.6rem; overflow-wrap: anywhere; padding: .2rem .4rem;
  text-align: center; vertical-align: bottom;
}
.matrix td.shade { background: rgb(var(--mark) / var(--p)); padding: .3rem .5rem; text-align: center; }
.matrix td.top { outline: 2px solid rgb(var(--mark)); outline-offset: -2px; }
.matrix img { display: block; height: auto; max-height: 5rem; max-width: 7rem; min-width: 2.6rem; }

@media (max-width: 44rem) {
  body { padding-top: 1.5rem; }
  h1 { font-size: 1.6rem; }
  th, td { padding-right: .7rem; }
  td.bar { min-width: 3rem; width: 25%; }
  .tiles { gap: 1rem; grid-template-columns: 1fr 1fr; }
  .tiles dd.big { font-size: 1.35rem; }
  .rows, .rows.named { gap: .15rem; grid-template-columns: minmax(0, 1fr); }
  .rows > div:nth-child(odd) { margin-top: .7rem; }
  .heads { gap: 4px; grid-template-columns: 1.3rem repeat(var(--n), minmax(0, 1fr)); }
  .heads .wide { display: none; }
  .seen.large { grid-template-columns: minmax(0, 1fr); }
}
"""
