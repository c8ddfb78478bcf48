"""Build the engines of a bundle for some targets, check them before and after, and write them into the bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transom.export.bundle_writer import add_to_bundle
from transom.export.engine.build_log import Fusion, fusion_of, kernels_of, memory_of
from transom.export.engine.build_process import EngineResult, build_engine
from transom.export.engine.evidence import COMPILER, Evidence, engine_evidence, graph_evidence, plugin_evidence
from transom.export.engine.profiles import Profile, profiles_of
from transom.export.engine.shapes import Shapes, bounds_to_json, narrowed
from transom.export.engine.targets import Target, require_precision
from transom.export.engine.trt_graphs import LENGTHS, MASK, TensorRTGraph, tensorrt_graphs
from transom.export.engine.trt_parity import require_trt_parity
from transom.export.triton.plans import require_servable, write_repository
from transom.runtime.backends.cuda import find_gpu
from transom.runtime.backends.trt_library import FULL, NAMES, RTX, library
from transom.runtime.backends.trt_plans import FULL_TARGET
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError, EngineError, ExportError
from transom.runtime.graph_spec import Axis
from transom.runtime.made_for import no_tensorrt
from transom.runtime.manifest import QUANTIZED, Manifest

FOLDER = "engines"  # in the bundle
KNOWN_LOG = "1.7"  # the version whose layer names build_log.py knows


@dataclass(frozen=True)
class Engine:
    """One graph built for one target: the plan's size in bytes, seconds, its fusions in each profile, its evidence.

    Attentions by node, each with a reason: ``decomposed`` without a fused kernel, ``plugins`` computed by Transom's
    plugin because TensorRT has no kernel or they add a bias per head, ``masked`` that read a mask though lengths were
    requested.
    """

    target: str
    graph: str
    size: int
    seconds: float
    fusions: tuple[Fusion, ...]
    memory: Mapping[str, int]
    decomposed: Mapping[str, str]
    plugins: Mapping[str, str]
    masked: Mapping[str, str]
    evidence: Evidence = field(default_factory=Evidence)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "graph": self.graph,
            "size": self.size,
            "seconds": round(self.seconds, 2),
            "memory": dict(self.memory),
            "written_out": dict(self.decomposed),
            "plugins": dict(self.plugins),
            "by_mask": dict(self.masked),
            **self.evidence.to_json(),
            "profiles": [fusion.to_json() for fusion in self.fusions],
        }


def build(
    bundle: Bundle,
    targets: Sequence[Target],
    *,
    allow_unfused: bool,
    tell: Callable[[str], None],
    attention: str = MASK,
    plugin: bool = True,
    repository: Path | None = None,
    shapes: Shapes | None = None,
) -> list[Engine]:
    """Build every graph of ``bundle`` for every target, and put the plans into it.

    The graphs are TensorRT's variant, whose outputs are first compared with the bundle's in ONNX Runtime. Nothing is
    written before all engines of all targets are built. For full TensorRT, attention without a kernel or with a bias
    per head becomes the ``plugin``; without it, it is decomposed or TensorRT's own. Its plans also go into a
    ``repository`` of Triton Inference Server. ``shapes`` are the bounds of the engines, within the bundle's;
    bundle.json records them for the runtime, and what was executed on the way.

    Raises ExportError for an option that a target or the bundle does not support, a bundle for the CPU alone among
    them, BackendError where a library is missing, EngineError for a graph that cannot be built, or, unless
    ``allow_unfused``, one whose attention did not fuse or is not recognised in the log.
    """
    manifest = bundle.manifest
    refusal = no_tensorrt(manifest, bundle.folder)
    if refusal is not None:
        raise ExportError(refusal)
    specs = [file.graph for file in manifest.graphs]
    axes = narrowed(manifest.axes, specs, shapes or Shapes())
    for target in targets:
        require_precision(target, manifest.precision, unquantized_precision(manifest))
        require_attention(target, attention)
    bundle_name = bundle.folder.resolve().name
    if repository is not None:
        served_as = replace(manifest, axes=axes)
        require_servable(repository, bundle_name, served_as, targets)
    for target in targets:
        library(target.library)
    checked = {
        kind: checked_trt_graphs(bundle, kind, attention, axes, plugin=plugin, tell=tell)
        for kind in dict.fromkeys(target.library for target in targets)
    }
    graphs = {kind: variant for kind, (variant, _) in checked.items()}
    models = {kind: {name: graph.serialized() for name, graph in variant.items()} for kind, variant in graphs.items()}
    profiles = {file.graph.name: profiles_of(file.graph, axes) for file in manifest.graphs}
    engines: list[Engine] = []
    plans: dict[str, bytes] = {}
    described = dict(manifest.engines)
    for target in targets:
        names = {}
        for name, graph in graphs[target.library].items():
            tell(f"building {name} for {target.name}")
            started = time.perf_counter()
            result = build_engine(name, models[target.library][name], profiles[name], target, tuple(graph.plugins))
            evidence = checked[target.library][1][name] + engine_evidence(
                target, str(library(target.library).__version__), find_gpu() if target.capability is None else None
            )
            engine = engine_of(target, name, graph, result, profiles[name], time.perf_counter() - started, evidence)
            if not allow_unfused:
                require_fused(engine)
            engines.append(engine)
            names[name] = plan_name(manifest, target, name)
            plans[names[name]] = result.plan
        described[target.name] = {
            "library": NAMES[target.library],
            "version": library(target.library).__version__,
            **({"sm": find_gpu().sm} if target.capability is None else {}),
            "attention": attention,
            "axes": bounds_to_json(axes, specs),
            "plans": names,
            "graphs": {engine.graph: engine.to_json() for engine in engines if engine.target == target.name},
        }
    tell("writing the plans into the bundle")
    add_to_bundle(bundle.folder, plans, {"engines": described})
    if repository is not None:
        tell("writing the model repository")
        served = {graph: plans[name] for graph, name in described[FULL_TARGET]["plans"].items()}
        write_repository(repository, bundle_name, served_as, served)
    return engines


def require_attention(target: Target, attention: str) -> None:
    """Raise ExportError for LENGTHS with a library whose parser has not been tried with them.

    TensorRT 11.0's is documented to take the lengths as another input and to scale the scores itself; a parser silently
    drops an input that it does not know.
    """
    if attention == LENGTHS and target.library != RTX:
        raise ExportError(
            f"--attention {LENGTHS} is for the targets of {NAMES[RTX]}, and --target is {target.name!r}, whose parser "
            "may read the operator otherwise. Leave --attention out."
        )


def checked_trt_graphs(
    bundle: Bundle, kind: str, attention: str, axes: Mapping[str, Axis], *, plugin: bool, tell: Callable[[str], None]
) -> tuple[dict[str, TensorRTGraph], dict[str, Evidence]]:
    """Return the graphs of ``bundle`` for a library, and what was executed to check them.

    Their outputs are compared with the bundle's; plugins are compiled for the GPU present and interpreted.
    """
    tell(f"making {NAMES[kind]}'s variant of the graphs")
    graphs = tensorrt_graphs(bundle, attention, plugins=plugin and kind == FULL, axes=axes)
    require_compiler(graphs)
    tell("comparing it with the bundle")
    compared = graph_evidence(require_trt_parity(bundle, graphs, axes))
    evidence = dict.fromkeys(graphs, compared)
    if any(graph.plugins for graph in graphs.values()):
        tell("compiling our attention, and running it in Triton's interpreter")
        major, minor = find_gpu().capability
        for name, found in plugin_evidence(graphs, 10 * major + minor).items():
            evidence[name] += found
    return graphs, evidence


def require_compiler(graphs: Mapping[str, TensorRTGraph]) -> None:
    """Raise BackendError where a plugin has to be compiled and the compiler is not installed."""
    count = sum(len(graph.plugins) for graph in graphs.values())
    if count and find_spec(COMPILER) is None:
        reason = next(reason for graph in graphs.values() for reason in graph.plugins.values())
        raise BackendError(
            f"{count} attentions {reason} are Transom's kernel, which is compiled by {COMPILER}, and {COMPILER} is not "
            "installed. Run `pip install 'transom[plugin]'`, or give --no-plugin to leave them to TensorRT."
        )


def unquantized_precision(manifest: Manifest) -> str:
    """Return the precision of the layers that are not quantised."""
    if manifest.precision not in QUANTIZED or manifest.quantization is None:
        return manifest.precision
    return str(manifest.quantization.get("elsewhere", {}).get("default", "fp16"))


def plan_name(manifest: Manifest, target: Target, graph: str) -> str:
    """Return ``engines/rtx-sm86.plan``, or for a bundle with several graphs ``engines/rtx-sm86.encoder.plan``."""
    which = f".{graph}" if len(manifest.graphs) > 1 else ""
    return f"{FOLDER}/{target.name}{which}.plan"


def engine_of(
    target: Target,
    name: str,
    graph: TensorRTGraph,
    result: EngineResult,
    profiles: Sequence[Profile],
    seconds: float,
    evidence: Evidence,
) -> Engine:
    """Describe a built graph: size, fusions per profile, memory, and how each attention is computed."""
    kernels = kernels_of(result.log, len(profiles))
    fusions = tuple(
        fusion_of(profile.name, layers, graph.operators, graph.integer_products)
        for profile, layers in zip(profiles, kernels, strict=True)
    )
    reasons = (graph.decomposed, graph.plugins, graph.masked)
    return Engine(target.name, name, len(result.plan), seconds, fusions, memory_of(result.log), *reasons, evidence)


def require_fused(engine: Engine) -> None:
    """Raise EngineError where an attention is not one kernel, or is not recognised in the builder's log."""
    for fusion in engine.fusions:
        if fusion.unfused:
            raise EngineError(
                f"of the graph {engine.graph!r} for {engine.target} {fusion.attention} of {fusion.attentions} "
                f"attentions became one kernel each in the profile {fusion.profile}; {fusion.unfused[0]} did not. "
                "Nothing was written. Give --allow-unfused to take the slower engine."
            )
    for fusion in engine.fusions:
        for node, seen in fusion.unrecognized_attention.items():
            raise EngineError(
                f"whether attention fused in the graph {engine.graph!r} for {engine.target} is not understood: of "
                f"{len(fusion.unrecognized_attention)} of {fusion.attentions} attentions in the profile "
                f"{fusion.profile} the builder's log has names that this version does not know; of {node} {seen}. "
                "Nothing was written. "
                f"Upgrade Transom, or build with {NAMES[RTX]} {KNOWN_LOG}, whose log it knows; or give --allow-unfused "
                "to take the engine as it is."
            )
