"""Write plans into a model repository of Triton Inference Server: a folder for each graph, its configuration and plan.

``NAME/config.pbtxt`` is a ``ModelConfig`` in protobuf's text format, ``NAME/<version>/model.plan`` the engine (Triton's
"Model Repository" and "Model Configuration"). Triton's TensorRT backend reads only plans of full TensorRT, and does
not support a cache that is updated in place. Rows of several requests are put into one batch, up to the engine's
greatest. Not yet loaded by a server.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from transom.export.engine.targets import Target
from transom.export.triton.config import CONFIG, INVALID, ModelConfig, tensor_configs
from transom.runtime.atomic_write import write_bytes
from transom.runtime.backends.trt_library import FULL
from transom.runtime.errors import ExportError
from transom.runtime.graph_spec import Axis, Graph, is_decoder
from transom.runtime.manifest import ROWS, Manifest
from transom.runtime.serving.tensors import by_rows

PLAN = "model.plan"


def require_servable(folder: Path, name: str, manifest: Manifest, targets: Sequence[Target]) -> None:
    """Raise ExportError for a bundle that Triton Inference Server cannot serve, before anything is built.

    Refused are targets other than full TensorRT, graphs that write a cache, a model in ``folder`` with other tensors, a
    ``folder`` that cannot be written, and a ``name`` without a character that a URL allows.
    """
    for target in targets:
        if target.library != FULL:
            raise ExportError(
                "--repository is for plans of full TensorRT, which are what Triton Inference Server loads, and "
                f"--target is {target.name!r}. Give --target tensorrt on the machine with the GPU, or leave "
                "--repository out."
            )
    for file in manifest.graphs:
        if is_decoder(file.graph):
            raise ExportError(
                f"the graph {file.graph.name!r} updates its cache in place, which a request to Triton Inference "
                "Server cannot. Leave --repository out; `transom repository` serves it with the runtime."
            )
    for model, graph in models_of(name, manifest).items():
        known = folder / model / CONFIG
        if known.is_file() and known.read_text(encoding="utf-8", errors="replace") != config_of(
            model, graph, manifest.axes
        ):
            raise ExportError(
                f"{known} describes another model, or was changed by hand; expected what this bundle needs. Move "
                f"{folder / model} away, or give another --repository."
            )
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise unwritable(folder, f"{existing} is no folder that can be written")


def models_of(name: str, manifest: Manifest) -> dict[str, Graph]:
    """Return the graphs by the names of their models: ``name``, or where there are several ``name_image``."""
    stem = INVALID.sub("_", name).strip("._-")
    if not stem:
        raise ExportError(
            f"the bundle is called {name!r:.60}, of which nothing can be a model's name in a repository; expected "
            "letters of A to Z or digits. Rename its folder, or leave --repository out."
        )
    several = len(manifest.graphs) > 1
    return {f"{stem}_{file.graph.name}" if several else stem: file.graph for file in manifest.graphs}


def write_repository(folder: Path, name: str, manifest: Manifest, plans: Mapping[str, bytes]) -> list[Path]:
    """Put ``plans``, by graph, into the repository ``folder`` as models named after ``name``; return their folders.

    An existing model gets a new version, visible only when it is complete; Triton serves the newest. Raises ExportError
    for a folder that cannot be written.
    """
    models = models_of(name, manifest)
    try:
        for model, graph in models.items():
            add_version(folder / model, config_of(model, graph, manifest.axes), plans[graph.name])
    except OSError as error:
        raise unwritable(folder, error.strerror or str(error)) from error
    return [folder / model for model in models]


def unwritable(folder: Path, why: str) -> ExportError:
    return ExportError(
        f"cannot write into {folder}: {why}. Check the folder, its permissions and space; engines "
        "that were built are in the bundle."
    )


def add_version(folder: Path, config: str, plan: bytes) -> None:
    """Add a version of a model: written to a hidden folder, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        partial = Path(temporary) / "version"
        partial.mkdir()
        (partial / PLAN).write_bytes(plan)
        write_bytes(folder / CONFIG, config.encode())
        newest = max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)
        os.rename(partial, folder / str(newest + 1))


def config_of(model: str, graph: Graph, axes: Mapping[str, Axis]) -> str:
    """Return config.pbtxt of one graph. Where all tensors have rows first, Triton batches them; the axis is omitted."""
    batched = by_rows(graph)
    return ModelConfig(
        model,
        tensor_configs(graph.inputs, batched=batched),
        tensor_configs(graph.outputs, batched=batched),
        axes[ROWS].max if batched else 0,
        platform="tensorrt_plan",
        queue_delay_us=0 if batched else None,
    ).text()
