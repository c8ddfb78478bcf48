"""Draw the TensorRT engines of a bundle: their targets, what fused in each and what did not, and their kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from markupsafe import Markup

from transom.export.engine.build_log import NOT_UNDERSTOOD
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
    texts,
)
from transom.export.report.rendering import render, visible
from transom.export.report.svg import LinearAxis, bar, chart, text
from transom.runtime.format import at, list_of, loops_text, natural, object_of
from transom.runtime.manifest import Manifest

MOST_PROFILES = 64  # rows of the table: profiles of graphs for targets
MOST_NODES = 12  # named one by one
MOST_LISTED = 400  # kernels by name, on the whole page
BAR = 20  # pixels
NUMBER = 5.0  # percent of the width that a number in a bar needs
GPUS = {
    "rtx-sm75": "Turing: RTX 20, T4",
    "rtx-sm80": "Ampere: A100, A30",
    "rtx-sm86": "Ampere: RTX 30, A10",
    "rtx-sm89": "Ada: RTX 40, L4, L40",
    "rtx-sm120": "Blackwell: RTX 50",
    "rtx-sm121": "Blackwell: DGX Spark",
    "tensorrt": "the GPU that built it",
}
LOOKS = {  # of a kind of kernel: class of its colour, opacity, class of the letters on it
    ATTENTION: ("mark", 1.0, "on"),
    INTEGERS: ("mark", 0.55, "in"),
    PRODUCTS: ("mark", 0.25, "in"),
    CHAINS: ("veil", 0.3, "in"),
    MOVES: ("warm", 0.4, "in"),
    SINGLE: ("warm", 1.0, "on"),
    UNNAMED: ("veil", 0.1, "in"),
}
KEYS = {"mark": "", "warm": "w", "veil": "v"}  # classes of the legend, by colour
COUNTED = {"attention": "attention", "gelu": "GELU", "int8": "integer product"}  # sections of a profile in bundle.json
EVIDENCE = {"executed": "Executed", "compiled": "Compiled only"}  # of a graph, by the key of bundle.json
MOST_EVIDENCE, MOST_LINE = 8, 200  # lines about a graph, and characters of one
WITHOUT_KERNEL = {  # what replaces TensorRT's attention, by the key of bundle.json
    "written_out": "two products and a softmax",
    "plugins": "a kernel of our own",
}

Share = tuple[int, int]  # so many of so many


@dataclass(frozen=True)
class EngineProfile:
    """A graph in one profile of the engine for one target, as bundle.json records it."""

    target: str
    runs_on: str
    graph: str
    profile: str
    size: int | None  # of the plan, bytes
    memory: int | None  # of activations, bytes
    attention: Share | None
    gelu: Share | None
    int8: Share | None
    unfused: tuple[str, ...]
    dequantized: tuple[str, ...]
    unrecognized: Mapping[str, tuple[str, ...]]  # nodes whose layers the builder's log did not explain, by section
    unfused_nodes: tuple[str, ...]
    without_kernel: tuple[str, ...]  # attention that is not TensorRT's own: how often, why, what replaces it
    loops: str  # how many there are, and how many kernels a step takes; "" for none
    kernels: Kernels

    @property
    def place(self) -> str:
        """``decoder, prefill``; the graph alone where it has one profile."""
        return self.graph if self.profile in ("all", "–") else f"{self.graph}, {self.profile}"

    def missing(self, key: str) -> int:
        """Return how many of a section did not fuse, without those that the log did not explain."""
        share: Share | None = getattr(self, key)
        return 0 if share is None else max(share[1] - share[0] - len(self.unrecognized[key]), 0)


@dataclass
class ProfileGroup:
    """Engines for several targets whose kernels are equal."""

    profile: EngineProfile
    targets: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Shortfall:
    """Nodes that should have fused and did not: its nodes, or their count where they are not named."""

    title: str
    nodes: tuple[str, ...] = ()
    count: int = 0
    note: str = ""
    failed: bool = False


def engines_section(manifest: Manifest) -> Markup:
    """Draw the table, the bars, what did not fuse, the kernels by name; nothing for a bundle without engines."""
    profiles = engine_profiles(manifest)
    if not profiles:
        return Markup("")
    groups = grouped(profiles)
    drawn = [group for group in groups if group.profile.kernels.total]
    axis = LinearAxis(0, max((group.profile.kernels.total for group in drawn), default=1))
    used = [kind for kind in KINDS if any(kind in group.profile.kernels.counts for group in drawn)]
    missing = [(group, each) for group in groups for each in shortfalls(group.profile)]
    engines = list(islice(object_of(manifest.engines).items(), MOST_PROFILES))
    return render(
        "engines",
        targets=[visible(target, 40) for target, _ in engines],
        libraries=list(dict.fromkeys(f"{name(at(e, 'library'))} {name(at(e, 'version'))}" for _, e in engines)),
        profiles=profiles,
        cut=len(profiles) == MOST_PROFILES,
        evidence=evidence_rows(manifest),
        without_kernel=[group for group in groups if group.profile.without_kernel],
        loops=[group for group in groups if group.profile.loops],
        bars=[(group, stacked_bar(group.profile, axis)) for group in drawn],
        looks=[(kind, KEYS[LOOKS[kind][0]], LOOKS[kind][1]) for kind in used],
        all_fused="" if missing else counted_text(profiles),
        shortfalls=missing,
        single_nodes=[group for group in groups if group.profile.unfused_nodes],
        kernel_lists=kernel_lists(groups),
        most_nodes=MOST_NODES,
    )


def evidence_rows(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Return (target and graph, "Executed" or "Compiled only", a line) for what the build of each engine recorded."""
    rows = (
        (f"{visible(target, 40)}, {visible(graph, 40)}", title, visible(line, MOST_LINE))
        for target, engine in object_of(manifest.engines).items()
        for graph in object_of(at(engine, "plans"))
        for key, title in EVIDENCE.items()
        for line in list_of(at(engine, "graphs", graph, key))[:MOST_EVIDENCE]
        if isinstance(line, str)
    )
    return list(islice(rows, MOST_LISTED))


def engine_profiles(manifest: Manifest) -> list[EngineProfile]:
    """Return every profile of every graph for every target, in the order of bundle.json."""
    profiles = (
        profile_from_json(manifest, target, engine, graph, profile)
        for target, engine in object_of(manifest.engines).items()
        for graph in object_of(at(engine, "plans"))
        for profile in list_of(at(engine, "graphs", graph, "profiles")) or [None]
    )
    return list(islice(profiles, MOST_PROFILES))


def profile_from_json(manifest: Manifest, target: str, engine: Any, graph: str, profile: Any) -> EngineProfile:
    plan, sm = at(engine, "plans", graph), at(engine, "sm")
    file = manifest.files.get(plan) if isinstance(plan, str) else None
    built = at(engine, "graphs", graph)
    return EngineProfile(
        target=visible(target, 40),
        runs_on=GPUS.get(target, "–") + (f", {visible(sm.upper(), 12)}" if isinstance(sm, str) else ""),
        graph=visible(graph, 40),
        profile=name(at(profile, "profile")),
        size=None if file is None else file.size,
        memory=natural(at(built, "memory", "activation")),
        attention=share(at(profile, "attention"), "fused"),
        gelu=share(at(profile, "gelu"), "fused"),
        int8=share(at(profile, "int8"), "products"),
        unfused=texts(at(profile, "attention", "unfused")),
        dequantized=texts(at(profile, "int8", "dequantized")),
        unrecognized={key: names_of(at(profile, key, NOT_UNDERSTOOD)) for key in COUNTED},
        unfused_nodes=texts(at(profile, "alone")),
        without_kernel=tuple(line for key in WITHOUT_KERNEL for line in reasons(key, at(built, key))),
        loops=loops_text(at(profile, "loops")),
        kernels=kernels_from_json(profile),
    )


def name(recorded: Any) -> str:
    """Return a string, cut and visible; a dash for anything else."""
    return visible(recorded if isinstance(recorded, str) else None, 40)


def names_of(recorded: Any) -> tuple[str, ...]:
    """Return the first keys of an object; none for anything else."""
    keys = recorded if isinstance(recorded, Mapping) else ()
    return tuple(name(str(key)) for key in islice(keys, MOST_LISTED))


def reasons(key: str, recorded: Any) -> list[str]:
    """Return why an attention is not TensorRT's own, how often, and what replaces it. It does not count as unfused."""
    values = recorded.values() if isinstance(recorded, Mapping) else ()
    counts = Counter(visible(reason, 80) for reason in islice(values, MOST_LISTED) if isinstance(reason, str))
    return [f"{count:,} {reason}: {WITHOUT_KERNEL[key]}" for reason, count in counts.most_common(MOST_NODES)]


def share(recorded: Any, key: str) -> Share | None:
    """Return (how many, of how many); None where there are none, or no such figures."""
    some, of = natural(at(recorded, key)), natural(at(recorded, "of"))
    return (some, of) if some is not None and of and some <= of else None


def grouped(profiles: Sequence[EngineProfile]) -> list[ProfileGroup]:
    """Group the targets whose kernels are equal; ordered by graph and profile."""
    places = list(dict.fromkeys(each.place for each in profiles))
    groups: dict[Any, ProfileGroup] = {}
    for each in sorted(profiles, key=lambda each: places.index(each.place)):
        fusion = (each.attention, each.gelu, each.int8, each.unfused, each.dequantized, each.unfused_nodes)
        kernels = (each.without_kernel, each.loops, *each.unrecognized.values(), each.kernels.named, each.kernels.total)
        groups.setdefault((each.place, fusion, kernels), ProfileGroup(each)).targets.append(each.target)
    return list(groups.values())


def counted_text(profiles: Sequence[EngineProfile]) -> str:
    """Return what was counted in words: ``attention, GELU and integer product``."""
    counted = [title for key, title in COUNTED.items() if any(getattr(each, key) for each in profiles)]
    return " and ".join(filter(None, [", ".join(counted[:-1]), *counted[-1:]]))


def shortfalls(profile: EngineProfile) -> list[Shortfall]:
    """Return everything that should have fused and did not, by name where bundle.json has names; the worst first."""
    unnamed = ", not named"
    unrecognized = tuple(node for nodes in profile.unrecognized.values() for node in nodes)
    integer = "Integer products that are dequantised first"
    each = [
        Shortfall("Attention in several kernels", profile.unfused, profile.missing("attention"), unnamed, failed=True),
        Shortfall(integer, profile.dequantized, profile.missing("int8"), unnamed),
        Shortfall("GELUs in a kernel of their own", count=profile.missing("gelu")),
        Shortfall("Not understood in the builder's log, neither fused nor not", unrecognized),
    ]
    return [shortfall for shortfall in each if shortfall.nodes or shortfall.count]


def stacked_bar(profile: EngineProfile, axis: LinearAxis) -> Markup:
    """Draw the kinds of kernels side by side, numbered where a number fits."""
    parts, before = [], 0
    for kind, count in profile.kernels.counts.items():
        start, end = axis.at(before), axis.at(before + count)
        colour, shade, letters = LOOKS[kind]
        parts.append(bar(start, end - start, 0, BAR, colour, f"{kind}: {count:,}", shade))
        if end - start > NUMBER:
            parts.append(text((start + end) / 2, 14, str(count), letters))
        before += count
    return chart(BAR, f"{profile.place}: {profile.kernels.total:,} kernels by kind", parts)


def kernel_lists(groups: Iterable[ProfileGroup]) -> list[dict[str, Any]]:
    """Return the kernels by name, at most MOST_LISTED on the page."""
    lists, left = [], MOST_LISTED
    for group in groups:
        kernels, place = group.profile.kernels, group.profile.place
        rows = kernels.named[:left]
        left -= len(rows)
        if rows:
            cut = len(kernels.named) - len(rows)
            lists.append({"total": kernels.total, "place": place, "targets": group.targets, "rows": rows, "cut": cut})
    return lists
