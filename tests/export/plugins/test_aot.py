"""The kernel compiled where no GPU is: PTX for eight SMs, its parameters, nothing spilled, shared memory that is there.

In a process of its own: this one interprets its kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")

import triton

from emulated_driver import compile_elsewhere
from transom.export.plugins.aot import attention_ptx, combine_ptx, power_of_two
from transom.export.plugins.compiled import KERNELS_DIR, Compiled, CompiledCombine
from transom.export.plugins.kernel_spec import TileSizes, Variant
from transom.export.plugins.layout import Layout
from transom.export.plugins.tile_sizes import GPUS, SHARED, SPILLED, preference, resident_warps, tile_sizes_for
from transom.runtime.errors import BackendError, EngineError, InputError

EVERYTHING = {"causal": True, "lengths": True, "mask": 1, "bias": True}
BIG = {"heads": 8, "groups": 2}
# (compute capability, variant)
CASES: list[tuple[int, dict[str, Any]]] = [
    (75, {"dtype": "fp16", "size": 64, **BIG, **EVERYTHING}),
    (80, {"dtype": "bf16", "size": 128, "causal": True}),
    (80, {"dtype": "fp32", "size": 64, "bias": True}),
    (86, {"dtype": "fp16", "size": 80, "mask": 2, "causal": True}),
    (86, {"dtype": "fp16", "size": 64, **BIG, "lengths": True, "int8": True, "split": True}),
    (87, {"dtype": "fp16", "size": 64, "causal": True, "lengths": True}),
    (89, {"dtype": "fp32", "size": 128, "mask": 1}),
    (89, {"dtype": "fp32", "size": 32, "precision": "tf32"}),
    (90, {"dtype": "fp16", "size": 64, **EVERYTHING}),
    (100, {"dtype": "bf16", "size": 64, "causal": True}),
    (120, {"dtype": "fp16", "size": 64, **EVERYTHING}),
    (120, {"dtype": "bf16", "size": 33, "lengths": True, "split": True}),
]
# Registers of a thread in each case by the assembler, a fifth more or less, and bytes that FP32 may spill, by Triton
PINNED = {
    (3, 9): ((240, 202, 128, 178, 112, 151, 92, 97, 248, 80, 255, 246), SPILLED),
    (3, 7): ((226, 202, 128, 168, 96, 155, 255, 97, 233, 80, 254, 255), 64),  # of torch 2.13 with CUDA
}
SCRIPT = """
import json, sys
from transom.export.plugins.aot import attention_ptx
from transom.export.plugins.kernel_spec import Variant
from transom.export.plugins.layout import Layout
for capability, variant in json.loads(sys.argv[1]):
    made = attention_ptx(capability, Variant(**variant), Layout(mask="bm"))
    print(json.dumps({
        "name": made.name, "ptx": made.ptx.decode(), "shared": made.shared, "threads": made.threads,
        "tensors": made.tensors, "integers": made.integers, "outputs": made.outputs, "assembled": made.assembled,
        "grid": made.grid(2, 100, 3), "sizes": made.sizes(2, 100, 128),
    }))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
    """(capability, variant, what was made), all compiled once, from nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(CASES)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    return [(*case, each) for case, each in zip(CASES, made, strict=True)]


def test_ptx_for_eight_generations(compiled: list[Any]) -> None:
    """And in a version that older drivers take: 8.0 is CUDA 12.0's, 8.7 is CUDA 12.8's."""
    assert {capability for capability, *_ in compiled} == {75, 80, 86, 87, 89, 90, 100, 120} == set(GPUS)
    for capability, _, made in compiled:
        suffix = "a" if capability >= 90 else ""
        version = {100: "8.6", 120: "8.7"}.get(capability, "8.0")
        assert f".target sm_{capability}{suffix}\n" in made["ptx"]
        assert f".version {version}\n" in made["ptx"]
        assert f".reqntid {made['threads']}\n" in made["ptx"]


def test_the_parameters_are_the_arguments_and_no_others(compiled: list[Any]) -> None:
    """Inputs, 32-bit integers, outputs; without the two pointers to scratch memory that Triton appends."""
    for capability, variant, made in compiled:
        (given,) = re.findall(r"\.entry attention\((.*?)\)", made["ptx"], re.DOTALL)
        wide = {"u64": "pointer", "u32": "integer"}
        wanted = ["pointer"] * len(made["tensors"]) + ["integer"] * len(made["integers"])
        found = [wide[kind] for kind in re.findall(r"\.param \.(\w+)", given)]
        assert found == wanted + ["pointer"] * len(made["outputs"]), (capability, variant)
        assert made["outputs"] == (["split_ml", "split_acc"] if variant.get("split") else ["output"])
    everything = next(made for capability, _, made in compiled if capability == 90)
    assert everything["tensors"] == ["query", "key", "value", "lengths", "mask", "bias"]
    step = compiled[4][2]
    assert step["tensors"] == ["query", "key", "value", "key_scale", "value_scale", "lengths"]


def test_the_values_of_integers_and_the_grid(compiled: list[Any]) -> None:
    """B = 2, S = 100, T = 128, by hand: strides of contiguous tensors. What no size changes is no argument."""
    plain = compiled[5][2]  # SM87, one head of 64: blocks of 128 queries
    assert dict(zip(plain["integers"], plain["sizes"], strict=True)) == {
        "S": 100, "T": 128, "q_b": 6400, "q_h": 6400, "k_b": 8192, "k_h": 8192, "v_b": 8192, "v_h": 8192,
        "o_b": 6400, "o_h": 6400,
    }  # fmt: skip
    assert plain["grid"] == [2, 3, 1]
    step = compiled[4][
        2
    ]  # 8 heads of 64, two of them share: 200 rows in blocks of 16, for 4 heads of keys, in 3 splits
    found = dict(zip(step["integers"], step["sizes"], strict=True))
    assert step["grid"] == [13 * 2 * 4, 3, 1]
    assert found["ROWS"] == 2 * 8 * 100
    assert (found["q_b"], found["q_h"]) == (8 * 100 * 64, 100 * 64)
    assert (found["k_b"], found["k_h"], found["s_b"], found["s_h"]) == (4 * 128 * 64, 128 * 64, 4 * 128, 128)


def test_nothing_spills_and_shared_memory_is_there(compiled: list[Any]) -> None:
    """Halves on tensor cores spill nothing; registers are pinned for the versions of Triton that were looked at."""
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    pinned, allowed = PINNED.get(version, (None, 2 * SPILLED))
    for place, (capability, variant, made) in enumerate(compiled):
        registers, spilled = made["assembled"]
        halves = capability != 75 and variant["dtype"] != "fp32"
        assert spilled <= (0 if halves else allowed), (capability, variant, registers)
        if pinned is not None:
            assert 0.8 * pinned[place] <= registers <= min(255, 1.2 * pinned[place]), (capability, variant)
        assert 0 < made["shared"] <= SHARED, (capability, variant)
        assert resident_warps(GPUS[capability], made["threads"] // 32, registers, made["shared"]) >= 8


def test_keys_are_read_by_16_bytes_and_multiplied_on_tensor_cores(compiled: list[Any]) -> None:
    """FP32 as asked is not, and TF32 is; Triton has no tensor cores of Turing's."""
    for capability, variant, made in compiled:
        tensor_cores = {word for word in ("mma.sync", "wgmma", "tcgen05.mma") if word in made["ptx"]}
        exact = variant["dtype"] == "fp32" and variant.get("precision", "ieee") == "ieee"
        assert bool(tensor_cores) == (capability != 75 and not exact), (capability, variant)
        if capability in (90, 100):
            assert tensor_cores & {"wgmma", "tcgen05.mma"}
        wide = re.search(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x10|16)[,;\s]|ld\.global\.v4", made["ptx"])
        assert wide or variant["size"] == 33, (capability, variant)


def test_layouts_by_hand() -> None:
    """Strides as a factor and the sizes it is multiplied with; (B, S, H, D) is what projections leave."""
    variant = Variant("fp16", 64, heads=8, groups=2, mask=1, bias=True, int8=True)
    found = Layout("bshd", mask="bm").strides(variant)
    assert (found["q_b"], found["q_h"], found["q_m"]) == ((512, "S"), (64, ""), (512, ""))
    assert (found["k_b"], found["k_h"], found["k_n"]) == ((256, "T"), (64, ""), (256, ""))
    assert (found["m_b"], found["m_h"], found["m_m"], found["m_n"]) == ((1, "ST"), (0, ""), (1, "T"), (1, ""))
    assert (found["b_h"], found["b_m"], found["s_b"], found["s_h"]) == ((1, "ST"), (1, "T"), (4, "T"), (1, "T"))
    assert Layout(mask="bh").strides(variant)["m_b"] == (8, "T")
    assert Layout(mask="").strides(variant)["m_b"] == (0, "")
    assert [power_of_two(factor) for factor in (1, 100, 64, 4096, 24)] == [1, 4, 16, 16, 8]


def test_occupancy_by_hand() -> None:
    """SM86 has 48 warps, 16 blocks, 65536 registers, 100 KiB of which a block takes one besides its own."""
    gpu = GPUS[86]
    assert resident_warps(gpu, 4, 128, 0) == 16  # 65536 / (128 * 32) = 16 warps
    assert resident_warps(gpu, 4, 129, 0) == 12  # 15 warps, three blocks of four
    assert resident_warps(GPUS[80], 2, 33, 0) == 50  # 33 * 32 in portions of 256 are 1280 a warp: 51, 25 blocks of two
    assert resident_warps(gpu, 4, 40, 24 << 10) == 16  # four blocks of 25 KiB
    assert resident_warps(gpu, 8, 32, 48 << 10) == 16  # two of 49 KiB
    assert resident_warps(gpu, 1, 32, 0) == 16  # sixteen blocks of one
    assert resident_warps(gpu, 8, 32, 100 << 10) == 0  # none
    assert resident_warps(GPUS[75], 8, 32, 64 << 10) == 8  # Turing keeps nothing back


def test_the_preference() -> None:
    """More queries to a block, unless they spill, want more shared memory than is given, or leave an SM idle."""
    gpu = GPUS[80]
    many, few = TileSizes(128, 64, 8, 2), TileSizes(64, 32, 4, 2)
    assert preference(gpu, many, 151, 0, 40 << 10) > preference(gpu, few, 100, 0, 20 << 10)
    assert preference(gpu, many, 255, 40, 40 << 10) < preference(gpu, few, 100, 0, 20 << 10)
    assert preference(gpu, many, 151, 0, 49 << 10) < preference(gpu, few, 100, 0, 20 << 10)
    assert preference(gpu, TileSizes(128, 64, 4, 2), 255, 0, 160 << 10) < preference(gpu, few, 100, 0, 20 << 10)


def test_the_table() -> None:
    assert tile_sizes_for(89, Variant("fp16", 64)) == TileSizes(128, 64, 8, 3)
    assert tile_sizes_for(89, Variant("fp16", 33, mask=1)) == TileSizes(64, 32, 8, 2)
    assert tile_sizes_for(89, Variant("fp16", 9, split=True)) == TileSizes(16, 128, 4, 2)
    assert tile_sizes_for(100, Variant("fp16", 128)) == TileSizes(64, 32, 8, 1)
    assert tile_sizes_for(100, Variant("fp32", 256)) == TileSizes(16, 16, 8, 1)
    assert tile_sizes_for(75, Variant("fp16", 256)) == TileSizes(32, 16, 8, 1)


def test_what_has_no_kernel() -> None:
    with pytest.raises(EngineError, match="no kernel for compute capability 70; expected one of 75, 80, 86"):
        tile_sizes_for(70, Variant("fp16", 64))
    with pytest.raises(
        EngineError, match="SM75 has matrix products of neither BF16 nor TF32, and bf16 in ieee was requested"
    ):
        attention_ptx(75, Variant("bf16", 64))
    with pytest.raises(EngineError, match="a layout of 'bhds' with a mask of 'mb'"):
        Layout("bhds", mask="mb")
    with pytest.raises(InputError, match="heads of 264; expected 1 to 256"):
        Variant("fp16", 264)
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1 is set"):
        attention_ptx(89, Variant("fp16", 64))


def test_integers_beyond_32_bits_are_refused(tmp_path: Path) -> None:
    code = """
from transom.export.plugins.aot import attention_ptx
from transom.export.plugins.kernel_spec import Variant
from transom.runtime.errors import EngineError
made = attention_ptx(89, Variant("fp16", 64, heads=16))
try:
    made.sizes(1, 2**21, 2**21)
except EngineError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "q_b is 2147483648 for B=1, S=2097152, T=2097152; expected 32 bits. Use fewer rows at once.\n"


def test_kernels_are_taken_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRANSOM_KERNELS: compiled on one machine, read on another, whatever its Triton; this process compiles none."""
    monkeypatch.setenv(KERNELS_DIR, str(tmp_path / "kernels"))
    variant, layout = {"dtype": "fp16", "size": 16, "split": True}, {"order": "bhsd", "mask": ""}
    written = compile_elsewhere(
        [(kind, 90, variant, layout, None) for kind in ("attention", "combine")], tmp_path / "triton"
    )
    assert len([*(tmp_path / "kernels").iterdir()]) == 2
    found = [make(90, Variant(**variant), Layout(**layout)) for make in (attention_ptx, combine_ptx)]
    assert [type(each) for each in found] == [Compiled, CompiledCombine]
    assert found == written
    with pytest.raises(BackendError, match="nothing is compiled"):  # in another layout it is another kernel
        attention_ptx(90, Variant(**variant), Layout("bshd", ""))
    monkeypatch.delenv(KERNELS_DIR)
    with pytest.raises(BackendError, match="nothing is compiled"):
        attention_ptx(90, Variant(**variant), Layout(**layout))
