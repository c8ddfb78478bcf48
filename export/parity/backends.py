"""The sides of a parity run as loaded bundles: the same runtime around the PyTorch module, or around other graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import nn

from transom.export.checkpoint import LoadedCheckpoint
from transom.export.parity.cases import PYTORCH
from transom.runtime.backends.base import Array
from transom.runtime.backends.kernels import AUTO, NATIVE
from transom.runtime.backends.ort import OrtBackend
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError, BundleError, ExportError
from transom.runtime.graph_spec import Graph, is_cache
from transom.runtime.loading import load_with_backends, open_bundle
from transom.runtime.manifest_graphs import SIMULATED
from transom.runtime.session import LoadedBundle


class PyTorchBackend:
    """The PyTorch module in FP32 as a backend; ``give_back`` returns its weights' memory until the next run."""

    device = PYTORCH

    def __init__(self, module: nn.Module, graph: Graph, give_back: Callable[[], None] = lambda: None) -> None:
        self._module, self.graph = module, graph.with_state_dtype("float32")
        self.give_back = give_back

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Compute the outputs ``shapes`` names, as a backend does; the module writes its caches in place."""
        with torch.inference_mode():
            outputs = self._module(*(torch.from_numpy(feeds[tensor.name]) for tensor in self.graph.inputs))
        named = {tensor.name: value.numpy() for tensor, value in zip(self.graph.outputs, outputs, strict=True)}
        for tensor in self.graph.outputs:
            if tensor.aliases is not None and not is_cache(tensor):
                feeds[tensor.aliases][...] = named[tensor.name]
        return {name: named[name] for name in shapes}


def open_pytorch(bundle: Bundle, loaded: LoadedCheckpoint) -> LoadedBundle:
    """Load the bundle around the PyTorch module: whatever differs comes from the graphs alone."""
    parts = loaded.parts()
    backends = {
        file.graph.name: PyTorchBackend(parts[file.graph.name], file.graph, loaded.give_back)
        for file in bundle.manifest.graphs
    }
    return load_with_backends(bundle, backends)


def open_native(bundle: Bundle) -> LoadedBundle | None:
    """Load the bundle around its lists of fused operators; graphs that have none stay in ONNX Runtime.

    None where no graph has a list, or no library is here that executes them.
    """
    if not any(NATIVE in file.files for file in bundle.manifest.graphs):
        return None
    loaded = open_bundle(bundle, kernels=AUTO)
    if any(choice.kernels == NATIVE for choice in loaded.kernels.values()):
        return loaded
    loaded.close()
    return None


def open_default_files(bundle: Bundle) -> None:
    """Build an ONNX Runtime session of each default file that has a variant for the CPU beside it.

    Parity opens the variant alone, so nothing else would show that what ships for other devices loads at all. Types and
    the graph's edges are checked and kernels found; nothing is computed, for how half precision adds depends on the
    processor. ONNX Runtime's CPU has no kernels of BF16: of such a file only operators, types and shapes were checked,
    when it was written. Raises ExportError.
    """
    if bundle.manifest.precision == "bf16":
        return
    for file in bundle.manifest.graphs:
        default = file.files.get("default")
        if default is None or file.file_for("cpu") == default:
            continue
        alone = replace(file, files={"default": default}, integers=file.integers and SIMULATED)
        try:
            with closing(bundle.reader()) as reader:
                opened = OrtBackend(alone, reader, "cpu", None)
        except (BackendError, BundleError) as error:
            raise ExportError(
                f"{default}, which would ship for GPUs, does not load: {error} Report this, with the checkpoint's "
                "config.json; --precision fp32 ships no such file."
            ) from None
        wrong = {*opened.graph.inputs, *opened.graph.outputs} - {*file.graph.inputs, *file.graph.outputs}
        if wrong:
            raise ExportError(
                f"{default}, which would ship for GPUs, has {', '.join(sorted(each.name for each in wrong))} in "
                "another dtype than bundle.json says. Report this, with the checkpoint's config.json."
            )
