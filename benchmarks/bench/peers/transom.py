"""This project: bundles exported by its own command, run by its runtime. Also for an earlier installation of it.

Bundles run on the kernels that ``load`` chooses; the variants of BY_ONNXRUNTIME run the same bundles on ONNX Runtime.
``int8-saturating`` is the INT8 bundle on a processor whose U8 x S8 products saturate, without the session's option that
makes their sums exact: its answers are wrong, its time stands for comparison.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from bench.paths import Paths
from bench.registry import BY_ONNXRUNTIME
from bench.session import Arrays, Calls
from bench.workloads import ENCODER, GENERATION, THREADS, Workload

SATURATING = "int8-saturating"
COMMAND = "from transom.cli.main import main; main()"
LOG_TAIL = 3  # lines of a failed export that become the reason
PEER = "transom"


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("transom", "onnxruntime", "numpy")}


def prepare(variant: str, model: str, paths: Paths, peer: str = PEER) -> str:
    """Export in a process of its own; a quantised bundle without the gate, which random weights say nothing to."""
    if bundle_of(variant) != variant:
        return f"the {bundle_of(variant).upper()} bundle"
    out = paths.bundle(peer, model, variant)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", COMMAND, "export", str(paths.checkpoint(model)), "--out", str(out)]
    command += ["--precision", variant]
    if variant != "fp32":
        command += ["--no-gate", "--calibration-data", str(paths.calibration(model))]
        command += ["--for", "cpu"] if peer == PEER else []  # which earlier versions do not know
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(" ".join((done.stderr + done.stdout).strip().splitlines()[-LOG_TAIL:]))
    return f"transom export --precision {variant}" + ("" if variant == "fp32" else " --no-gate")


def open_session(variant: str, workload: Workload, inputs: Arrays, paths: Paths, peer: str = PEER) -> Calls:
    loaded = opened(paths.bundle(peer, workload.model, bundle_of(variant)), variant)
    return session_of(loaded, workload, inputs)


def bundle_of(variant: str) -> str:
    """Return the precision whose bundle a variant runs."""
    return "int8" if variant == SATURATING else BY_ONNXRUNTIME.get(variant, variant)


def opened(bundle: Any, variant: str) -> Any:
    """Load a bundle with THREADS threads."""
    from transom.runtime import load

    if variant in BY_ONNXRUNTIME:
        return load(bundle, threads=THREADS, kernels="onnxruntime")
    if variant != SATURATING:
        return load(bundle, threads=THREADS)
    from transom.runtime.backends import open_backend
    from transom.runtime.bundle import Bundle
    from transom.runtime.loading import load_with_backends

    read = Bundle(bundle)
    graphs = {
        file.graph.name: open_backend(replace(file, integers=None), read.read, "cpu", THREADS)
        for file in read.manifest.graphs
    }
    return load_with_backends(read, graphs)


def session_of(loaded: Any, workload: Workload, inputs: Arrays) -> Calls:
    """Return the calls on a loaded bundle: ``run``, or ``generate`` of token ids."""
    if workload.kind == ENCODER:
        wanted = {"bert": "last_hidden_state", "vit": "logits", "clip": f"{workload.part}_embeds"}[workload.model]
        return Calls(workload, run=lambda: loaded.run(inputs)[wanted], close=loaded.close)
    ids = [int(token) for token in inputs["input_ids"][0]]

    def generate(new: int) -> Any:
        return loaded.generate(
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=workload.beams
        )  # fmt: skip

    logits = None
    if workload.kind == GENERATION and hasattr(loaded, "prefill"):  # which version 0.1.0 has not
        logits = lambda: loaded.prefill([ids]).logits[0]  # noqa: E731
    return Calls(workload, generate=generate, logits=logits, close=loaded.close)
