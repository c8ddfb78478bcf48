"""Run an exported model: load a bundle, give it texts or images, get numpy arrays back.

    loading, session, feeds     a bundle is loaded, its inputs are checked
    bundle, manifest*           its folder, the schema of bundle.json
    graph_spec, families        tensors, axes and graphs; the names of the families
    tasks/                      the methods of each family
    text/, image_*              texts and images become tensors
    decoder, *_state, kv_cache  prefill and decode steps over a cache or a recurrent state
    generation/                 which token is next: greedy, sampling, beams
    backends/, devices          ONNX Runtime, TensorRT, the GPU below them; what "auto" means
    selftest, golden*, greedy_check, compare    outputs compared with golden values
    bench, host, probe, saturation              times, and the machine that they belong to
    serving/, capacity/                         bundles behind servers, and how many of them; never imported here

Needs numpy, onnxruntime, tokenizers and pillow; never torch or onnx. Importing this package costs
next to nothing: the libraries are imported when the first bundle is loaded.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing for its own costs twenty times what the rest does
if TYPE_CHECKING:
    from typing import Any

    from transom.runtime.loading import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from transom.runtime.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "load"]
