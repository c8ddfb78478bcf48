"""The bundle: what is in the folder, and the reader that trusts none of it.

docs/bundle_format.md is the specification. The order of checks: bundle.json is a regular file of sane
size, parses, has a format version we know, has every field well-formed, names only files inside the
folder; then its own hash; then each file's size and SHA-256. Only then is anything else parsed.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from transom.runtime.errors import BundleError
from transom.runtime.graph_spec import COUNT, Axis, Graph, Tensor
from transom.runtime.json_reader import Fields, parse_json
from transom.runtime.manifest_sections import engines_from_json, parity_from_json, quantization_from_json

FORMAT = "transom-bundle"
FORMAT_VERSION = 1
MANIFEST = "bundle.json"
MAX_MANIFEST_BYTES = 16 << 20  # labels of a 100,000-way classifier are 3 MB
MAX_AXIS = 2**31 - 1
DTYPES = ("int64", "float32")  # half precision stays inside the graph: the edges are the same in every bundle
STATE_DTYPES = ("float32", "float16", "bfloat16")  # but for state, which is the graph's own
QUANTIZED = ("int8", "int4")  # of the weights; accuracy is judged by a gate, not by parity
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTIZED)
POSITIONS = ("max_position_embeddings", "n_positions")  # of a config: tokens of the longest row the model can read
ROWS = "B"
# What a CPU session makes of the integers of a graph: products of U8 x S8; weights in blocks (MatMulNBits); or Q/DQ
# pairs computed in float32, as of the graph for TensorRT, whose S8 x S8 no CPU is to multiply.
PRODUCTS, BLOCKS, SIMULATED = "products", "blocks", "simulated"


@dataclass(frozen=True)
class File:
    """What bundle.json says of a file: size in bytes and SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """An engine of one graph: its file, and what built it. ``sm`` is that of the GPU it was built on, where it was.

    ``axes`` are the bounds that it was built for, those of the bundle where bundle.json does not say (version 0.1.0).
    """

    file: str
    library: str
    version: str
    sm: str | None = None
    target: str = ""
    axes: Mapping[str, Axis] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphFile:
    """A graph and where it lies: ``files`` maps a variant ("default", "cpu") to an ONNX file, ``plans`` a target to an
    engine. ``integers`` is PRODUCTS, BLOCKS, SIMULATED, or None where the graph has none."""

    graph: Graph
    files: Mapping[str, str]
    weights: str | None  # external data shared by all of ``files``
    plans: Mapping[str, Plan] = field(default_factory=dict)
    integers: str | None = None

    def file_for(self, device: str) -> str:
        return self.files.get(device, self.files["default"])


@dataclass(frozen=True)
class Manifest:
    """bundle.json, checked."""

    name: str
    family: str
    task: str
    precision: str
    config: Mapping[str, Any]
    axes: Mapping[str, Axis]
    graphs: tuple[GraphFile, ...]
    labels: tuple[str, ...]
    options: Mapping[str, Any]  # what the family's tasks need beside the graph
    tokenizer: Mapping[str, Any] | None
    target_tokenizer: Mapping[str, Any] | None  # of what is generated, where it is another
    preprocess: Mapping[str, Any] | None
    generation: Mapping[str, Any] | None  # what generation_config.json says
    files: Mapping[str, File]
    source: Mapping[str, Any]
    tools: Mapping[str, Any]
    operators: Mapping[str, Any]  # graph -> operator -> how many there were before any pass
    parity: Mapping[str, Any]
    score: Mapping[str, Any] | None
    quantization: Mapping[str, Any] | None = None  # there exactly where ``precision`` is one of QUANTIZED
    engines: Mapping[str, Any] = field(default_factory=dict)  # by target, what `transom build` made


class Bundle:
    """A bundle's folder, its manifest checked and every file's size and hash compared.

    Raises BundleError from the constructor when anything is missing, changed, or outside the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = manifest_from_json(read_manifest(self.folder))
            for name, file in self.manifest.files.items():
                check_file(self.folder, name, file)
        except OSError as error:
            raise BundleError(f"{error.filename or folder} cannot be read: {error.strerror}. Check it.") from None

    def read(self, name: str) -> bytes:
        """The bytes of a file, hashed as they were read: what is returned is what was checked."""
        file = self.manifest.files.get(name)
        if file is None:
            raise BundleError(f"{self.folder / MANIFEST} does not list {name!r} under files; export the bundle again.")
        data = regular_file(self.folder, name).read_bytes()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise changed(self.folder, name)
        return data


def read_manifest(folder: Path) -> Any:
    """The parsed bundle.json of a folder, its version known; nothing else checked yet."""
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder; expected a bundle that `transom export` made.")
    path = regular_file(folder, MANIFEST)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes, at most {MAX_MANIFEST_BYTES} are read; it is not one of ours."
        )
    return versioned(path.read_bytes(), str(path))


def versioned(data: bytes, path: str) -> dict[str, Any]:
    """The parsed bytes of a bundle.json, its version known; nothing else checked yet."""
    value = parse_json(data, path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BundleError(f'{path} does not say "format": "{FORMAT}"; the folder is no bundle of ours.')
    version = value.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise BundleError(
            f"{path} has format version {version!r:.60}, this Transom reads version {FORMAT_VERSION}. "
            "Upgrade with `pip install --upgrade transom`, or export the bundle again."
        )
    return value


def manifest_from_json(value: dict[str, Any]) -> Manifest:
    """Check every field of bundle.json and its hash over itself; BundleError lists all that is wrong."""
    top = Fields(value, MANIFEST)
    top.text("format")
    top.integer("format_version", 1, FORMAT_VERSION)
    recorded = top.text("manifest_sha256")
    axes = {str(k): axis_from_json(str(k), v, top.problems) for k, v in top.mapping("axes").items()}
    files = {str(k): file_from_json(str(k), v, top.problems) for k, v in top.mapping("files").items()}
    graphs = tuple(graph_from_json(v, axes, files, top.problems) for v in top.sequence("graphs"))
    if not graphs:
        top.problems.append("graphs is empty")
    names = [str(file.graph.name) for file in graphs]
    top.problems += [f"two graphs are called {name[:60]!r}" for name in sorted(set(names)) if names.count(name) > 1]
    top.problems += [
        f"axes.{name} is like {repr(axis.like)[:60]}, which is no axis"
        for name, axis in axes.items()
        if axis.like is not None and axis.like not in axes
    ]
    engines = engines_from_json(top.mapping("engines", {}), names, files, axes, top.problems)
    config = top.mapping("config")
    precision = top.text("precision", among=PRECISIONS)
    quantization = quantization_from_json(top.mapping("quantization", None), precision, names, top.problems)
    if not top.problems:
        graphs = tuple(
            replace(file, plans=plans_of(file.graph.name, engines), integers=integers_of(file, quantization))
            for file in graphs
        )
    manifest = Manifest(
        name=top.text("name"),
        family=top.text("family"),
        task=top.text("task"),
        precision=precision,
        config=config,
        axes=with_ceilings(axes, config),
        graphs=graphs,
        labels=tuple(top.take("labels", _strings, "an array of strings", [])),
        options=top.mapping("options", {}),
        tokenizer=top.mapping("tokenizer", None),
        target_tokenizer=top.mapping("target_tokenizer", None),
        preprocess=top.mapping("preprocess", None),
        generation=top.mapping("generation", None),
        files=files,
        source=top.mapping("source"),
        tools=top.mapping("tools"),
        operators=top.mapping("operators", {}),
        parity=parity_from_json(top.mapping("parity"), top.problems),
        score=top.mapping("score", None),
        quantization=quantization,
        engines=engines,
    )
    top.done()
    if recorded != manifest_sha256(value):
        raise BundleError(f"{MANIFEST} does not match its own manifest_sha256; it was changed. Copy the bundle again.")
    return manifest


def with_ceilings(axes: Mapping[str, Axis], config: Mapping[str, Any]) -> dict[str, Axis]:
    """The axes with the model's number of positions as the ceiling of those that count tokens: all but the rows."""
    found = [
        words[name]
        for words in (config, config.get("text_config"))
        if isinstance(words, Mapping)
        for name in POSITIONS
        if type(words.get(name)) is int
    ]
    positions = found[0] if found else None
    return {name: axis if name == ROWS else replace(axis, ceiling=positions) for name, axis in axes.items()}


def plans_of(graph: str, engines: Mapping[str, Any]) -> dict[str, Plan]:
    """The engines of one graph by target, from fields that were checked."""
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


def integers_of(file: GraphFile, quantization: Mapping[str, Any] | None) -> str | None:
    """What a CPU session makes of the integers of one graph, from fields that were checked."""
    if quantization is None:
        return None
    if quantization["activations"][file.graph.name] == "none":
        return BLOCKS
    return PRODUCTS if "cpu" in file.files else SIMULATED


def manifest_sha256(value: Mapping[str, Any]) -> str:
    """SHA-256 of bundle.json without that field: keys sorted, no white space, ASCII only."""
    rest = {key: item for key, item in value.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def axis_from_json(name: str, value: Any, problems: list[str]) -> Axis:
    fields = Fields(value, f"axes.{name}", problems)
    like = fields.text("like", None)
    low, opt, high = (fields.integer(key, 1, MAX_AXIS) or 1 for key in ("min", "opt", "max"))
    if not low <= opt <= high:
        problems.append(f"axes.{name} has min {low}, opt {opt}, max {high}, expected them in this order")
    fields.done()
    return Axis(low, opt, high, like)


def file_from_json(name: str, value: Any, problems: list[str]) -> File:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or not name.isprintable():
        problems.append(f"files has the path {name!r}, expected a plain relative path that stays in the bundle")
    fields = Fields(value, f"files.{name}", problems)
    size = fields.integer("size", 0, 2**53)
    sha256 = fields.take("sha256", _is_sha256, "64 hexadecimal digits")
    fields.done()
    return File(size, sha256)


def graph_from_json(value: Any, axes: Mapping[str, Axis], files: Mapping[str, File], problems: list[str]) -> GraphFile:
    fields = Fields(value, "graphs[]", problems)
    targets = fields.take("files", _names, 'an object of file names, one of them "default"') or {}
    weights = fields.text("weights", None)
    named = [*targets.values(), *([weights] if weights else [])]
    problems += [f"graphs[] names the file {str(f)[:60]!r}, which files does not list" for f in named if f not in files]
    graph = Graph(
        name=fields.text("name"),
        inputs=tuple(tensor_from_json(v, axes, problems) for v in fields.sequence("inputs")),
        outputs=tuple(tensor_from_json(v, axes, problems) for v in fields.sequence("outputs")),
    )
    fields.done()
    tensors = [str(tensor.name) for tensor in (*graph.inputs, *graph.outputs)]
    problems += [f"two tensors are called {n[:60]!r}" for n in sorted(set(tensors)) if tensors.count(n) > 1]
    given = {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}
    asked = {size for tensor in graph.outputs for size in tensor.shape if isinstance(size, str)}
    problems += decoder_problems(graph)
    if not asked <= given:
        problems.append(f"graphs[] has outputs with the axes {sorted(asked - given)}, which no input has")
    return GraphFile(graph, targets, weights)


def decoder_problems(graph: Graph) -> list[str]:
    """What is wrong with a graph that writes caches: the runtime relies on its inputs' names and shapes."""
    written = [output for output in graph.outputs if output.writes is not None]
    inputs = {tensor.name: tensor.shape for tensor in graph.inputs}
    problems = [
        f"{str(output.name)[:60]!r} writes {str(output.writes)[:60]!r}, which is no input of its shape (B, H, C, D)"
        for output in written
        if inputs.get(str(output.writes)) != output.shape or len(output.shape) != 4 or output.shape[2] != "C"
    ]
    targets = [str(output.writes) for output in written]
    problems += [f"two outputs write {name[:60]!r}" for name in sorted(set(targets)) if targets.count(name) > 1]
    if written and (graph.outputs[0].shape[:2] != ("B", "P") or not isinstance(graph.outputs[0].shape[-1], int)):
        problems.append("a graph that writes caches gives logits (B, P, vocabulary) first")
    if written and (
        inputs.get("write_indices") != ("B",)
        or inputs.get("logits_positions") != ("B", "P")
        or len(graph.inputs[0].shape) != 2
        or not isinstance(graph.inputs[0].shape[1], str)
        or graph.inputs[0].dtype != "int64"
        or graph.inputs[0].below is None
    ):
        problems.append(
            "a graph that writes caches takes bounded tokens (B, S) first, "
            "write_indices (B) and logits_positions (B, P)"
        )
    return problems


def tensor_from_json(value: Any, axes: Mapping[str, Axis], problems: list[str]) -> Tensor:
    fields = Fields(value, "graphs[].tensor", problems)
    state = fields.boolean("state", False)
    tensor = Tensor(
        name=fields.text("name"),
        dtype=fields.text("dtype", among=STATE_DTYPES if state else DTYPES),
        shape=tuple(fields.sequence("shape")),
        default=fields.take("default", _is_default, f"an integer of 32 bits or {COUNT!r}", None),
        below=fields.integer("below", 1, 2**63 - 1, None),
        state=state,
        writes=fields.text("writes", None),
    )
    fields.done()
    for size in tensor.shape:
        known = size in axes if isinstance(size, str) else type(size) is int and 0 < size <= MAX_AXIS
        if not known:
            problems.append(f"the shape of {tensor.name!r} has {repr(size)[:60]}, expected an axis name or a size")
    return tensor


def _is_default(value: Any) -> bool:
    return value == COUNT or (type(value) is int and abs(value) <= 2**31)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _names(value: Any) -> bool:
    return isinstance(value, dict) and "default" in value and all(isinstance(name, str) for name in value.values())


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def regular_file(folder: Path, name: str) -> Path:
    """The path of a file that exists, is a regular file, and lies in the folder when links are followed."""
    path = folder / name
    if not path.exists():
        reason = "it is no bundle, or an incomplete one" if name == MANIFEST else "the bundle is incomplete"
        raise BundleError(f"{folder} has no {name}; {reason}. Copy or export it again.")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link that leaves the bundle; a bundle must hold its own files.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise BundleError(f"{path} is no regular file; the bundle is damaged, copy it again.")
    return path


def check_file(folder: Path, name: str, file: File) -> None:
    """Compare a file's size, then its SHA-256, with what bundle.json says."""
    path = regular_file(folder, name)
    if path.stat().st_size != file.size:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes, bundle.json says {file.size}; it is truncated or changed. "
            "Copy the bundle again."
        )
    with path.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
            raise changed(folder, name)


def changed(folder: Path, name: str) -> BundleError:
    return BundleError(f"{folder / name} does not have the SHA-256 that bundle.json says; copy the bundle again.")
