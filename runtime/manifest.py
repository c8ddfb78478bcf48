"""Read and write bundle.json: every field of a manifest, with all problems reported at once.

docs/bundle_format.md is the specification. ``transom.runtime.manifest_graphs`` has the graphs,
``transom.runtime.manifest_sections`` parity, quantization and engines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from transom.runtime.errors import BundleError
from transom.runtime.graph_spec import Axis
from transom.runtime.json_reader import Fields
from transom.runtime.manifest_graphs import (
    BLOCKS,
    BOTH,
    MADE_FOR,
    PRODUCTS,
    SIMULATED,
    TENSORRT_ALONE,
    GraphFile,
    Plan,
    axis_from_json,
    axis_to_json,
    every_field,
    graph_from_json,
    one_token_axes,
    shared_state_problems,
)
from transom.runtime.manifest_sections import (
    engines_from_json,
    parity_from_json,
    quantization_from_json,
    source_from_json,
)

FORMAT = "transom-bundle"
FORMAT_VERSION = 1
MANIFEST = "bundle.json"
QUANTIZED = ("int8", "int4")  # of the weights; accuracy is judged by a gate, not by parity
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTIZED)
# Of a config: the tokens of the longest row that the model can read.
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_source_positions",
)
ROWS = "B"


@dataclass(frozen=True)
class File:
    """A file's entry in bundle.json: size in bytes and SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """bundle.json, checked."""

    name: str
    family: str
    task: str
    precision: str
    axes: Mapping[str, Axis]
    graphs: tuple[GraphFile, ...]
    labels: tuple[str, ...]
    config: Mapping[str, Any]
    options: Mapping[str, Any]  # what the family's tasks need beside the graph
    tokenizer: Mapping[str, Any] | None
    target_tokenizer: Mapping[str, Any] | None  # of what is generated, where it is another
    preprocess: Mapping[str, Any] | None
    generation: Mapping[str, Any] | None  # what generation_config.json says
    files: Mapping[str, File]
    parity: Mapping[str, Any]
    score: Mapping[str, Any] | None
    source: Mapping[str, Any]
    tools: Mapping[str, Any]
    operators: Mapping[str, Any]  # graph -> operator -> how many there were before any pass
    quantization: Mapping[str, Any] | None = None  # present exactly where ``precision`` is one of QUANTIZED
    engines: Mapping[str, Any] = field(default_factory=dict)  # by target, what `transom build` made
    made_for: str = BOTH  # one of MADE_FOR, "for" in bundle.json
    native: Mapping[str, Any] = field(default_factory=dict)  # graph -> what its list of operators fused, or why none is

    def to_json(self) -> dict[str, Any]:
        """Return every field as plain data, null where something is not set."""
        graphs = [every_field(file) for file in self.graphs]
        axes = {name: axis_to_json(axis) for name, axis in self.axes.items()}
        files = {name: dict(vars(file)) for name, file in self.files.items()}
        fields = {**vars(self), "axes": axes, "graphs": graphs, "files": files}
        return {"for" if name == "made_for" else name: value for name, value in fields.items()}


def manifest_from_json(value: dict[str, Any]) -> Manifest:
    """Check every field of bundle.json and its hash over itself; BundleError lists all that is wrong."""
    top = Fields(value, MANIFEST)
    top.text("format")
    top.integer("format_version", 1, FORMAT_VERSION)
    recorded = top.text("manifest_sha256")
    axes = {str(k): axis_from_json(str(k), v, top.problems) for k, v in top.mapping("axes").items()}
    files = {str(k): file_from_json(str(k), v, top.problems) for k, v in top.mapping("files").items()}
    made_for = top.text("for", BOTH, among=MADE_FOR)
    graphs = tuple(graph_from_json(v, axes, files, top.problems, made_for) for v in top.sequence("graphs"))
    if not graphs:
        top.problems.append("graphs is empty")
    names = [str(file.graph.name) for file in graphs]
    top.problems += shared_state_problems([file.graph for file in graphs], axes)
    top.problems += [f"two graphs are called {name[:60]!r}" for name in sorted(set(names)) if names.count(name) > 1]
    top.problems += [
        f"axes.{name} {word} {repr(other)[:60]}, which is no axis"
        for name, axis in axes.items()
        for word, other in (("is like", axis.same_as), ("divides", axis.divides))
        if other is not None and other not in axes
    ]
    top.problems += [
        f"axes.{name} divides {axis.divides!r}, which divides an axis itself"
        for name, axis in axes.items()
        if axis.divides in axes and axes[axis.divides].divides is not None
    ]
    engines = engines_from_json(top.mapping("engines", {}), names, files, axes, top.problems)
    config = top.mapping("config")
    precision = top.text("precision", among=PRECISIONS)
    quantization = quantization_from_json(top.mapping("quantization", None), precision, names, top.problems)
    single: set[str] = set()
    if not top.problems:
        single = {name for file in graphs for name in one_token_axes(file.graph)}
        graphs = tuple(
            replace(file, plans=plans_of(file.graph.name, engines), integers=integers_of(file, quantization, made_for))
            for file in graphs
        )
    manifest = Manifest(
        name=top.text("name"),
        family=top.text("family"),
        task=top.text("task"),
        precision=precision,
        config=config,
        axes=with_ceilings(axes, config, single),
        graphs=graphs,
        labels=tuple(top.take("labels", _strings, "an array of strings", [])),
        options=top.mapping("options", {}),
        tokenizer=top.mapping("tokenizer", None),
        target_tokenizer=top.mapping("target_tokenizer", None),
        preprocess=top.mapping("preprocess", None),
        generation=top.mapping("generation", None),
        files=files,
        source=source_from_json(top.mapping("source"), top.problems),
        tools=top.mapping("tools"),
        operators=top.mapping("operators", {}),
        parity=parity_from_json(top.mapping("parity"), top.problems),
        score=top.mapping("score", None),
        quantization=quantization,
        engines=engines,
        made_for=made_for,
        native=top.mapping("native", {}),
    )
    top.done()
    if recorded != manifest_sha256(value):
        raise BundleError(f"{MANIFEST} does not match its own manifest_sha256; it was changed. Copy the bundle again.")
    return manifest


def with_ceilings(axes: Mapping[str, Axis], config: Mapping[str, Any], single: Collection[str]) -> dict[str, Axis]:
    """Return the axes with the model's number of positions as the ceiling of those that count tokens.

    That is all but B and what divides B; an image takes the position of its mark. That of the axes in ``single`` is 1.
    """
    found = [
        words[name]
        for words in (config, config.get("text_config"))
        if isinstance(words, Mapping)
        for name in POSITIONS
        if type(words.get(name)) is int
    ]
    positions = found[0] if found else None
    ceilings = dict.fromkeys(axes, positions) | dict.fromkeys(single, 1)
    return {
        name: axis if ROWS in (name, axis.divides) else replace(axis, ceiling=ceilings[name])
        for name, axis in axes.items()
    }


def plans_of(graph: str, engines: Mapping[str, Any]) -> dict[str, Plan]:
    """Return the engines of one graph by target, from checked fields."""
    return {
        target: Plan(
            engine["plans"][graph],
            engine["library"],
            engine["version"],
            engine.get("sm"),
            target,
            {name: Axis(**bounds) for name, bounds in engine.get("axes", {}).items()},
        )
        for target, engine in engines.items()
    }


def integers_of(file: GraphFile, quantization: Mapping[str, Any] | None, made_for: str = BOTH) -> str | None:
    """Return what a CPU session makes of the integers of one graph, from checked fields; None where it has none."""
    if quantization is None:
        return None
    if quantization["activations"][file.graph.name] == "none":
        return BLOCKS
    return PRODUCTS if "cpu" in file.files and made_for != TENSORRT_ALONE else SIMULATED


def manifest_sha256(value: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of bundle.json without that field: keys sorted, no white space, ASCII only."""
    rest = {key: item for key, item in value.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_from_json(name: str, value: Any, problems: list[str]) -> File:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or not name.isprintable():
        problems.append(f"files has the path {name!r}, expected a plain relative path that stays in the bundle")
    fields = Fields(value, f"files.{name}", problems)
    size = fields.integer("size", 0, 2**53)
    sha256 = fields.take("sha256", _is_sha256, "64 hexadecimal digits")
    fields.done()
    return File(size, sha256)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
