"""Load a bundle: read its folder, choose the class of its family, open its graphs on a device.

Not called ``load.py``: importing a module of that name would replace the function ``transom.runtime.load``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any

from transom.runtime.backends import AUTO, FASTEST_FIRST, open_backend
from transom.runtime.backends.base import Backend
from transom.runtime.backends.kernels import AUTO as AUTO_KERNELS
from transom.runtime.backends.kernels import LIST, NATIVE
from transom.runtime.backends.known_sum import doubling
from transom.runtime.bundle import Bundle
from transom.runtime.devices import NO_BUNDLE, Choice, choose
from transom.runtime.format import at
from transom.runtime.manifest import Manifest
from transom.runtime.saturation import warn_of_saturation
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks import task_class


def load(
    path: str | PathLike[str], device: str = "cpu", threads: int | None = None, kernels: str = AUTO_KERNELS
) -> Any:
    """Load a bundle's folder; the result has the methods of its family (``Bert``, ``ViT``, ...).

    ``device`` is "cpu", "cuda" (ONNX Runtime on the GPU), "tensorrt" (the bundle's engine for this GPU), or "auto",
    the last of these on which every graph of the bundle opens: ``choice`` of the loaded bundle says why. A device that
    is asked for and absent is an error. ``threads`` is the number of CPU threads per call, None for one per core.

    ``kernels`` is what executes graphs on the CPU: "native", the kernels of this package, "onnxruntime", or "auto",
    the native ones for each graph that the bundle has a list of operators for, where they run here; ``kernels`` of the
    loaded bundle says which and why. "native" is an error where a graph cannot run so.

    Every file's SHA-256 is compared but those of other devices' engines, which ``selftest`` compares too.

    Raises BundleError when the folder is damaged, hostile or of another format version, BackendError
    when the device or its library is not there. Warns (SaturationWarning), once, where the 8-bit products of an INT8
    bundle add up otherwise than they did at its export.
    """
    bundle = Bundle(str(path), verify=False)
    names = bundle.manifest.files.keys() - plans_of(bundle.manifest)
    return open_verified(bundle, device, threads, names, kernels)


def open_verified(
    bundle: Bundle, device: str, threads: int | None, names: Collection[str], kernels: str = AUTO_KERNELS
) -> LoadedBundle:
    """Open a bundle, and compare the hashes of those files of ``names`` that opening it does not read, meanwhile.

    Each file is hashed once. Raises what ``load`` raises.
    """
    unread = {*names} - may_be_read(bundle.manifest, device)
    with ThreadPoolExecutor(1, thread_name_prefix="transom-verify") as pool:
        verified = pool.submit(bundle.verify, unread)
        loaded = open_bundle(bundle, device, threads, kernels)
        try:
            verified.result()
            bundle.verify(names)
        except BaseException:
            loaded.close()
            raise
    if any(choice.kernels != NATIVE for choice in loaded.kernels.values()):  # whose sums are exact everywhere
        warn_of_saturation(bundle.manifest, loaded.device)
    return loaded


def may_be_read(manifest: Manifest, device: str) -> set[str]:
    """Return the files that opening a bundle on ``device`` may read: all that it reads, and perhaps more."""
    devices = FASTEST_FIRST if device == AUTO else (device,)
    found = (file.files.get(each, file.files.get("default")) for file in manifest.graphs for each in devices)
    names = {name for name in found if name is not None}  # a bundle for the CPU alone may have none for another
    names |= {file.files[LIST] for file in manifest.graphs if LIST in file.files}
    names |= {file.weights for file in manifest.graphs if file.weights is not None} | plans_of(manifest)
    return names | {str(at(spec, "file")) for spec in (manifest.tokenizer, manifest.target_tokenizer) if spec}


def plans_of(manifest: Manifest) -> set[str]:
    """Return the files of all engines."""
    return {plan.file for file in manifest.graphs for plan in file.plans.values()}


def open_bundle(
    bundle: Bundle, device: str = "cpu", threads: int | None = None, kernels: str = AUTO_KERNELS
) -> LoadedBundle:
    """Open a bundle that was read, as ``load`` does; no warning of saturating sums."""
    return task_class(bundle.manifest.family, bundle.manifest.task)(bundle, device, threads, kernels=kernels)


def load_with_backends(bundle: Bundle, backends: Mapping[str, Backend]) -> LoadedBundle:
    """Load a bundle around ``backends``, by name of the graph that each executes in place of the bundle's own."""
    return task_class(bundle.manifest.family, bundle.manifest.task)(bundle, backends=backends)


def choice_for(bundle: str | PathLike[str] | None) -> Choice:
    """Return what ``load(bundle, device="auto")`` chooses here, by doing it; without a bundle, for one without engines.

    Raises BackendError where ONNX Runtime cannot be used, BundleError for a damaged bundle.
    """
    if bundle is not None:
        with open_bundle(Bundle(str(bundle), verify=False), AUTO) as loaded:
            return loaded.choice
    graph, model = doubling()
    return choose(lambda device: open_backend(graph, lambda name: model, device, 1), {"tensorrt": NO_BUNDLE})[1]
