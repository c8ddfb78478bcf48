"""Device memory of the TensorRT backend: given back, bounded in the pool, and a GPU without any left."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from emulated_gpu import (
    EmulatedTensorRT,
    Put,
)
from transom.runtime import load
from transom.runtime.backends.trt_memory import Pool
from transom.runtime.errors import BackendError


def test_device_memory_is_flat_and_given_back(put: Put, gpu: EmulatedTensorRT, gpt_bundle: Path) -> None:
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        for _ in range(3):
            gpt.generate(["It is a", "My"], max_new_tokens=8, num_beams=2)
        before = gpu.cuda.allocations, gpu.cuda.device_bytes
        for _ in range(30):
            gpt.generate(["It is a", "My"], max_new_tokens=8, num_beams=2)
        assert (gpu.cuda.allocations, gpu.cuda.device_bytes) == before
    del gpt
    gc.collect()
    assert gpu.cuda.device_bytes == 0


def test_no_memory_is_said_and_survived(put: Put, gpu: EmulatedTensorRT, gpt_bundle: Path) -> None:
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        answer = gpt.generate("It is", max_new_tokens=4)
        gpu.cuda.total = gpu.cuda.device_bytes + (1 << 18)
        with pytest.raises(BackendError, match=r"the GPU has no memory left\. Give fewer or shorter inputs"):
            gpt.generate(["It is"] * 16, max_new_tokens=4)
        assert gpt.generate("It is", max_new_tokens=4) == answer


def test_the_pool_keeps_a_bounded_part_of_what_it_saw(gpu: EmulatedTensorRT) -> None:
    """Sixteen sizes through a pool of 1000 bytes: the last ones stay, and are taken again."""
    pool = Pool(1_000)
    for size in range(100, 1_700, 100):
        pool.give(pool.take(size))
        assert gpu.cuda.device_bytes <= 1_000
    for size in (300, 400, 500):
        pool.give(pool.take(size))
    assert gpu.cuda.device_bytes == 900  # 300 was freed
    before = gpu.cuda.allocations
    held = [pool.take(500), pool.take(400)]
    assert gpu.cuda.allocations == before
    for memory in held:
        pool.give(memory)
    pool.clear()
    del held, memory
    gc.collect()
    assert gpu.cuda.device_bytes == 0


def test_generations_of_every_size_leave_an_eighth_of_the_memory(
    put: Put, gpu: EmulatedTensorRT, gpt_bundle: Path
) -> None:
    """A service sees every number of rows: caches of each would stay."""
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        gpt.generate("It", max_new_tokens=2)
    one = gpu.cuda.peak
    gpu.cuda.total = 16 * one
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        for rows in (1, 2, 3, 4, 5):
            gpt.generate(["It"] * rows, max_new_tokens=2)
        pool = gpt.backend("decoder")._pool
        assert sum(memory.size for memory in pool._free) == pool._kept <= gpu.cuda.total // 8


def test_what_the_pool_keeps_is_in_nobodys_way(put: Put, gpu: EmulatedTensorRT, vit_bundle: Path) -> None:
    with load(put(vit_bundle), device="tensorrt") as vit:
        pool = vit.backend("model")._pool
        pool.give(pool.take(1 << 20))
        gpu.cuda.total = gpu.cuda.device_bytes  # nothing is left
        assert vit.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})["logits"].shape[0] == 1
        assert pool._free == []
