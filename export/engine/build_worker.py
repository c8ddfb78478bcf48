"""Build one engine in a process of its own: ``python -m transom.export.engine.build_worker FOLDER``.

The builder is native code that ignores signals and that an unusual graph may crash; a process can be killed. FOLDER
holds ``job.json`` and ``graph.onnx``; ``engine.plan``, ``log.txt`` and, on failure, ``error.json`` are written there.
Polygraphy decides between TensorRT and TensorRT-RTX once per process, which is a second reason.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from transom.runtime.backends.trt_library import FULL, RTX, library
from transom.runtime.errors import BackendError, one_line

WATCH_S = 0.2
JOB, GRAPH, PLAN, LOG, ERROR = "job.json", "graph.onnx", "engine.plan", "log.txt", "error.json"


def build(folder: Path) -> dict[str, Any] | None:
    """Build the job in ``folder``; return None, or the failure: "kind", "message", the "node" and its "operator"."""
    job = json.loads((folder / JOB).read_text())
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if job["library"] == RTX else "0"
    trt = library(job["library"])
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile, engine_bytes_from_network, util
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # its messages are in log.txt already
    with (folder / LOG).open("w", encoding="utf-8") as log:

        class TrtLogger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log.write(f"{message}\n")

        util.TRT_LOGGER = logger = TrtLogger()
        failures: list[Exception] = []
        nodes = job.get("plugins", ())
        if nodes:
            register(failures)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(folder / GRAPH)):
            error = parser.get_error(0)
            return {
                "kind": "plugin" if error.node_name() in nodes else "parse",
                "node": error.node_name(),
                "operator": error.node_operator(),
                "message": one_line(RuntimeError(error.desc())),
            }
        missing = without_plugin(network, nodes, trt.LayerType.PLUGIN_V3) if nodes else None
        if missing is not None:
            return {"kind": "plugin", "message": f"the parser made no plugin of the node {missing!r}."}
        profiles = []
        for shapes in job["profiles"]:
            profile = Profile()
            for name, (least, tuned, most) in shapes.items():
                profile.add(name, least, tuned, most)
            profiles.append(profile)
        flags = job["flags"]
        verbosity = getattr(trt.ProfilingVerbosity, flags["profiling_verbosity"])
        options: dict[str, Any] = {"profiles": profiles, "profiling_verbosity": verbosity}
        if job["library"] == RTX:
            config = CreateConfigRTX(compute_capabilities=[tuple(job["capability"])], **options)
        else:
            config = CreateConfig(**options)

        def set_tf32(builder: Any, network: Any, config: Any) -> None:
            (config.set_flag if flags["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)

        config = PostprocessConfig(config, set_tf32)
        try:
            plan = engine_bytes_from_network((builder, network, parser), config=config)
        except Exception as failure:
            if failures:  # raised in a plugin; the builder's own error says less
                return {"kind": "plugin", "message": one_line(failures[0])}
            if not isinstance(failure, PolygraphyException):
                raise
            return {"kind": "build", "message": one_line(failure)}
        (folder / PLAN).write_bytes(bytes(plan))
    return None


def register(failures: list[Exception]) -> None:
    """Register Transom's plugins for the GPU present; exceptions inside them are added to ``failures``."""
    from transom.export.plugins.trt_plugin import register_plugins
    from transom.runtime.backends.cuda import find_gpu

    major, minor = find_gpu().capability
    register_plugins(import_module(f"{FULL}.plugin"), 10 * major + minor, failures.append)


def without_plugin(network: Any, nodes: Sequence[str], kind: Any) -> str | None:
    """Return the first of ``nodes`` that is no layer of this ``kind``: the parser may inline a function instead."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    plugins = {layer.name for layer in layers if layer.type == kind}
    return next((node for node in nodes if node not in plugins), None)


def end_with_parent(folder: Path) -> None:
    """Exit, and remove ``folder``, when the parent process is gone: a parent cannot pass on SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Build the job in the folder that the command line names; write error.json and exit with 1 on failure."""
    folder = Path(sys.argv[1])
    end_with_parent(folder)
    try:
        problem = build(folder)
    except BackendError as error:
        problem = {"kind": "library", "message": str(error)}
    except ImportError as error:
        problem = {"kind": "library", "message": f"{one_line(error)}. Run `pip install 'transom[tensorrt]'`."}
    except MemoryError:
        problem = {"kind": "memory", "message": "out of memory"}
    if problem is not None:
        (folder / ERROR).write_text(json.dumps(problem))
        sys.exit(1)


if __name__ == "__main__":
    main()
