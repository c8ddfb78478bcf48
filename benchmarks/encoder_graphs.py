"""Time an encoder's INT8 graph for the CPU before and after its rewrites, each in a process of its own, in turn.

    python benchmarks/encoder_graphs.py --work DIR                        BERT-base, one text of 128 tokens
    python benchmarks/encoder_graphs.py --work DIR --model vit --batch 8  ViT-B/16, eight images
    python benchmarks/encoder_graphs.py --work DIR --model clip --graph text --tokens 77

Weights are random. Each rewrite of ``transom.export.passes.cpu`` is added to those before it; ``dynamic`` is what
onnxruntime's own quantize_dynamic makes of the FP32 graph (products alone, per channel). Ranges are the smallest and
largest values over four inputs. Outputs are compared with those of the first graph. What counts is the ratio of the
medians: of wall time, or, with ``--cpu-time``, of the processor time of one thread, which others hardly disturb.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from full_size_models import MODELS, random_checkpoint
from graph_sides import Side, opened
from numpy.typing import NDArray

from transom.calib.histogram import Histogram
from transom.export.checkpoint import LoadedCheckpoint, load_checkpoint
from transom.export.passes._builder import clean_up
from transom.export.passes.cpu import DOMAIN, REWRITES
from transom.export.pipeline import trace
from transom.export.quantization.options import QuantizeOptions
from transom.export.quantization.quantizer import Quantizer, calibrated_tensors
from transom.runtime.graph_spec import Graph
from transom.runtime.host import processor

SAMPLES = 4  # inputs that ranges are taken over
WARM_UP = 3  # runs of each graph

Arrays = dict[str, NDArray[Any]]


def checkpoint_of(model: str, work: Path) -> LoadedCheckpoint:
    """Load the checkpoint of a published size in ``work``."""
    folder = str(random_checkpoint(model, work))
    return load_checkpoint(folder, task=None, max_sizes={}, image_size=None, ignore_unused=False)


def inputs_of(graph: Graph, model: str, rows: int, tokens: int) -> Arrays:
    """Return ``rows`` real texts of ``tokens`` tokens, or photographs, for the inputs of a graph."""
    data = MODELS[model][2]()
    found: Arrays = {}
    for tensor in graph.inputs:
        if tensor.name == "token_type_ids":
            found[tensor.name] = np.zeros((rows, tokens), np.int64)
        elif tensor.name == "attention_mask":
            found[tensor.name] = np.ones((rows, tokens), np.int64)
        elif tensor.name == "input_ids":
            found[tensor.name] = np.resize(data[tensor.name], (rows, tokens))
            found[tensor.name][:, -1] = data[tensor.name][0, -1]
        else:
            found[tensor.name] = np.resize(data[tensor.name], (rows, *data[tensor.name].shape[1:]))
    return found


def saved(model: ir.Model, path: Path) -> Path:
    """Save a graph, its weights beside it, and return its path."""
    ir.save(model, path, external_data=f"{path.name}.data")
    return path


def quantized(fp32: ir.Model, graph: Graph, feeds: Arrays, work: Path) -> ir.Model:
    """Return the INT8 graph for the CPU in Q/DQ, its ranges taken over ``feeds``."""
    config = QuantizeOptions().config("int8", (graph,))
    wanted = calibrated_tensors(fp32, config, graph.name)
    tapped = fp32.clone()
    values = {value.name: value for node in tapped.graph for value in node.outputs}
    known = {value.name for value in (*tapped.graph.outputs, *tapped.graph.inputs)}
    tapped.graph.outputs.extend(values[name] for name in wanted if name not in known)
    session = opened(saved(tapped, work / "tapped.onnx"), 0)
    seen = feeds | dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
    ranges: dict[str, Histogram] = defaultdict(Histogram)
    for name in wanted:
        ranges[name].update(np.asarray(seen[name], np.float32))
    config = QuantizeOptions(method="minmax").config("int8", (graph,))
    return Quantizer({graph.name: fp32}, (graph,), config, {graph.name: ranges}).cpu()[graph.name]


def graphs(model: ir.Model) -> Iterator[tuple[str, ir.Model]]:
    """Yield the graph as it is and after each rewrite more that finds something, by what was added."""
    yield "as quantised", model.clone()
    for name, rewrite in REWRITES.items():
        if rewrite(model):
            model.graph.opset_imports[DOMAIN] = 1
            clean_up(model)
            yield f"+ {name}", model.clone()


def dynamic(fp32: ir.Model, work: Path) -> ir.Model:
    """Return what onnxruntime's dynamic quantisation makes of a graph's products; with its attention none loads."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, made = work / "fp32.onnx", work / "dynamic.onnx"
    ir.save(fp32.clone(), source, external_data=f"{source.name}.data")
    kinds = ["MatMul", "Gemm"]
    quantize_dynamic(source, made, per_channel=True, op_types_to_quantize=kinds, weight_type=QuantType.QInt8)
    return ir.load(made)


def operators_of(session: Any, feeds: Arrays, runs: int) -> Counter[str]:
    """Return the milliseconds of each operator in one run: of each node the least over ``runs``."""
    for _ in range(runs):
        session.run(None, feeds)
    path = Path(session.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    least: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"]["op_name"], event["name"]
            least[key] = min(least.get(key, float("inf")), event["dur"] / 1000)
    spent: Counter[str] = Counter()
    for (operator, _), milliseconds in least.items():
        spent[operator] += milliseconds  # type: ignore[assignment]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=("bert", "vit", "clip"), default="bert")
    parser.add_argument("--graph", help="by default the first")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    parser.add_argument("--profile", action="store_true", help="milliseconds by operator, first graph and last")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    threads = 1 if arguments.cpu_time else arguments.threads

    loaded = checkpoint_of(arguments.model, arguments.work)
    graph = next(each for each in loaded.graphs if arguments.graph in (None, each.name))
    fp32 = trace(loaded).graphs[graph.name]
    ranges = inputs_of(graph, arguments.model, SAMPLES, min(arguments.tokens, 64))
    made = dict(graphs(quantized(fp32, graph, ranges, arguments.work)))
    sides = {"dynamic": dynamic(fp32, arguments.work)} | made
    feeds = inputs_of(graph, arguments.model, arguments.batch, arguments.tokens)
    given = arguments.work / "feeds.npz"
    np.savez(given, **feeds)
    processes = {
        name: Side(
            "encoder", path=str(saved(model, arguments.work / f"side{i}.onnx")), feeds=str(given), threads=threads,
            cpu_time=arguments.cpu_time,
        )
        for i, (name, model) in enumerate(sides.items())
    }  # fmt: skip
    first = "as quantised"
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARM_UP + arguments.rounds):
        for name in sorted(processes, reverse=bool(turn % 2)):
            taken = processes[name].ask()
            if turn >= WARM_UP:
                times[name].append(1000 * taken)
    outputs: dict[str, list[NDArray[Any]]] = {}
    for name, process in processes.items():
        answers = arguments.work / "outputs.npz"
        process.ask(save=str(answers))
        with np.load(answers) as stored:
            outputs[name] = [stored[key] for key in stored.files]
        process.end()
    print(f"{MODELS[arguments.model][0]}, {graph.name}, batch {arguments.batch}; {processor()}")
    kind = "of one thread's processor time" if arguments.cpu_time else f"with {threads} threads"
    print(f"onnxruntime {onnxruntime.__version__}, milliseconds {kind}")
    for name, found in outputs.items():
        off = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, outputs[first], strict=True))
        median = statistics.median(times[name])
        ratio = statistics.median(times[first]) / median
        print(f"{name:24} {median:8.2f} (least {min(times[name]):8.2f}) {ratio:6.3f} x  off by {off:.2g}")
    if arguments.profile:
        for name in (first, list(made)[-1]):
            path = saved(sides[name], arguments.work / "profiled.onnx")
            session = opened(path, threads, arguments.work / "profile")
            spent = operators_of(session, feeds, arguments.rounds)
            print(name, *(f"{operator} {each:.2f}" for operator, each in spent.most_common(9)), sep="\n    ")


if __name__ == "__main__":
    main()
