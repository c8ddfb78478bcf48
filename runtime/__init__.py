"""How an artefact runs: load a bundle, hand it text or images, get numpy arrays back.

    session, bundle, inputs     what a loaded bundle is, and what it is given
    tasks/                      what each family offers
    text/, images, preprocess   words and pictures become numbers
    decoder/, generate/         steps over a cache; which token is next
    backends/                   ONNX Runtime, TensorRT, the GPU below them
    selftest, replay, compare, bench    what it is held to

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
