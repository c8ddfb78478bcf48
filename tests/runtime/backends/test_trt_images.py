"""What groups of rows share, on an emulated GPU: uploaded where it changes, repeated for the rows, given back."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from emulated_gpu import EmulatedTensorRT, view
from transom.runtime.backends.cuda import OutOfMemory
from transom.runtime.backends.trt_memory import DeviceArray, Pool, TrtDecoderState
from transom.runtime.errors import BackendError
from transom.runtime.graph_spec import Tensor

CACHES = [Tensor("key_cache.0", "float32", ("B", 1, "C", 2), default=0, state=True)]
NAME = "image_key.0"


def images(*values: float, width: int = 3) -> dict[str, Any]:
    """One image for each group, (G, 1, 1, width, 2), all of one value."""
    return {
        NAME: np.broadcast_to(np.array(values, np.float32)[:, None, None, None, None], (len(values), 1, 1, width, 2))
    }


def held(state: TrtDecoderState) -> list[float]:
    """The value of each row's images on the GPU."""
    array: DeviceArray = state.feeds[NAME]
    found = view(array.address, array.nbytes).view(np.float32).reshape(array.shape)
    assert (found == found[:, :1, :1, :1, :1]).all()
    return [float(value) for value in found[:, 0, 0, 0, 0]]


def copies(gpu: EmulatedTensorRT, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each copy from now on."""
    seen: list[int] = []
    original = gpu.cuda.cudaMemcpyAsync

    def counted(to: int, source: int, size: int, *others: Any) -> Any:
        seen.append(size)
        return original(to, source, size, *others)

    monkeypatch.setattr(gpu.cuda, "cudaMemcpyAsync", counted, raising=False)
    return seen


def test_they_are_uploaded_once_and_no_step_touches_them(
    gpu: EmulatedTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrtDecoderState(Pool(1 << 20), CACHES, 8, 2, 8, {})
    seen = copies(gpu, monkeypatch)
    state.set_constants(images(1, 2))
    assert (held(state), seen) == ([1, 2], [48])
    first = state.feeds[NAME]
    for tokens in range(1, 9):
        state.reserve(tokens)
        assert state.feeds[NAME] is first
    state.reorder(np.array([0, 1]))
    assert (state.feeds[NAME], seen) == (first, [48])


def test_rows_of_a_group_get_its_images(gpu: EmulatedTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams begin, change places within their group, end, and move to another: the GPU copies, the host does not."""
    state = TrtDecoderState(Pool(1 << 20), CACHES, 8, 2, 8, {})
    state.set_constants(images(1, 2))
    first, seen = state.feeds[NAME], copies(gpu, monkeypatch)
    state.reorder(np.array([0, 0, 0, 1, 1, 1]))
    assert (held(state), seen) == ([1, 1, 1, 2, 2, 2], [24] * 6)
    assert state.feeds[NAME] is not first
    beams = state.feeds[NAME]
    state.reorder(np.array([2, 0, 0, 5, 4, 3]))
    assert state.feeds[NAME] is beams
    state.reorder(np.array([3, 1]))
    assert held(state) == [2, 1]
    state.reorder(np.array([1]))
    assert held(state) == [1]


def test_groups_that_are_given_late_are_repeated(gpu: EmulatedTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups for four rows: neighbours share, and changing places among them copies nothing."""
    state = TrtDecoderState(Pool(1 << 20), CACHES, 8, 4, 8, {})
    state.set_constants(images(1, 2))
    assert held(state) == [1, 1, 2, 2]
    before = state.feeds[NAME]
    state.reorder(np.array([1, 0, 3, 3]))
    assert state.feeds[NAME] is before
    state.reorder(np.array([2, 3, 0, 1]))
    assert held(state) == [2, 2, 1, 1]


def test_the_next_images_lie_where_those_before_did(gpu: EmulatedTensorRT) -> None:
    """So a step that was recorded goes on; larger ones need memory of their own, and all goes back to the pool."""
    pool = Pool(1 << 20)
    state = TrtDecoderState(pool, CACHES, 8, 2, 8, {})
    both = {**images(1, 2), "image_value.0": images(3, 4)[NAME]}
    state.set_constants(both)
    addresses = {name: state.feeds[name].address for name in both}
    allocated = gpu.cuda.allocations
    state.set_constants({name: array + 4 for name, array in both.items()})
    assert {name: state.feeds[name].address for name in both} == addresses
    assert (held(state), gpu.cuda.allocations) == ([5, 6], allocated)
    state.set_constants({name: np.repeat(array, 2, 2) for name, array in both.items()})
    assert (held(state), gpu.cuda.allocations) == ([1, 2], allocated + 2)
    state.set_constants({})
    assert state.feeds.keys() == {"key_cache.0"}
    del state
    gc.collect()
    assert pool._kept == gpu.cuda.device_bytes  # nothing is held
    pool.clear()
    gc.collect()
    assert gpu.cuda.device_bytes == 0


def test_without_memory_for_them_the_state_has_none(gpu: EmulatedTensorRT) -> None:
    pool = Pool(1 << 20)
    state = TrtDecoderState(pool, CACHES, 8, 2, 8, {})
    state.set_constants(images(1, 2))
    gpu.cuda.total = gpu.cuda.device_bytes
    with pytest.raises(BackendError, match="the GPU has no memory left") as caught:
        state.set_constants({"image_value.0": images(1, 2)[NAME], **images(1, 2, width=300)})
    assert isinstance(caught.value, OutOfMemory)
    assert state.feeds.keys() == {"key_cache.0"}
    assert len(state._held) == 1  # the cache's
    state.set_constants(images(3, 4))
    assert held(state) == [3, 4]
