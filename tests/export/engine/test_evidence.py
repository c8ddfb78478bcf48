"""What a build for full TensorRT executes and what it compiles only, and where it says so.

The graph, its comparison, the PTX and the interpreter's run are real, of a Swin; TensorRT's builder, which needs a GPU,
is emulated: its plugins are NVIDIA's own package on the classes of emulated_tensorrt.py, its log is written here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")
if find_spec("tensorrt_bindings") is None:
    pytest.skip("tensorrt-cu13-bindings, which brings tensorrt.plugin, is not installed", allow_module_level=True)

from biased_attention import save_swin
from command_line import document, transom
from conftest import Once, export_to
from paths import TESTS
from transom.export.engine.trt_graphs import HEAD_BIAS, tensorrt_graphs
from transom.export.engine.trt_parity import require_trt_parity
from transom.runtime.bundle import Bundle

SCRIPT = """
import json, sys, types
import onnx, onnx_ir as ir
import emulated_tensorrt as emulated
from builder_logs import layer
from transom.cli.main import main
from transom.export.engine import build as building
from transom.export.engine.build_process import EngineResult
from transom.export.plugins.plugin_calls import plugin_calls
from transom.export.plugins.trt_plugin import register_plugins
from transom.runtime.backends.cuda import Gpu

SIZES = {"B": 3}
def build_engine(name, model, profiles, target, plugins):
    told = []
    for call in plugin_calls(ir.from_proto(onnx.load_model_from_string(model))):
        shapes = [[size or "B" for size in shape] for shape in call.shapes]
        attributes = {"scale": call.scale, "mask_axes": call.axes}
        launches = emulated.planned(call.operator, call.dtypes, shapes, attributes)
        for kernel, tiles, made in zip(call.kernels(89), call.tiles(89), launches, strict=True):
            S, T = call.shapes[0][2], call.shapes[1][2]
            told.append({
                "node": call.nodes[0],
                "ptx": made["ptx"].encode() == kernel.ptx,
                "grid": made["launch"].grid_x.expr.value(SIZES) == call.variant.programs(tiles, 3, S),
                "integers": made["integers"].values_for(SIZES) == list(kernel.sizes(3, S, T)),
            })
    print(json.dumps(told), file=sys.stderr)
    return EngineResult(b"no plan", [layer(node, kind="PluginV3") for node in plugins])

failed = []
register_plugins(emulated.install(), 89, failed.append)
building.library = lambda kind: types.SimpleNamespace(__version__="11.1.0")
building.find_gpu = lambda: Gpu("Emulated GPU", (8, 9), 1 << 30, 13000)
building.build_engine = build_engine
main()
"""


@pytest.fixture(scope="module")
def swin(once: Once) -> Path:
    """A Swin of random weights in FP16, at most three rows a call."""

    def make(folder: Path) -> None:
        export_to(folder, save_swin(folder / "checkpoint"), precision="fp16", max_sizes={"B": 3})

    return once("swin-windows-fp16", make) / "bundle"


@pytest.fixture(scope="module")
def built(swin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[dict[str, object]]]:
    """The bundle with an emulated engine, what the build printed, and what TensorRT was told of each launch."""
    folder = Path(shutil.copytree(swin, tmp_path_factory.mktemp("built") / "bundle"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["XDG_CACHE_HOME"] = str(folder.parent / "cache")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS / "support"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, "build", str(folder), "--target", "tensorrt", "--report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = next(json.loads(line) for line in done.stderr.splitlines() if line.startswith("[{"))
    return folder, done.stdout, told


def test_every_attention_of_swin_is_our_plugin(swin: Path) -> None:
    """By choice: without plugins it is TensorRT's own, which has a kernel. The graph computes the bundle's outputs."""
    bundle = Bundle(swin)
    (graph,) = tensorrt_graphs(bundle, plugins=True).values()
    assert list(graph.plugins.values()) == [HEAD_BIAS] * 3
    assert graph.decomposed == {}
    assert require_trt_parity(bundle, {"model": graph}) < 1e-3
    (plain,) = tensorrt_graphs(bundle).values()
    assert (plain.plugins, plain.decomposed) == ({}, {})
    assert list(plain.operators.values()).count("Attention") == 3


def test_what_tensorrt_is_told_is_what_was_interpreted(built: tuple[Path, str, list[dict[str, object]]]) -> None:
    """Three attentions, all different, two kernels each: the same PTX, programs and integers."""
    _, _, told = built
    assert len(told) == 6
    assert len({each["node"] for each in told}) == 3
    for each in told:
        assert (each["ptx"], each["grid"], each["integers"]) == (True, True, True)


def test_the_build_says_what_was_executed(built: tuple[Path, str, list[dict[str, object]]]) -> None:
    _, printed, _ = built
    lines = [
        line.removeprefix("tensorrt, model, ") for line in printed.splitlines() if line.startswith("tensorrt, model, ")
    ]
    graph, kernel, ptx, engine = (line for line in lines if not line.startswith("all:"))
    assert graph.startswith("executed: graph: ONNX Runtime ")
    assert kernel.startswith("executed: our kernel of 3 attentions: Triton ")
    assert "interpreter on a CPU, 6 launches, off from its ONNX function by at most " in kernel
    assert 0 < float(kernel.rpartition(" ")[2]) < 5e-3
    assert ptx.startswith("compiled only: our kernel of 3 attentions: PTX of 6 variants for SM89 by Triton ")
    assert ptx.endswith("0 bytes spilled")
    assert engine == "compiled only: engine: TensorRT 11.1.0 on Emulated GPU (SM89); none of its outputs were compared"
    assert "tensorrt, model: 3 attentions are our plugin: with a bias per head" in printed


def test_inspect_and_the_report_say_it_too(built: tuple[Path, str, list[dict[str, object]]], tmp_path: Path) -> None:
    folder, printed, _ = built
    recorded = Bundle(folder).manifest.engines["tensorrt"]["graphs"]["model"]
    assert [len(recorded[key]) for key in ("executed", "compiled")] == [2, 2]
    assert document(transom("inspect", folder, "--json"))["engines"]["tensorrt"]["graphs"]["model"] == recorded
    shown = transom("inspect", folder).stdout
    transom("report", folder, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "What was executed" in page
    for line in (*recorded["executed"], *recorded["compiled"]):
        assert line in printed
        assert line in shown
        assert line.replace("'", "&#39;") in page
