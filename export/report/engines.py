"""The TensorRT engines in a bundle: what they are for, what fused in each and what did not, and their kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transom.export.report.drawing.chart import LinearAxis, bar, drawing
from transom.export.report.drawing.markup import figure, folded, numeric, section, table, words
from transom.export.report.drawing.numbers import at, bytes_text, count_text, items, whole
from transom.export.report.kernels import (
    ATTENTION,
    CHAINS,
    INTEGERS,
    KINDS,
    MOVES,
    PRODUCTS,
    SINGLE,
    UNNAMED,
    Kernels,
    kernels_from_json,
    list_of,
    texts,
)
from transom.runtime.manifest import Manifest

MOST_ENGINES = 64  # profiles of graphs for targets: a row each
MOST_NODES = 12  # that are named one by one
MOST_LISTED = 400  # kernels by name, on the whole page
BAR = 20  # pixels
ROOM = 5.0  # percent of the width that a number in a bar needs
GPUS = {
    "rtx-sm75": "Turing: RTX 20, T4",
    "rtx-sm80": "Ampere: A100, A30",
    "rtx-sm86": "Ampere: RTX 30, A10",
    "rtx-sm89": "Ada: RTX 40, L4, L40",
    "rtx-sm120": "Blackwell: RTX 50",
    "rtx-sm121": "Blackwell: DGX Spark",
    "tensorrt": "the GPU that built it",
}
LOOKS = {  # of a kind of kernel: the colour, how much of it, and the letters on it
    ATTENTION: ("mark", 1.0, "on"),
    INTEGERS: ("mark", 0.55, "in"),
    PRODUCTS: ("mark", 0.25, "in"),
    CHAINS: ("veil", 0.3, "in"),
    MOVES: ("warm", 0.4, "in"),
    SINGLE: ("warm", 1.0, "on"),
    UNNAMED: ("veil", 0.1, "in"),
}
KEYS = {"mark": "", "warm": ' class="w"', "veil": ' class="v"'}
EXPLAINED = (
    "<b>What the kernels are.</b> A bar has all kernels of a graph in one profile, in blue what multiplies matrices; "
    "all bars are to one scale. Fused elementwise are several steps in one kernel, such as a sum, a normalisation and "
    "the rounding to integers: each kernel less is a trip to memory less. Kinds are judged by the builder's names."
)
PROOF = (
    '<p class="soft">What fused is read from the builder\'s log. That needs no GPU, and it is no measurement: it '
    "says what an engine does, not how fast.</p>"
)
COUNTED = ("attention", "gelu", "int8")  # sections of a profile in bundle.json
NOT_UNDERSTOOD = "not_understood"
WITHOUT = {  # what became of attention that TensorRT has no kernel of, by the key of bundle.json
    "written_out": "two products and a softmax",
    "plugins": "a kernel of our own",
}


@dataclass(frozen=True)
class Built:
    """A graph in one profile of the engine for one target. Names are escaped."""

    target: str
    runs_on: str
    graph: str
    profile: str
    size: int | None  # of the plan, bytes
    memory: int | None  # of activations, bytes
    attention: tuple[int, int] | None  # so many of so many
    gelu: tuple[int, int] | None
    int8: tuple[int, int] | None
    unfused: tuple[str, ...]
    dequantized: tuple[str, ...]
    strange: Mapping[str, tuple[str, ...]]  # nodes of which the builder's log did not tell, by what was counted
    unfused_nodes: tuple[str, ...]
    without: tuple[str, ...]  # what became of attention that TensorRT has no kernel of, and why
    kernels: Kernels

    @property
    def place(self) -> str:
        """``decoder, prefill``; the graph alone where it has one profile."""
        return self.graph if self.profile in ("all", "–") else f"{self.graph}, {self.profile}"


@dataclass
class Alike:
    """Equal kernels in the engines for several targets."""

    built: Built
    targets: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.built.place} <small>{', '.join(self.targets)}</small>"


def engines_section(manifest: Manifest) -> str:
    """The table, the bars, what did not fuse, the kernels by name; nothing for a bundle without engines."""
    built = engines_of(manifest)
    if not built:
        return ""
    alike = grouped(built)
    left = f'<p class="soft">These are the first {len(built):,}.</p>' if len(built) == MOST_ENGINES else ""
    return section(
        "TensorRT engines",
        f"<p>{makers(manifest)}</p>{PROOF}",
        engine_table(built),
        left,
        pairs("Attention that TensorRT has no kernel of", without_kernel(alike)),
        bars(alike),
        not_fused(built, alike),
        kernel_lists(alike),
    )


def engines_of(manifest: Manifest) -> list[Built]:
    """Every profile of every graph for every target, in the order of bundle.json."""
    found = (
        built_from_json(manifest, target, engine, graph, profile)
        for target, engine in items(manifest.engines).items()
        for graph in items(at(engine, "plans"))
        for profile in list_of(at(engine, "graphs", graph, "profiles")) or [None]
    )
    return list(islice(found, MOST_ENGINES))


def built_from_json(manifest: Manifest, target: str, engine: Any, graph: str, profile: Any) -> Built:
    plan, sm = at(engine, "plans", graph), at(engine, "sm")
    file = manifest.files.get(plan) if isinstance(plan, str) else None
    return Built(
        target=words(target, 40),
        runs_on=GPUS.get(target, "–") + (f", {words(sm.upper(), 12)}" if isinstance(sm, str) else ""),
        graph=words(graph, 40),
        profile=name(at(profile, "profile")),
        size=None if file is None else file.size,
        memory=whole(at(engine, "graphs", graph, "memory", "activation")),
        attention=share(at(profile, "attention"), "fused"),
        gelu=share(at(profile, "gelu"), "fused"),
        int8=share(at(profile, "int8"), "products"),
        unfused=texts(at(profile, "attention", "unfused")),
        dequantized=texts(at(profile, "int8", "dequantized")),
        strange={key: tuple(map(name, list(items(at(profile, key, NOT_UNDERSTOOD)))[:MOST_LISTED])) for key in COUNTED},
        unfused_nodes=texts(at(profile, "alone")),
        without=tuple(line for key in WITHOUT for line in refusals(key, at(engine, "graphs", graph, key))),
        kernels=kernels_from_json(profile),
    )


def name(told: Any) -> str:
    """A string, escaped; a dash for anything else."""
    return words(told if isinstance(told, str) else None, 40)


def refusals(key: str, told: Any) -> list[str]:
    """Why TensorRT has no kernel, how often, and what is there instead. Such attention is not among what fused."""
    reasons = [words(reason, 80) for reason in list(items(told).values())[:MOST_LISTED] if isinstance(reason, str)]
    return [f"{count:,} {reason}: {WITHOUT[key]}" for reason, count in Counter(reasons).most_common(MOST_NODES)]


def share(told: Any, key: str) -> tuple[int, int] | None:
    """(how many, of how many); None where there are none, or no such figures."""
    some, of = whole(at(told, key)), whole(at(told, "of"))
    return (some, of) if some is not None and of and some <= of else None


def grouped(built: Sequence[Built]) -> list[Alike]:
    """Targets whose kernels are the same stand together; graph by graph and profile by profile."""
    found: dict[Any, Alike] = {}
    for each in sorted(built, key=lambda each: order(each, built)):
        what = (each.attention, each.gelu, each.int8, each.unfused, each.dequantized, each.unfused_nodes, each.without)
        same = (each.place, what, *each.strange.values(), each.kernels.named, each.kernels.total)
        found.setdefault(same, Alike(each)).targets.append(each.target)
    return list(found.values())


def order(each: Built, built: Sequence[Built]) -> int:
    return next(place for place, other in enumerate(built) if other.place == each.place)


def makers(manifest: Manifest) -> str:
    """Which library built them, for what."""
    engines = list(islice(items(manifest.engines).items(), MOST_ENGINES))
    found = dict.fromkeys(f"{name(at(e, 'library'))} {name(at(e, 'version'))}" for _, e in engines)
    targets = ", ".join(words(target, 40) for target, _ in engines)
    return f"Built for {targets} by {', '.join(found)}. An engine runs on the GPUs of its target alone."


def engine_table(built: Sequence[Built]) -> str:
    rows = [
        [
            each.target,
            each.runs_on,
            each.graph,
            each.profile,
            "–" if each.size is None else bytes_text(each.size),
            "–" if each.memory is None else bytes_text(each.memory),
            share_text(each.attention),
            share_text(each.gelu),
            share_text(each.int8),
            count_text(each.kernels.total or None),
        ]
        for each in built
    ]
    head = ("target", "runs on", "graph", "profile", "plan", "memory", "attention", "GELU", "INT8", "kernels")
    return table(head, rows, numeric(4, 5, 6, 7, 8, 9))


def share_text(found: tuple[int, int] | None) -> str:
    """``3 of 3``; in red where some are missing."""
    if found is None:
        return "–"
    text = "{:,} of {:,}".format(*found)
    return text if found[0] == found[1] else f'<b class="limit">{text}</b>'


def not_fused(built: Sequence[Built], alike: Sequence[Alike]) -> str:
    """By name where bundle.json has names, worst first."""
    missing = [(each.title, line) for each in alike for line in shortfalls(each.built)]
    counted = [
        what
        for what, key in (("attention", "attention"), ("GELU", "gelu"), ("integer product", "int8"))
        if any(getattr(each, key) for each in built)
    ]
    alone = [(each.title, named(each.built.unfused_nodes)) for each in alike if each.built.unfused_nodes]
    listed = " and ".join(filter(None, [", ".join(counted[:-1]), *counted[-1:]]))
    every = f"<p>Every {listed} that was counted is fused.</p>" if counted and not missing else ""
    return every + pairs("What did not fuse", missing) + pairs("Nodes that are a kernel by themselves", alone)


def without_kernel(alike: Sequence[Alike]) -> list[tuple[str, str]]:
    return [(each.title, "<br>".join(each.built.without)) for each in alike if each.built.without]


def shortfalls(built: Built) -> list[str]:
    """A line of HTML for everything that should have fused and did not."""
    lines = []
    if built.unfused:
        lines.append(f'<b class="limit">Attention in several kernels:</b> {named(built.unfused)}')
    elif short(built, "attention"):
        lines.append(f'<b class="limit">Attention in several kernels:</b> {short(built, "attention"):,}, not named')
    if built.dequantized:
        lines.append(f"<b>Integer products that are dequantised first:</b> {named(built.dequantized)}")
    elif short(built, "int8"):
        lines.append(f"<b>Integer products that are dequantised first:</b> {short(built, 'int8'):,}, not named")
    if short(built, "gelu"):
        lines.append(f"<b>GELUs in a kernel of their own:</b> {short(built, 'gelu'):,}")
    strange = tuple(node for nodes in built.strange.values() for node in nodes)
    if strange:
        lines.append(f"<b>Not understood in the builder's log, neither fused nor not:</b> {named(strange)}")
    return lines


def short(built: Built, key: str) -> int:
    """How many of what was counted did not fuse, less those of which the log did not tell."""
    found: tuple[int, int] | None = getattr(built, key)
    return 0 if found is None else max(found[1] - found[0] - len(built.strange[key]), 0)


def named(nodes: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(nodes) - MOST_NODES:,} more" if len(nodes) > MOST_NODES else ""
    return f"<code>{'</code>, <code>'.join(words(node, 80) for node in nodes[:MOST_NODES])}</code>{more}"


def pairs(heading: str, rows: Sequence[tuple[str, str]]) -> str:
    """A heading, then names on the left and what is said of them on the right."""
    told = "".join(f"<div>{title}</div><div>{text}</div>" for title, text in rows)
    return f'<h3>{heading}</h3><div class="rows">{told}</div>' if rows else ""


def bars(alike: Sequence[Alike]) -> str:
    """A stacked bar for each."""
    drawn = [each for each in alike if each.built.kernels.total]
    if not drawn:
        return ""
    axis = LinearAxis(0, max(each.built.kernels.total for each in drawn))
    there = [kind for kind in KINDS if any(kind in each.built.kernels.counts for each in drawn)]
    key = "".join(f'<span><i{KEYS[LOOKS[kind][0]]} style="--p:{LOOKS[kind][1]}"></i>{kind}</span>' for kind in there)
    rows = "".join(f"<div>{each.title}</div><div>{stack(each, axis)}</div>" for each in drawn)
    return figure(EXPLAINED, f'<div class="key">{key}</div>', f'<div class="rows">{rows}</div>')


def stack(each: Alike, axis: LinearAxis) -> str:
    """The kinds of kernels side by side, numbered where there is room."""
    parts, before = [], 0
    for kind, count in each.built.kernels.counts.items():
        start, end = axis.at(before), axis.at(before + count)
        colour, shade, letters = LOOKS[kind]
        parts.append(bar(start, end - start, 0, BAR, colour, f"{kind}: {count:,}", shade))
        if end - start > ROOM:
            parts.append(
                f'<text x="{(start + end) / 2:.2f}%" y="14" text-anchor="middle" class="{letters}">{count}</text>'
            )
        before += count
    return drawing(BAR, f"{each.built.place}: {each.built.kernels.total:,} kernels by kind", parts)


def kernel_lists(alike: Sequence[Alike]) -> str:
    """The names of the kernels, folded."""
    lists, left = [], MOST_LISTED
    for each in alike:
        kernels = each.built.kernels
        rows = [
            [f"{count:,}", kind, f"<code>{words(title, 120)}</code>"] for kind, title, count in kernels.named[:left]
        ]
        left -= len(rows)
        if rows:
            cut = len(kernels.named) - len(rows)
            more = f'<p class="soft">{cut:,} more names are not shown.</p>' if cut else ""
            summary = f"{kernels.total:,} kernels of {each.built.place} for {', '.join(each.targets)}"
            lists.append(folded(summary, table(("kernels", "what", "name"), rows, {0: "n", 2: "name"}), more))
    return "".join(lists)
