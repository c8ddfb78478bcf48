"""Compare TensorRT's variant with the file it was made from, both in ONNX Runtime, on the bundle's golden inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from transom.export.bundle_graphs import stored_graphs
from transom.export.engine.profiles import cache_sizes
from transom.export.engine.trt_graphs import TensorRTGraph
from transom.export.passes.plugin_attention import inline_functions
from transom.export.passes.trt_attention import standard_attention
from transom.export.variants import Variants, emulations, open_variants, pack, simulated
from transom.runtime.backends.base import Array, Backend
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, ParityError
from transom.runtime.golden import GENERATION, read_golden
from transom.runtime.golden_reference import PYTORCH
from transom.runtime.graph_spec import CACHE, Axis, cache_inputs
from transom.runtime.greedy_check import logits_along, prompts_from_arrays
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator

# max|variant - shipped| / max|shipped|: the same operators, here and there in another order. Half precision rounds what
# differs in the last bit of FP32 the other way now and then, and integers carry that on.
TOLERANCES = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2, "int8": 0.1}


class FullCache:
    """Backend that pads shorter caches, for a graph that takes caches of their greatest length only."""

    device = "cpu"

    def __init__(self, backend: Backend, length: int) -> None:
        self._backend, self._length = backend, length
        self.graph = backend.graph
        self._written = [tensor.name for tensor in cache_inputs(self.graph)]

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Run the graph on padded caches and copy what it wrote back."""
        padded = {}
        for name in self._written:  # a caller's may be longer; its used part fits
            rows, heads, held, size = feeds[name].shape
            padded[name] = np.zeros((rows, heads, self._length, size), feeds[name].dtype)
            padded[name][:, :, :held] = feeds[name][:, :, : self._length]
        outputs = self._backend.run({**feeds, **padded}, shapes)
        for name, buffer in padded.items():
            feeds[name][:, :, : self._length] = buffer[:, :, : feeds[name].shape[2]]
        return outputs


def require_trt_parity(
    bundle: Bundle, graphs: Mapping[str, TensorRTGraph], engine: Mapping[str, Axis] | None = None
) -> float:
    """Return the largest error of ``graphs`` against the bundle's own file, each with a GPU's rounding.

    Runs every golden case, a decoder's generation step by step as far as it fits into the cache, whose length is the
    greatest of the ``engine``'s bounds. Raises ParityError where the error exceeds TOLERANCES, ExportError for a bundle
    without golden values. Attention by lengths, which ONNX Runtime does not have, is computed as documented; plugin
    functions are computed by their bodies.
    """
    golden = read_golden(bundle)
    if not golden:
        raise ExportError(f"{bundle.folder} holds no golden values to compare its engines with; export it again.")
    axes, specs = (
        bundle.manifest.axes if engine is None else engine,
        tuple(file.graph for file in bundle.manifest.graphs),
    )

    def rounded(models: Mapping[str, ir.Model]) -> Variants:
        return simulated(pack(specs, emulations(models), "float32"))

    def full(backend: Backend) -> Backend:
        lengths = cache_sizes(backend.graph, axes)
        return FullCache(backend, *lengths.values()) if lengths else backend

    ours = {name: inline_functions(graph.model.clone()) for name, graph in graphs.items()}
    theirs = stored_graphs(bundle, "default")
    for model in ours.values():
        standard_attention(model)
    worst = 0.0
    with (
        open_variants(bundle, rounded(ours), full) as variant,
        open_variants(bundle, rounded(theirs)) as shipped,
    ):
        for case, arrays in sorted(golden.items()):
            compared = list(outputs(variant, shipped, case, arrays, axes))
            if not compared:
                raise ExportError(f"the golden case {case!r} of {bundle.folder} has no outputs; export it again.")
            for name, found, expected in compared:
                if found.shape != expected.shape:  # arrays of two shapes may still broadcast
                    raise ParityError(
                        f"TensorRT's variant of {bundle.folder} gives {name} of {case} as {found.shape}, the bundle "
                        f"{expected.shape}; expected the same. No engine was built; report this."
                    )
                scale = max(float(np.abs(expected).max(initial=0.0)), float(np.finfo(np.float32).tiny))
                error = float(np.abs(found - expected).max(initial=0.0)) / scale
                if not error <= TOLERANCES[bundle.manifest.precision]:
                    raise ParityError(
                        f"TensorRT's variant of {bundle.folder} does not compute what the bundle does: {name} of "
                        f"{case} is off by {error:.2e} of its largest value, "
                        f"{TOLERANCES[bundle.manifest.precision]:g} is allowed. No engine was built; export the "
                        "bundle again, and report it if that does not help."
                    )
                worst = max(worst, error)
    return worst


def outputs(
    variant: LoadedBundle,
    shipped: LoadedBundle,
    case: str,
    arrays: Mapping[str, Mapping[str, Array]],
    axes: Mapping[str, Axis],
) -> Iterator[tuple[str, Array, Array]]:
    """Yield (name, the variant's output, the shipped file's) for one golden case."""
    if case == GENERATION:
        assert isinstance(variant, Generator)
        assert isinstance(shipped, Generator)
        prompts, tokens = prompts_from_arrays(arrays["input"]), arrays[PYTORCH]["tokens"]
        cache = axes[CACHE].max if CACHE in axes else variant.context
        if max(map(variant.decoder_length, prompts)) > cache:  # both sides read the same: any part of a prompt serves
            prompts = [prompt[: max(1, cache // 2)] for prompt in prompts]
        room = cache - max(map(variant.decoder_length, prompts)) + 1  # the last token is not fed
        tokens = tokens[:, :room]
        yield "logits", logits_along(variant, prompts, tokens), logits_along(shipped, prompts, tokens)
        return
    wanted = list(arrays[PYTORCH])
    found, expected = (side.run(arrays["input"], wanted) for side in (variant, shipped))
    yield from ((name, found[name], expected[name]) for name in wanted)
