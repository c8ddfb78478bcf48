"""Load a bundle: read its folder, choose the class of its family, open its graphs on a device.

Not called ``load.py``: importing a module of that name would replace the function ``transom.runtime.load``.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from transom.runtime.backends import AUTO, open_backend
from transom.runtime.backends.base import Backend
from transom.runtime.backends.known_sum import doubling
from transom.runtime.bundle import Bundle
from transom.runtime.devices import NO_BUNDLE, Choice, choose
from transom.runtime.saturation import warn_of_saturation
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks import task_class


def load(path: str | PathLike[str], device: str = "cpu", threads: int | None = None) -> Any:
    """Load a bundle's folder; the result has the methods of its family (``Bert``, ``ViT``, ...).

    ``device`` is "cpu", "cuda" (ONNX Runtime on the GPU), "tensorrt" (the bundle's engine for this GPU), or "auto",
    the last of these on which every graph of the bundle opens: ``choice`` of the loaded bundle says why. A device that
    is asked for and absent is an error. ``threads`` is the number of CPU threads per call, None for one per core.

    Raises BundleError when the folder is damaged, hostile or of another format version, BackendError
    when the device or its library is not there. Warns (SaturationWarning), once, where the 8-bit products of an INT8
    bundle add up otherwise than they did at its export.
    """
    bundle = Bundle(str(path))
    loaded = open_bundle(bundle, device, threads)
    warn_of_saturation(bundle.manifest, loaded.device)
    return loaded


def open_bundle(bundle: Bundle, device: str = "cpu", threads: int | None = None) -> LoadedBundle:
    """Open a bundle that was read, as ``load`` does; no warning of saturating sums."""
    return task_class(bundle.manifest.family, bundle.manifest.task)(bundle, device, threads)


def load_with_backends(bundle: Bundle, backends: Mapping[str, Backend]) -> LoadedBundle:
    """Load a bundle around ``backends``, by name of the graph that each executes in place of the bundle's own."""
    return task_class(bundle.manifest.family, bundle.manifest.task)(bundle, backends=backends)


def choice_for(bundle: str | PathLike[str] | None) -> Choice:
    """Return what ``load(bundle, device="auto")`` chooses here, by doing it; without a bundle, for one without engines.

    Raises BackendError where ONNX Runtime cannot be used, BundleError for a damaged bundle.
    """
    if bundle is not None:
        with open_bundle(Bundle(str(bundle)), AUTO) as loaded:
            return loaded.choice
    graph, model = doubling()
    return choose(lambda device: open_backend(graph, lambda name: model, device, 1), {"tensorrt": NO_BUNDLE})[1]
