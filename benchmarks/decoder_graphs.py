"""Time a decoder's graph for the CPU before and after its rewrites, each in a process of its own, taken in turn.

    python benchmarks/decoder_graphs.py --work DIR                      GPT-2 of 124 M parameters, random weights, int8
    python benchmarks/decoder_graphs.py --work DIR --model transformer  Transformer 6+6
    python benchmarks/decoder_graphs.py --work DIR --fp32               the same rewrites of the FP32 graph

Each rewrite of ``transom.export.passes.cpu`` is added to those before it. A prompt is read and tokens are decoded
greedily by ``Decoder``, as the runtime does; what counts is the ratio of the medians: of wall time, or, with
``--cpu-time``, of the processor time of one thread, which others hardly disturb. Tokens are compared with those of the
first graph.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from full_size_models import random_checkpoint
from graph_sides import Side
from numpy.typing import NDArray

from transom.export.bundle_graphs import operator_counts
from transom.export.checkpoint import LoadedCheckpoint, load_checkpoint
from transom.export.passes._builder import clean_up
from transom.export.passes.cpu import DOMAIN, REWRITES
from transom.export.pipeline import trace
from transom.export.quantization.options import DYNAMIC, QuantizeOptions
from transom.export.quantization.quantizer import Quantizer
from transom.export.variants import pack, with_integers
from transom.runtime.feeds import LOGITS_POSITIONS, WRITE_INDICES
from transom.runtime.graph_spec import Graph, cache_inputs, is_decoder
from transom.runtime.host import processor
from transom.runtime.manifest_graphs import PRODUCTS

NEW = 32  # tokens decoded behind each prompt
SOURCE = 20  # tokens that an encoder read

Arrays = dict[str, NDArray[Any]]


def checkpoint_of(model: str, work: Path) -> LoadedCheckpoint:
    """Load the checkpoint of a published size in ``work``."""
    folder = str(random_checkpoint(model, work))
    return load_checkpoint(folder, task=None, max_sizes={}, image_size=None, ignore_unused=False)


def graphs(fp32: ir.Model, graph: Graph, *, quantized: bool) -> Iterator[tuple[str, ir.Model]]:
    """Yield the graph as it is and after each rewrite more, by what was added."""
    model = fp32
    if quantized:
        config = QuantizeOptions(activations=DYNAMIC).config("int8", (graph,))
        model = Quantizer({graph.name: fp32}, (graph,), config, {graph.name: {}}).cpu()[graph.name]
    yield "int8" if quantized else "FP32", model.clone()
    for name, rewrite in REWRITES.items():
        if rewrite(model):
            model.graph.opset_imports[DOMAIN] = 1
            clean_up(model)
            yield f"+ {name}", model.clone()


def encoder_outputs(graph: Graph) -> Arrays:
    """Return random outputs of an encoder for one row, and their mask; nothing where the graph reads none."""
    rng, caches = np.random.default_rng(1), {tensor.name for tensor in cache_inputs(graph)}
    found: Arrays = {}
    for tensor in graph.inputs[1:]:
        if tensor.name not in {WRITE_INDICES, LOGITS_POSITIONS, *caches}:
            shape = [size if isinstance(size, int) else {"B": 1}.get(size, SOURCE) for size in tensor.shape]
            integers = tensor.dtype == "int64"
            found[tensor.name] = np.ones(shape, np.int64) if integers else rng.normal(size=shape).astype(np.float32)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=("gpt", "transformer"), default="gpt")
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    loaded = checkpoint_of(options.model, options.work)
    graph = next(graph for graph in loaded.graphs if is_decoder(graph))
    fp32 = trace(loaded).graphs[graph.name]
    read, limit = encoder_outputs(graph), loaded.axes["C"].max
    threads = 1 if options.cpu_time else options.threads
    sides: dict[str, Side] = {}
    nodes: dict[str, int] = {}
    for name, model in graphs(fp32, graph, quantized=not options.fp32):
        nodes[name] = sum(operator_counts(model).values())
        files = pack((graph,), {graph.name: model}, "float32")
        if not options.fp32:
            files = with_integers(files, {graph.name: PRODUCTS})
        path = options.work / f"side{len(sides)}.pickle"
        path.write_bytes(pickle.dumps((files.graphs[0], dict(files.files), read)))
        sides[name] = Side("decoder", path=str(path), threads=threads, cpu_time=options.cpu_time, limit=limit)
    kind = "processor time of one thread" if options.cpu_time else f"{threads} threads"
    print(f"on {processor()}, {kind}: {options.model}, medians of {options.rounds} rounds")
    print("| prompt | graph | nodes | prefill, ms | times as fast | step, ms | times as fast | same tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for length in options.prompts:
        prompt = np.random.default_rng(0).integers(0, graph.inputs[0].exclusive_max or 1, (1, length)).tolist()
        prefills: dict[str, list[float]] = {name: [] for name in sides}
        steps: dict[str, list[float]] = {name: [] for name in sides}
        tokens: dict[str, list[int]] = {}
        for turn in range(options.rounds + 1):
            for name in sorted(sides, reverse=bool(turn % 2)):
                prefill, taken, tokens[name] = sides[name].ask(prompt=prompt, new=NEW)
                if turn:  # the first warms up
                    prefills[name].append(prefill * 1e3)
                    steps[name].append(statistics.median(taken) * 1e3)
        first = next(iter(sides))
        for name in sides:
            read_ms, step_ms = statistics.median(prefills[name]), statistics.median(steps[name])
            ratios = (statistics.median(side[first]) / statistics.median(side[name]) for side in (prefills, steps))
            faster, quicker = (f"{ratio:.2f}" for ratio in ratios)
            same = tokens[name] == tokens[first]
            cells = (length, name, nodes[name], f"{read_ms:.1f}", faster, f"{step_ms:.2f}", quicker, same)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    for side in sides.values():
        side.end()


if __name__ == "__main__":
    main()
