"""Read the builder's log: which nodes of the graph ended in which kernels.

At verbosity DETAILED TensorRT lists the finished layers, one per line, each with the names of the ONNX nodes that it
computes; that needs no GPU. Only this list is read, and nothing here needs the library.

Names and kinds of layers are TensorRT's own and change with its versions. So there are three results: fused; not fused,
where every layer of a node is of a known kind; and not understood, where one is not, or no layer names the node. A log
of another version thus never counts as a failed fusion.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transom.export.passes.plugin_attention import INPUTS as PLUGINS
from transom.runtime.format import loops_text

LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: .*, Metadata: ?(?P<nodes>.*)$")
NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|$)")
GROUP = re.compile(r"_myl(\d+)_\d+")  # the compiled subgraph: one per profile, or several
MARK = re.compile(r"\[profile (\d+)\]")
MEMORY = re.compile(r"^Total (Activation|Weights) Memory: (\d+) bytes")
FUSED_ATTENTION = re.compile(r"_mha_v\d")  # _gemm_mha_v2 of many queries, _gemv_mha_v1 of one
SERIAL = re.compile(r"( \[profile \d+\])?(_myl\d+_\d+)?$")
UNROLLED = re.compile(r"^(__mye)\d+(_unroll)\d+$")  # a product in one of the steps of an unrolled loop
PRODUCTS = ("gemm", "correlation")  # kinds of layers that multiply matrices or convolve
GENERATED = re.compile(r"^__myl_")  # a kernel generated from single steps: pointwise, moves, reductions, products
PLUGIN = re.compile("plugin", re.IGNORECASE)  # in the kind of its layer: PluginV3 in TensorRT's own inspector
ATTENTIONS = ("Attention", "TRT_Attention", *PLUGINS)
COMPUTES = (*ATTENTIONS, "MatMul", "Gemm", "Conv", "GRU", None)  # operators with enough work for a kernel of their own
NOT_UNDERSTOOD = "not_understood"  # in bundle.json
MOST_LAYERS = 3  # of a node, in a message
SHAPES = ("shape_call", "ShapeHostToDevice")  # kinds of layers that only compute sizes
# Kinds of layers that count the steps of a loop, compute the addresses of each, and jump. What is computed of tensors,
# elementwise too, is of other kinds. A copy between host and device is a layer of its own, which has that name.
LOOP_CONTROL = ("add", "cast", "cjmp", "copy", "div", "memset", "mul", "reshape", "sub")
COPY = re.compile(r"^copy_[dh]2[dh]")
JUMP = "cjmp"  # kind of a layer that enters a loop, leaves it, or goes back to its first step
GOES_BACK = re.compile(r"^clp_|_cloop")
SINGLE_STEPS = "_remaining_"  # in the name of the jump of a loop over the steps that an unrolled one leaves
PRODUCT = re.compile(r"^__myl_\w*Fc")  # a generated kernel with a product in it


@dataclass(frozen=True)
class Kernel:
    """A layer of the engine: its name, its kind, and the ONNX nodes that it computes."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    int8: bool  # its inputs are integers
    loop: str = ""  # the name of the jump that ends the loop around it

    @property
    def title(self) -> str:
        """The name without its serial numbers: equal for equal kernels."""
        return UNROLLED.sub(r"\1\2", SERIAL.sub("", self.name))

    @property
    def is_known(self) -> bool:
        """True where its name or kind says what it computes."""
        return bool(
            self.kind in PRODUCTS
            or GENERATED.search(self.name)
            or FUSED_ATTENTION.search(self.name)
            or PLUGIN.search(self.kind)
        )

    @property
    def is_product(self) -> bool:
        return self.kind in PRODUCTS or bool(PRODUCT.search(self.name))


def kernels_of(log: Iterable[str], profiles: int) -> list[list[Kernel]]:
    """Return the layers of the engine that compute, by profile, in execution order; last those outside of subgraphs.

    The body of a loop is there once, however many steps it takes; what counts its steps is left out.

    A compiled subgraph belongs to one profile, given by a mark in any of its layers. A layer outside of subgraphs, such
    as a plugin, belongs to the profile of its own mark; without marks, layers of one name are divided among the
    profiles in turn, or count for each where they cannot be divided.
    """
    groups: dict[str, list[Kernel]] = {}
    ungrouped: list[tuple[Kernel, str | None]] = []
    marks: dict[str, int] = {}
    jumped: dict[str, int] = {}  # how many kernels of a subgraph there were at its last jump
    for line in log:
        match = LAYER.match(line)
        if match is None or match["kind"] in SHAPES:
            continue
        if match["kind"] in LOOP_CONTROL and not COPY.search(match["name"]):
            if match["kind"] == JUMP and (serial := GROUP.search(match["name"])) is not None:
                kernels = groups.setdefault(serial[1], [])
                if GOES_BACK.search(match["name"]):
                    body = slice(jumped.get(serial[1], 0), None)
                    kernels[body] = [replace(kernel, loop=match["name"]) for kernel in kernels[body]]
                jumped[serial[1]] = len(kernels)
            continue
        serial, mark = GROUP.search(match["name"]), MARK.search(match["name"])
        nodes = tuple(dict.fromkeys(NODE.findall(match["nodes"])))
        kernel = Kernel(match["name"], match["kind"], nodes, "Datatype: Int8" in line)
        if serial is None:
            ungrouped.append((kernel, mark[1] if mark is not None else None))
            continue
        if mark is not None:
            marks[serial[1]] = int(mark[1])
        groups.setdefault(serial[1], []).append(kernel)
    if len(groups) == profiles:  # the usual case; then no mark is needed
        by_profile = list(groups.values())
    else:
        by_profile = [[] for _ in range(profiles)]
        for group, kernels in groups.items():
            by_profile[min(marks.get(group, 0), profiles - 1)] += kernels
    for place, kernels in enumerate(by_profile):
        kernels += outside_subgraphs(ungrouped, place, profiles)
    return by_profile


def outside_subgraphs(ungrouped: Sequence[tuple[Kernel, str | None]], profile: int, profiles: int) -> list[Kernel]:
    """Return a profile's layers outside of compiled subgraphs, from all with their marks; profile 0 has no mark."""
    by_name: dict[str, list[tuple[Kernel, str | None]]] = {}
    for kernel, mark in ungrouped:
        by_name.setdefault(kernel.title, []).append((kernel, mark))
    kept = []
    for layers in by_name.values():
        if any(mark is not None for _, mark in layers):
            kept += [kernel for kernel, mark in layers if int(mark or 0) == profile]
            continue
        each, left = divmod(len(layers), profiles)
        shared = layers if left else layers[profile * each : (profile + 1) * each]
        kept += [kernel for kernel, _ in shared]
    return kept


def memory_of(log: Iterable[str]) -> dict[str, int]:
    """Return the bytes of "activation", the most of any profile, and of "weights"."""
    memory: dict[str, int] = {}
    for line in log:
        match = MEMORY.match(line)
        if match is not None:
            kind = match[1].lower()
            memory[kind] = max(memory.get(kind, 0), int(match[2]))
    return memory


@dataclass(frozen=True)
class Loop:
    """A recurrence: the kernels of one pass through its loop, and how many steps a pass takes; None if not known."""

    kernels: int
    steps: int | None


def loops_of(kernels: Sequence[Kernel]) -> tuple[Loop, ...]:
    """Return the loops of a profile in execution order.

    The builder unrolls a loop and has another one behind it for the steps that are left, one by one.
    """
    bodies: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if kernel.loop:
            bodies.setdefault(kernel.loop, []).append(kernel)
    loops: list[Loop] = []
    unrolled: list[Kernel] = []
    for name, body in bodies.items():
        if SINGLE_STEPS in name and loops:
            loops[-1] = replace(loops[-1], steps=steps_of(unrolled, body))
        else:
            loops.append(Loop(len(body), 1))
            unrolled = body
    return tuple(loops)


def steps_of(unrolled: Sequence[Kernel], single: Sequence[Kernel]) -> int | None:
    """Return how many steps are in an unrolled body, from that of a single step: the ratio of their products.

    None where they have none: a small product is a part of the kernel of what follows it.
    """
    many, one = (sum(kernel.is_product for kernel in body) for body in (unrolled, single))
    return max(many // one, 1) if one else None


@dataclass(frozen=True)
class Fusion:
    """Fusions of a graph in one profile of an engine.

    attention      how many of ``attentions`` nodes became one kernel each; the others are ``unfused``
    gelus_fused    how many of ``gelus`` activations share a kernel with the sum or product before them
    int8           how many of ``linears`` integer products multiply integers; the others are ``dequantized`` first
    kernels        how many there are, and ``kernel_counts`` by name
    unfused_nodes  nodes that are a kernel by themselves, without products and convolutions
    loops          recurrences

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
    loops: tuple[Loop, ...] = ()

    @property
    def attention(self) -> int:
        return self.attentions - len(self.unfused) - len(self.unrecognized_attention)

    @property
    def int8(self) -> int:
        return self.linears - len(self.dequantized) - len(self.unrecognized_linears)

    @property
    def unrecognized(self) -> dict[str, str]:
        """All nodes whose layers this version does not know."""
        return {**self.unrecognized_attention, **self.unrecognized_gelus, **self.unrecognized_linears}

    def to_json(self) -> dict[str, Any]:
        """Return the profile for bundle.json; "not_understood" and "loops" only where there are some."""

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
            **({"loops": self.loops_to_json()} if self.loops else {}),
        }

    def loops_to_json(self) -> list[dict[str, int | None]]:
        return [{"kernels": loop.kernels, "steps": loop.steps} for loop in self.loops]

    def summary(self) -> str:
        """Return one line: ``decode: attention 4 of 4, GELU 4 of 4, INT8 17 of 17, 54 kernels``."""
        parts = [
            f"{what} {fused} of {of}{f' ({len(unrecognized)} not understood)' if unrecognized else ''}"
            for what, fused, of, unrecognized in (
                ("attention", self.attention, self.attentions, self.unrecognized_attention),
                ("GELU", self.gelus_fused, self.gelus, self.unrecognized_gelus),
                ("INT8", self.int8, self.linears, self.unrecognized_linears),
            )
            if of
        ]
        parts += filter(None, [loops_text(self.loops_to_json())])
        return f"{self.profile}: {', '.join([*parts, f'{self.kernels} kernels'])}"


def fusion_of(
    profile: str, kernels: Sequence[Kernel], operators: Mapping[str, str], integer_products: Sequence[str]
) -> Fusion:
    """Return the fusions of a profile's kernels; ``operators`` are the built graph's by the name of the node.

    An attention of Transom's plugin is fused where a layer of the engine is that plugin, not the function's body.
    """
    attention = [name for name, operator in operators.items() if operator in ATTENTIONS]
    fused = {node for kernel in kernels if FUSED_ATTENTION.search(kernel.name) for node in kernel.nodes}
    plugged = {node for kernel in kernels if PLUGIN.search(kernel.kind) for node in (kernel.title, *kernel.nodes)}
    is_fused = {name: name in (plugged if operators[name] in PLUGINS else fused) for name in attention}
    gelus = [name for name, operator in operators.items() if operator == "Gelu"]
    shared = {node for kernel in kernels if len(kernel.nodes) > 1 for node in kernel.nodes}
    integers = {node for kernel in kernels if kernel.int8 and kernel.kind in PRODUCTS for node in kernel.nodes}
    seen = {name: unrecognized_in(name, kernels) for name in (*attention, *gelus, *integer_products)}
    unrecognized = {name: what for name, what in seen.items() if what is not None}
    # A plugin is in the log or it is not: such a node is never unrecognised
    plugin_nodes = {name for name in attention if operators[name] in PLUGINS} if kernels else set()
    unrecognized_attention = {
        n: unrecognized[n] for n in attention if n in unrecognized and not is_fused[n] and n not in plugin_nodes
    }
    unrecognized_linears = {
        name: unrecognized[name] for name in integer_products if name in unrecognized and name not in integers
    }
    named = {node for kernel in kernels for node in kernel.nodes}  # which kernel a GELU shares does not matter
    return Fusion(
        profile=profile,
        attentions=len(attention),
        unfused=tuple(name for name in attention if not is_fused[name] and name not in unrecognized_attention),
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
        loops=loops_of(kernels),
    )


def unrecognized_in(node: str, kernels: Sequence[Kernel]) -> str | None:
    """Describe the layers of a node that this version does not know; None where it knows all."""
    if not kernels:
        return "no layer was found in the log"
    holding = [kernel for kernel in kernels if node in (kernel.title, *kernel.nodes)]
    if not holding:
        return "no layer names it"
    unknown = [
        f"the layer {kernel.title!r:.80} of kind {kernel.kind!r:.40}" for kernel in holding if not kernel.is_known
    ]
    return ", ".join(unknown[:MOST_LAYERS]) or None
