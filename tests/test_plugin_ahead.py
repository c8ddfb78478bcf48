"""The kernel compiled where no GPU is: PTX for eight SMs, next to nothing spilled, shared memory that is there.

In a process of its own: this one interprets its kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")

from transom.export.plugins.blocks import SHARED_KIB, blocks_for
from transom.export.plugins.launch import Blocks

SPILLED = 32  # bytes of a thread, at most
EVERYTHING = {"causal": True, "lengths": True, "mask": 1, "bias": True}
VARIANTS: dict[int, list[dict[str, Any]]] = {  # by compute capability
    75: [{"dtype": "fp16", "size": 64, **EVERYTHING}, {"dtype": "fp16", "size": 64, "lengths": True, "split": True}],
    80: [{"dtype": "bf16", "size": 128, **EVERYTHING}, {"dtype": "fp32", "size": 64, "bias": True}],
    86: [{"dtype": "fp16", "size": 80, "mask": 2}, {"dtype": "fp16", "size": 128, "int8": True, "split": True}],
    87: [{"dtype": "fp16", "size": 64, "causal": True}],
    89: [{"dtype": "fp32", "size": 128, "mask": 1}, {"dtype": "fp32", "size": 32, "precision": "tf32"}],
    90: [{"dtype": "fp16", "size": 64, **EVERYTHING}],
    100: [{"dtype": "bf16", "size": 64, "causal": True, "mask": 1}],
    120: [{"dtype": "fp16", "size": 64, **EVERYTHING}, {"dtype": "bf16", "size": 64, "split": True}],
}
SCRIPT = """
import json, sys
from dataclasses import asdict
from transom.export.plugins.ahead import Variant, compile_attention
for capability, variants in json.loads(sys.argv[1]).items():
    for variant in variants:
        made = asdict(compile_attention(int(capability), Variant(**variant)))
        print(json.dumps([int(capability), variant, {**made, "ptx": made["ptx"].decode()}]))
"""


@pytest.fixture(scope="module")
def compiled() -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(VARIANTS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ptx_for_eight_generations(compiled: list[Any]) -> None:
    assert {capability for capability, _, _ in compiled} == {75, 80, 86, 87, 89, 90, 100, 120}
    for capability, variant, made in compiled:
        assert f".target sm_{capability}" in made["ptx"]
        assert made["name"] == ("attention_part" if variant.get("split") else "attention")
        assert f".entry {made['name']}(" in made["ptx"]


def test_next_to_nothing_spills_and_shared_memory_is_there(compiled: list[Any]) -> None:
    for capability, variant, made in compiled:
        assert made["spilled"] <= SPILLED, (capability, variant, made["registers"])
        assert 32 <= made["registers"] <= 255
        assert 0 < made["shared"] <= SHARED_KIB[capability] << 10


def test_halves_multiply_on_tensor_cores(compiled: list[Any]) -> None:
    """mma on Ampere and later; FP32 as asked does not, TF32 does."""
    for capability, variant, made in compiled:
        tensor_cores = any(word in made["ptx"] for word in ("mma.sync", "wgmma", "tcgen05.mma"))
        exact = variant["dtype"] == "fp32" and variant.get("precision", "ieee") == "ieee"
        assert tensor_cores == (capability != 75 and not exact), (capability, variant)


def test_the_table() -> None:
    assert blocks_for(89, "fp16", 64, step=False) == Blocks(64, 32, 8, 1)
    assert blocks_for(89, "fp16", 33, step=True) == Blocks(16, 64, 4, 2)
    assert blocks_for(75, "fp16", 128, step=False) == Blocks(32, 16, 4, 1)
    assert blocks_for(100, "fp32", 256, step=False) == Blocks(16, 16, 4, 1)
