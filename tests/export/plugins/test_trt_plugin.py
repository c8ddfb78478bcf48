"""Our plugins as NVIDIA's own ``tensorrt.plugin`` takes them: what a builder is told of kernels, launches and integers.

In a process of its own, which compiles: this one interprets its kernels. TensorRT itself is not here; the classes below
that package are emulated.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")
if find_spec("tensorrt_bindings") is None:
    pytest.skip("tensorrt-cu13-bindings, which brings tensorrt.plugin, is not installed", allow_module_level=True)

import torch
from cuda.bindings import driver as real_driver
from cuda.bindings import runtime as real_runtime

from attention_reference import normal, require_close
from emulated_driver import EmulatedDriver, Memories, to_gpu
from paths import TESTS
from transom.export.passes import plugin_attention
from transom.export.passes.plugin_attention import CAUSAL, MASKED, PLAIN
from transom.export.plugins import kernel_spec as launch
from transom.export.plugins.compiled import compiled_from_json
from transom.export.plugins.kernel_spec import TileSizes, Variant
from transom.export.plugins.plugin_calls import PluginCall, by_the_body
from transom.export.plugins.tile_sizes import SPILLED, fitted, portable, tile_sizes_for
from transom.export.plugins.trt_plugin import candidates, layout_of, variant_of
from transom.runtime.backends import cuda
from transom.runtime.errors import EngineError

QKV = [["B", 12, "S", 64]] * 3
CACHE = [["B", 12, "S", 64], ["B", 4, 1024, 64], ["B", 4, 1024, 64]]
# (operator, trt.DataType of the inputs, their shapes, the mask's axes): as bert, vit, gpt and swin have them in engines
WINDOWS = [["B", 6, 49, 32]] * 3
CASES: list[tuple[str, list[str], list[Any], str]] = [
    (MASKED, ["FLOAT"] * 3 + ["BOOL"], [*QKV, ["B", 1, 1, "S"]], "bn"),
    (PLAIN, ["BF16"] * 3, QKV, ""),
    (CAUSAL, ["HALF"] * 3 + ["INT32"], [*CACHE, ["B"]], ""),
    (MASKED, ["BF16"] * 4, [*WINDOWS, [1, 6, 49, 49]], "hmn"),
    (MASKED, ["HALF"] * 4, [*QKV[:1], ["B", 12, "T", 64], ["B", 12, "T", 64], [1, 12, "S", "T"]], "hmn"),
]
SIZES = {"B": 3, "S": 50, "T": 70}
SCRIPT = """
import json, sys
import emulated_tensorrt as emulated
from transom.export.plugins.compiled import json_from_compiled
from transom.export.plugins.trt_plugin import candidates, kernel_of, layout_of, register_plugins, variant_of
failed = []
register_plugins(emulated.install(), 89, failed.append)
sizes = json.loads(sys.argv[2])
launch = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
for operator, dtypes, shapes, axes in json.loads(sys.argv[1]):
    made = emulated.planned(operator, dtypes, shapes, {"scale": 0.125, **({"mask_axes": axes} if axes else {})})
    fixed = [[size if isinstance(size, int) else None for size in shape] for shape in shapes]
    about = variant_of(operator, dtypes, fixed, 0.125), layout_of(operator, fixed, *([axes] if axes else []))
    print(json.dumps([
        {
            "source": json_from_compiled(kernel_of(*about, 89, tiles)),
            "name": each["name"], "ptx": each["ptx"],
            "launch": {name: getattr(each["launch"], name).expr.value(sizes) for name in launch},
            "integers": each["integers"].values_for(sizes), "output": [size.value(sizes) for size in each["output"]],
        }
        for tiles, each in zip(candidates(89, about[0], fixed[0][2], fixed[1][2]), made, strict=True)
    ]))
steps = []
for sm in (75, 80, 90, 100, 120):
    made = kernel_of(*about, sm, candidates(sm, about[0])[1])
    steps.append([sm, made.capability, made.shared, *made.assembled])
print(json.dumps(steps))
try:
    emulated.planned("FlashAttention", ["FLOAT"] * 3, [["B", "H", "S", 64]] * 3, {"scale": 1.0})
except Exception:
    print(json.dumps([str(error) for error in failed]))
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[dict[str, Any]]], list[Any], list[str]]:
    """What was told of each case, by tactic; the last case for other GPUs; what went wrong for unknown heads."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS / "support"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(CASES), json.dumps(SIZES)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *cases, steps, failed = [json.loads(line) for line in done.stdout.splitlines()]
    return cases, steps, failed


def test_nvidias_package_takes_our_plugins(planned: Any) -> None:
    """It checks signatures and types; the result is like the queries; each tactic is another kernel."""
    cases, *_ = planned
    for (_, _, shapes, _), tactics in zip(CASES, cases, strict=True):
        assert [each["name"] for each in tactics] == ["attention", "attention"]
        assert tactics[0]["ptx"] != tactics[1]["ptx"]
        for each in tactics:
            assert each["output"] == [SIZES.get(str(size), size) for size in shapes[0]]
            assert ".target sm_89\n" in each["ptx"]
            assert f".reqntid {each['launch']['block_x']}\n" in each["ptx"]


def test_the_launch_by_hand(planned: Any) -> None:
    """B = 3, S = 50, 12 heads: 36 programs of 64 queries in FP32, of 128 in halves; a step's are of 16.

    Windows of 49 pixels, whose number the graph fixes, take 64.
    """
    cases, *_ = planned
    tiles = [
        candidates(
            89, variant_of(operator, dtypes, numbers(shapes), 0.125), numbers(shapes)[0][2], numbers(shapes)[1][2]
        )
        for operator, dtypes, shapes, _ in CASES
    ]
    assert [[each.m for each in both] for both in tiles] == [[64, 16], [128, 16], [128, 16], [64, 16], [64, 16]]
    for both, tactics, (_, _, shapes, _) in zip(tiles, cases, CASES, strict=True):
        for each, made in zip(both, tactics, strict=True):
            launch = made["launch"]
            tiles = -(-SIZES.get(shapes[0][2], 49) // each.m)
            assert [launch[f"grid_{axis}"] for axis in "xyz"] == [tiles * 3 * shapes[0][1], 1, 1]
            assert [launch[f"block_{axis}"] for axis in "xyz"] == [32 * each.warps, 1, 1]
            assert 0 < launch["shared_mem"] <= 48 * 1024


def test_the_integers_by_hand(planned: Any) -> None:
    """S, T, then the strides of rows and heads that a size changes: of Q, K, V, of the mask, of the output."""
    cases, *_ = planned
    q, k = [12 * 50 * 64, 50 * 64], [12 * 70 * 64, 70 * 64]
    cache = [4 * 1024 * 64, 1024 * 64]
    expected = [
        [50, 50, *q, *q, *q, 50, *q],  # a mask (B, 1, 1, T) moves by T from row to row
        [50, 50, *q, *q, *q, *q],
        [50, 1024, *q, *cache, *cache, *q],
        [49, 49, *[6 * 49 * 32, 49 * 32] * 3, 49 * 49, 49, 6 * 49 * 32, 49 * 32],
        [50, 70, *q, *k, *k, 50 * 70, 70, *q],  # (1, H, S, T): by S T from head to head, by T from query to query
    ]
    for integers, tactics in zip(expected, cases, strict=True):
        for made in tactics:
            assert made["integers"] == integers


def test_parameters_are_inputs_integers_and_the_output(planned: Any) -> None:
    cases, *_ = planned
    for (operator, dtypes, _, _), tactics in zip(CASES, cases, strict=True):
        for made in tactics:
            entry = made["ptx"].split(".entry attention(")[1].split(")")[0]
            kinds = [word for word in entry.split() if word in (".u64", ".u32")]
            assert kinds == [".u64"] * len(dtypes) + [".u32"] * len(made["integers"]) + [".u64"], operator


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_the_plugin_launches_is_what_the_function_computes(
    case: int, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel, with the grid and the integers that TensorRT was told, against the body in ONNX Runtime."""
    operator, dtypes, shapes, _ = CASES[case]
    given = inputs(operator, dtypes, shapes)
    expected = torch.from_numpy(body_of(operator, given)).double()
    for made in planned[0][case]:
        source = compiled_from_json(made["source"])
        emulated = EmulatedDriver(real_driver, Memories(real_runtime), [source])
        monkeypatch.setattr(cuda, "runtime", lambda emulated=emulated: emulated.cuda)
        options = [real_driver.CUjit_option.CU_JIT_ERROR_LOG_BUFFER]
        options += [real_driver.CUjit_option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]
        _, module = emulated.cuModuleLoadDataEx(made["ptx"].encode() + b"\0", 2, options, [bytearray(99), 99])
        _, function = emulated.cuModuleGetFunction(module, made["name"].encode())
        tensors = [to_gpu(tensor) for tensor in (*given, torch.full_like(given[0], torch.nan))]
        addresses = [ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors]
        values = [*addresses[:-1], *map(ctypes.c_int32, made["integers"]), addresses[-1]]
        parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        (code,) = emulated.cuLaunchKernel(function, *made["launch"].values(), 0, ctypes.addressof(parameters), 0)
        assert code.name == "CUDA_SUCCESS"
        require_close(tensors[-1].host(), expected)


def inputs(operator: str, dtypes: list[str], shapes: list[Any]) -> list[torch.Tensor]:
    """Numbers for these shapes; masks leave every query something, caches hold as many tokens as there are queries."""
    kinds = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
    given = []
    for seed, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True)):
        sizes = [SIZES.get(str(size), size) for size in shape]
        if dtype == "BOOL":
            given.append(normal(*sizes, seed=seed) > -0.5)
        elif dtype == "INT32":
            given.append(torch.tensor([50, 60, 1000], dtype=torch.int32))
        else:
            given.append(normal(*sizes, seed=seed, dtype=kinds[dtype]))
    return given


def body_of(operator: str, given: list[torch.Tensor]) -> Any:
    """What the function's body gives in ONNX Runtime, in FP32."""
    arrays = [(tensor.float() if tensor.is_floating_point() else tensor).numpy() for tensor in given]
    return by_the_body(PluginCall(operator, (), (), 0.125), arrays)


def test_the_kernel_of_a_step_for_other_gpus(planned: Any) -> None:
    """Tiles of split-KV, on a kernel without splits: shared memory that is there, next to nothing spilled."""
    _, steps, _ = planned
    for sm, capability, shared, _, spilled in steps:
        assert capability == sm
        assert 0 < shared <= 48 * 1024, sm
        assert spilled <= SPILLED, sm


def test_what_goes_wrong_inside_is_told(planned: Any) -> None:
    """TensorRT says that something did; what, the worker hears from us."""
    *_, failed = planned
    assert failed[0].startswith("the plugin FlashAttention was given queries and keys whose heads have no fixed number")


def numbers(shapes: list[Any]) -> list[list[int | None]]:
    return [[size if isinstance(size, int) else None for size in shape] for shape in shapes]


def test_variants_by_hand() -> None:
    masked = variant_of(MASKED, ["FLOAT"] * 3 + ["BOOL"], numbers(CASES[0][2]), 0.5)
    assert masked == Variant("fp32", 64, 12, 1, 0.5, mask=1)
    assert layout_of(MASKED, numbers(CASES[0][2]), "bn").mask == "b"
    assert variant_of(MASKED, ["HALF"] * 4, numbers(CASES[4][2]), 0.5).mask == 2
    assert layout_of(MASKED, numbers(CASES[4][2]), "hmn").mask == "hm"
    fixed = [[1, 4, 1, 8], [1, 4, 1, 8], [1, 4, 1, 8], [1, 4, 1, 1]]  # sizes of one are axes all the same
    assert layout_of(MASKED, fixed, "bhmn").mask == "bhm"
    causal = variant_of(CAUSAL, ["HALF"] * 3 + ["INT32"], numbers(CASES[2][2]), 0.5)
    assert causal == Variant("fp16", 64, 12, 3, 0.5, causal=True, lengths=True)


Q, T7 = [None, 4, None, 64], [None, 4, 7, 64]


@pytest.mark.parametrize(
    ("operator", "dtypes", "shapes", "said"),
    [
        (PLAIN, ["INT8"] * 3, [Q] * 3, "queries, keys and values of INT8, INT8, INT8; expected one of FLOAT"),
        (PLAIN, ["HALF", "FLOAT", "FLOAT"], [Q] * 3, "of HALF, FLOAT, FLOAT"),
        (PLAIN, ["HALF"] * 3, [Q, Q, [None, 4, None, 32]], r"values of \(None, 4, None, 32\); expected some that fit"),
        (PLAIN, ["HALF"] * 3, [Q, *[[None, 3, None, 64]] * 2], "expected some that fit"),
        (PLAIN, ["HALF"] * 3, [Q, *[[None, 8, None, 64]] * 2], "expected some that fit"),
        (PLAIN, ["HALF"] * 3, [[None, None, None, 64]] * 3, "heads have no fixed number and size"),
        (MASKED, ["HALF"] * 3 + ["FLOAT"], [Q] * 3 + [[None, 1, None, None]], "expected four axes, in BOOL or HALF"),
        (MASKED, ["HALF"] * 3 + ["INT8"], [Q] * 3 + [[None, 1, None, None]], "expected four axes, in BOOL or HALF"),
        (MASKED, ["HALF"] * 3 + ["BOOL"], [Q] * 3 + [[None, None, None]], "expected four axes"),
        (MASKED, ["HALF"] * 3 + ["BOOL"], [Q, T7, T7, [None, 1, None, 1]], "with the axes 'bmn' for scores of"),
        (MASKED, ["HALF"] * 3 + ["BOOL"], [Q] * 3 + [[None, 3, None, None]], "with the axes 'bmn' for scores of"),
        (CAUSAL, ["HALF"] * 3 + ["INT64"], [Q] * 3 + [[None]], r"lengths of INT64 \(None,\); expected \(B,\) in INT32"),
    ],
)
def test_inputs_that_do_not_fit_together(operator: str, dtypes: list[str], shapes: Any, said: str) -> None:
    """Nothing behind this looks at them before the GPU reads."""

    def understood() -> None:
        variant_of(operator, dtypes, shapes, 0.5)
        layout_of(operator, shapes, "bmn")

    with pytest.raises(EngineError, match=said) as refused:
        understood()
    assert str(refused.value).endswith("Build with --no-plugin.")


def test_heads_that_the_pass_takes_have_a_kernel() -> None:
    """One bound in two places: the pass needs no compiler, the kernel no graph."""
    assert plugin_attention.MAX_HEAD_SIZE == launch.MOST_SIZE == 256


def test_tiles_for_windows_by_hand() -> None:
    """Windows of 4, 7, 8, 12 and 16 pixels a side: queries and keys that are computed for nothing are few."""
    halves, step = tile_sizes_for(89, Variant("fp16", 32, mask=2)), tile_sizes_for(89, Variant("fp16", 32, split=True))
    found = {
        N: [(t.m, t.n, t.warps) for t in (fitted(halves, N, N), fitted(step, N, N))] for N in (16, 49, 64, 144, 256)
    }
    assert found == {
        16: [(16, 16, 1), (16, 16, 1)],
        49: [(64, 32, 4), (16, 64, 2)],
        64: [(64, 32, 4), (16, 64, 2)],
        144: [(64, 32, 4), (16, 128, 4)],
        256: [(128, 32, 8), (16, 128, 4)],
    }
    assert fitted(halves, None, None) == halves
    assert candidates(89, Variant("fp16", 32, mask=2), 16, 16) == (TileSizes(16, 16, 1, 2),)  # one, not the same twice


def test_gpus_that_the_table_does_not_have() -> None:
    """Thor, B300 and GB10 run the PTX of SM89; from SM90 on PTX is for its own GPU."""
    assert [portable(sm) for sm in (75, 86, 88, 90, 103, 110, 120, 121)] == [75, 86, 87, 90, 89, 89, 120, 89]
    assert candidates(121, Variant("fp16", 64))[0] == tile_sizes_for(89, Variant("fp16", 64))
    with pytest.raises(EngineError, match="no kernel for SM70; expected SM75 or later"):
        portable(70)
