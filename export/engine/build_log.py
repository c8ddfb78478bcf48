"""The builder's log -> which nodes of the graph ended in which kernels.

At verbosity DETAILED TensorRT lists the finished layers, one per line, each with the names of the ONNX nodes that it
computes, without a GPU having been near. That list is all there is read; nothing here needs the library.

Names and kinds of layers are TensorRT's own and change with its versions. So there are three answers: fused; not fused,
where every layer of a node is of a make that is known here; and not understood, where one is not, or no layer names the
node. A log of another version is then no verdict on the engine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transom.export.passes.plugin_attention import INPUTS as PLUGINS

LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: .*, Metadata: ?(?P<nodes>.*)$")
NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|$)")
GROUP = re.compile(r"_myl(\d+)_\d+")  # the compiled subgraph: one per profile, or several
MARK = re.compile(r"\[profile (\d+)\]")
MEMORY = re.compile(r"^Total (Activation|Weights) Memory: (\d+) bytes")
FUSED_ATTENTION = re.compile(r"_mha_v\d")  # _gemm_mha_v2 of many queries, _gemv_mha_v1 of one
SERIAL = re.compile(r"( \[profile \d+\])?(_myl\d+_\d+)?$")
PRODUCTS = ("gemm", "correlation")  # kinds of layers that multiply matrices, or convolve
WRITTEN = re.compile(
    r"^__myl_"
)  # a kernel that the compiler wrote of single steps: pointwise, moves, reductions, products
PLUGIN = re.compile("plugin", re.IGNORECASE)  # in the kind of its layer: PluginV3 in TensorRT's own inspector
ATTENTIONS = ("Attention", "TRT_Attention", *PLUGINS)
COMPUTES = (*ATTENTIONS, "MatMul", "Gemm", "Conv", None)  # operators that have work for a kernel of their own
NOT_UNDERSTOOD = "not_understood"  # in bundle.json
MOST_SEEN = 3  # layers of a node, in a message
SHAPES = ("shape_call", "ShapeHostToDevice")  # kinds of layers that compute sizes alone


@dataclass(frozen=True)
class Kernel:
    """A layer of the engine: its name, what kind it is, and the ONNX nodes in it."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    int8: bool  # whether it reads integers

    @property
    def title(self) -> str:
        """The name without its serial number: equal for kernels of one make."""
        return SERIAL.sub("", self.name)

    @property
    def is_known(self) -> bool:
        """Whether its name or kind says what it does."""
        return bool(
            self.kind in PRODUCTS
            or WRITTEN.search(self.name)
            or FUSED_ATTENTION.search(self.name)
            or PLUGIN.search(self.kind)
        )


def kernels_of(log: Iterable[str], profiles: int) -> list[list[Kernel]]:
    """The layers of the engine that compute, by profile, in the order they run; last those outside of subgraphs.

    A compiled subgraph belongs to one profile, which a mark in any of its layers tells. A layer outside of them, as a
    plugin may be, belongs to that of its own mark; without marks, layers of one name are dealt to the profiles in turn,
    or count for each where they cannot be.
    """
    found: dict[str, list[Kernel]] = {}
    alone: list[tuple[Kernel, str | None]] = []
    marks: dict[str, int] = {}
    for line in log:
        match = LAYER.match(line)
        if match is None or match["kind"] in SHAPES:
            continue
        serial, mark = GROUP.search(match["name"]), MARK.search(match["name"])
        nodes = tuple(dict.fromkeys(NODE.findall(match["nodes"])))
        kernel = Kernel(match["name"], match["kind"], nodes, "Datatype: Int8" in line)
        if serial is None:
            alone.append((kernel, mark[1] if mark is not None else None))
            continue
        if mark is not None:
            marks[serial[1]] = int(mark[1])
        found.setdefault(serial[1], []).append(kernel)
    if len(found) == profiles:  # the usual case; then no mark is needed
        by_profile = list(found.values())
    else:
        by_profile = [[] for _ in range(profiles)]
        for group, kernels in found.items():
            by_profile[min(marks.get(group, 0), profiles - 1)] += kernels
    for place, kernels in enumerate(by_profile):
        kernels += outside(alone, place, profiles)
    return by_profile


def outside(alone: Sequence[tuple[Kernel, str | None]], profile: int, profiles: int) -> list[Kernel]:
    """Of the layers outside of compiled subgraphs, with their marks, those of a profile; the first has no mark."""
    by_name: dict[str, list[tuple[Kernel, str | None]]] = {}
    for kernel, mark in alone:
        by_name.setdefault(kernel.title, []).append((kernel, mark))
    found = []
    for layers in by_name.values():
        if any(mark is not None for _, mark in layers):
            found += [kernel for kernel, mark in layers if int(mark or 0) == profile]
            continue
        each, left = divmod(len(layers), profiles)
        dealt = layers if left else layers[profile * each : (profile + 1) * each]
        found += [kernel for kernel, _ in dealt]
    return found


def memory_of(log: Iterable[str]) -> dict[str, int]:
    """Bytes of "activation", the most of any profile, and of "weights"."""
    found: dict[str, int] = {}
    for line in log:
        match = MEMORY.match(line)
        if match is not None:
            kind = match[1].lower()
            found[kind] = max(found.get(kind, 0), int(match[2]))
    return found


@dataclass(frozen=True)
class Fusion:
    """What became of a graph in one profile of an engine.

    attention   how many of ``attentions`` nodes became one kernel each; those that did not are ``unfused``
    gelu        how many of ``gelus`` activations share a kernel with the sum or product in front of them
    int8        how many of ``linears`` integer products multiply integers; the others, ``wide``, are dequantised first
    kernels     how many there are, ``alike`` by name
    alone       nodes that are a kernel by themselves, products and convolutions left out

    ``unrecognized_attention``, ``unrecognized_gelus`` and ``unrecognized_linears`` hold the nodes whose layers this
    version does not know, with what the log has instead: they count neither as fused nor as unfused.
    """

    profile: str
    attentions: int
    unfused: tuple[str, ...]
    gelus: int
    gelus_fused: int
    linears: int
    dequantized: tuple[str, ...]
    kernels: int
    kernel_counts: Mapping[str, int]
    unfused_nodes: tuple[str, ...]
    unrecognized_attention: Mapping[str, str] = field(default_factory=dict)
    unrecognized_gelus: Mapping[str, str] = field(default_factory=dict)
    unrecognized_linears: Mapping[str, str] = field(default_factory=dict)

    @property
    def attention(self) -> int:
        return self.attentions - len(self.unfused) - len(self.unrecognized_attention)

    @property
    def int8(self) -> int:
        return self.linears - len(self.dequantized) - len(self.unrecognized_linears)

    @property
    def unrecognized(self) -> dict[str, str]:
        """All nodes of which the log does not tell."""
        return {**self.unrecognized_attention, **self.unrecognized_gelus, **self.unrecognized_linears}

    def to_json(self) -> dict[str, Any]:
        """As bundle.json has it; "not_understood" is there where there is some."""

        def with_unrecognized(section: dict[str, Any], nodes: Mapping[str, str]) -> dict[str, Any]:
            return {**section, **({NOT_UNDERSTOOD: dict(nodes)} if nodes else {})}

        attention = {"fused": self.attention, "of": self.attentions, "unfused": list(self.unfused)}
        int8 = {"products": self.int8, "of": self.linears, "dequantized": list(self.dequantized)}
        return {
            "profile": self.profile,
            "attention": with_unrecognized(attention, self.unrecognized_attention),
            "gelu": with_unrecognized({"fused": self.gelus_fused, "of": self.gelus}, self.unrecognized_gelus),
            "int8": with_unrecognized(int8, self.unrecognized_linears),
            "kernels": self.kernels,
            "alike": dict(self.kernel_counts),
            "alone": list(self.unfused_nodes),
        }

    def summary(self) -> str:
        """One line: ``decode: attention 4 of 4, GELU 4 of 4, INT8 17 of 17, 54 kernels``."""
        parts = [
            f"{what} {found} of {of}{f' ({len(unrecognized)} not understood)' if unrecognized else ''}"
            for what, found, of, unrecognized in (
                ("attention", self.attention, self.attentions, self.unrecognized_attention),
                ("GELU", self.gelus_fused, self.gelus, self.unrecognized_gelus),
                ("INT8", self.int8, self.linears, self.unrecognized_linears),
            )
            if of
        ]
        return f"{self.profile}: {', '.join([*parts, f'{self.kernels} kernels'])}"


def fusion_of(
    profile: str, kernels: Sequence[Kernel], operators: Mapping[str, str], integer_products: Sequence[str]
) -> Fusion:
    """``operators`` are those of the graph that was built, by the name of the node; some products are of integers.

    An attention of ours is one kernel where a layer of the engine is its plugin, and not what its body became.
    """
    attention = [name for name, operator in operators.items() if operator in ATTENTIONS]
    fused = {node for kernel in kernels if FUSED_ATTENTION.search(kernel.name) for node in kernel.nodes}
    plugged = {node for kernel in kernels if PLUGIN.search(kernel.kind) for node in (kernel.title, *kernel.nodes)}
    one = {name: name in (plugged if operators[name] in PLUGINS else fused) for name in attention}
    gelus = [name for name, operator in operators.items() if operator == "Gelu"]
    shared = {node for kernel in kernels if len(kernel.nodes) > 1 for node in kernel.nodes}
    integers = {node for kernel in kernels if kernel.int8 and kernel.kind in PRODUCTS for node in kernel.nodes}
    seen = {name: unrecognized_in(name, kernels) for name in (*attention, *gelus, *integer_products)}
    unrecognized = {name: what for name, what in seen.items() if what is not None}
    told = {name for name in attention if operators[name] in PLUGINS} if kernels else set()  # there, or its body is
    unrecognized_attention = {
        n: unrecognized[n] for n in attention if n in unrecognized and not one[n] and n not in told
    }
    unrecognized_linears = {
        name: unrecognized[name] for name in integer_products if name in unrecognized and name not in integers
    }
    named = {node for kernel in kernels for node in kernel.nodes}  # which kernel a GELU shares does not matter
    return Fusion(
        profile=profile,
        attentions=len(attention),
        unfused=tuple(name for name in attention if not one[name] and name not in unrecognized_attention),
        gelus=len(gelus),
        gelus_fused=sum(name in shared for name in gelus),
        linears=len(integer_products),
        dequantized=tuple(
            name for name in integer_products if name not in integers and name not in unrecognized_linears
        ),
        kernels=len(kernels),
        kernel_counts=dict(Counter(kernel.title for kernel in kernels).most_common()),
        unfused_nodes=tuple(
            kernel.nodes[0]
            for kernel in kernels
            if len(kernel.nodes) == 1 and operators.get(kernel.nodes[0]) not in COMPUTES
        ),
        unrecognized_attention=unrecognized_attention,
        unrecognized_gelus={name: unrecognized[name] for name in gelus if name not in named},
        unrecognized_linears=unrecognized_linears,
    )


def unrecognized_in(node: str, kernels: Sequence[Kernel]) -> str | None:
    """What the layers of a node are whose names are not known here; None where all are."""
    if not kernels:
        return "no layer was found in the log"
    holding = [kernel for kernel in kernels if node in (kernel.title, *kernel.nodes)]
    if not holding:
        return "no layer names it"
    unknown = [
        f"the layer {kernel.title!r:.80} of kind {kernel.kind!r:.40}" for kernel in holding if not kernel.is_known
    ]
    return ", ".join(unknown[:MOST_SEEN]) or None
