"""What tests of the tiny random decoders share: ids, transformers' logits of them, a backend that counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

WORST = 1e-5  # max|ours - theirs| / max|theirs|


def assert_close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= WORST * np.abs(expected).max()


def logits_of(model: Any, ids: Any, **inputs: Any) -> NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.as_tensor(np.array(ids)), **inputs).logits.numpy()  # type: ignore[no-any-return]


def random_ids(shape: Any, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 100, shape)


class Counted:
    """A backend that counts its calls and keeps what it was fed."""

    def __init__(self, backend: Any) -> None:
        self.inner, self.graph, self.device = backend, backend.graph, backend.device
        self.fed: list[dict[str, Any]] = []

    def run(self, feeds: Any, shapes: Any) -> Any:
        self.fed.append(dict(feeds))
        return self.inner.run(feeds, shapes)
