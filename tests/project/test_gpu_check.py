"""The GPU check without a GPU: its arithmetic, its pack, its dry run, and what it imports on a machine with a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")
pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")

import torch

from paths import REPO, TESTS
from time_limits import PATIENCE_S
from transom.export.plugins.kernel_spec import TileSizes

BENCHMARKS = REPO / "benchmarks"
CAUSAL, STEP = "head 64 B=128 S=128 T=128 causal", "head 64 B=8 S=1 T=1024 4 heads"
ONLY = [f"prompt bf16 {CAUSAL}", f"step fp16 {STEP}"]  # three kernels
TINY = ["prompt bf16 head 64 B=1 S=70 T=70 causal", "step fp16 head 64 B=1 S=1 T=260 4 heads share keys"]
PEERS = ("torch flash", "torch cudnn", "torch efficient", "torch math")
PACKAGES = ("torch", "numpy", "cuda-bindings", "onnxruntime")  # of the machine with the GPU
MODULES = ("cases", "check", "pack", "sides", "tables", "timing", "machines", "__main__")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All names of the check's modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    modules = [import_module(f"gpu_check.{name}") for name in MODULES]
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of three kernels for SM90, compiled in a process of its own: this one interprets them."""
    folder = tmp_path_factory.mktemp("gpu-check")
    wheel = folder / "transom-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        packed = [*(REPO / "export/plugins").glob("*.py"), *(REPO / "runtime").rglob("*.py")]
        for path in [REPO / "export" / "__init__.py", *packed]:
            archive.write(path, f"transom/{path.relative_to(REPO).as_posix()}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton")}
    options = ["--wheel", str(wheel), "--out", str(folder / "pack"), "--sms", "90", "--only", *ONLY]
    done = run("gpu_check.build", *options, environment=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 kernels" in done.stdout
    return folder / "pack"


def run(module: str, *options: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(environment or os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-m", module, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.fixture
def pack(made: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "pack"))


def test_the_arithmetic_of_cases_by_hand(benchmark: Any) -> None:
    """FLOP and bytes of small cases, the roofline, ratios, what is tried; and no case twice."""
    Case = benchmark.Case
    whole = Case("prompt", "fp16", 2, 4, 4, 3, 64)
    assert whole.flops == 4 * 2 * 3 * 64 * 16  # two products of 16 pairs, a multiplication and an addition each
    assert replace(whole, causal=True).flops == 4 * 2 * 3 * 64 * 10  # 1 + 2 + 3 + 4 pairs
    assert replace(whole, causal=True, S=1).flops == replace(whole, S=1).flops  # a step sees every key
    assert whole.bytes == 2 * (2 * 3 * 4 * 64) * 4  # Q, K, V, O
    assert replace(whole, kind="biased").bytes == whole.bytes + 2 * 3 * 16
    assert replace(whole, kind="masked").bytes == whole.bytes + 2 * 4
    windows = Case("windows", "fp16", 64, 49, 49, 3, 32)
    assert windows.bytes == 4 * 64 * 3 * 49 * 32 * 2 + 3 * 49 * 49 * 2
    assert (windows.aim, replace(windows, kind="prompt").aim) == (1.5, 0.9)
    assert windows.tiles(80) == TileSizes(64, 32, 4, 2)  # as a plugin fits them; all else has the table's
    assert replace(windows, kind="biased").tiles(80) == TileSizes(128, 32, 8, 2)
    step = Case("step", "fp16", 1, 1, 100, 4, 64, groups=2)
    assert step.bytes == 2 * 2 * 4 * 64 + 2 * 2 * 2 * 100 * 64
    assert replace(step, int8=True).bytes == 2 * 2 * 4 * 64 + 2 * 2 * 100 * (64 + 4)
    assert (replace(step, T=1100).splits, replace(whole, T=1100).splits) == ((1, 2, 4, 8), (1,))
    peaks = benchmark.Roofline({"fp16": 1e12}, 1e9)
    assert peaks.least_ms(replace(step, B=10)) == pytest.approx(1e3 * 10 * step.bytes / 1e9)
    row = benchmark.row_of(whole, "ours", [1.0, 2.0, 3.0], peaks)
    assert (row["p50_ms"], row["p10_ms"], row["p90_ms"]) == (2.0, 1.2, 2.8)
    sides = [{"side": "ours", "p50_ms": 2.0}, {"side": "torch flash", "p50_ms": 3.0}]
    fast_and_wrong = {"side": "torch math", "p50_ms": 1.0, "wrong": "wrong: 9 units"}
    assert benchmark.ratio_of([*sides, fast_and_wrong]) == (1.5, "torch flash")
    assert benchmark.ratio_of(sides[:1]) == (None, "none")
    names = [case.name for case in benchmark.cases()]
    assert len(names) == len({*names}) == 2 * (7 + 7 + 3 + 3) * 2 + 4 * (4 * 2 * 2) + 2 * (6 + 3 + 6)
    assert {"prompt fp16 head 128 B=2 S=8192 T=8192 causal", "step bf16 head 128 B=8 S=1 T=32768"} <= {*names}
    tried = benchmark.candidates(TileSizes(128, 64, 8, 2))
    assert tried[0] == TileSizes(128, 64, 8, 2)
    assert {TileSizes(128, 32, 8, 2), TileSizes(128, 64, 8, 3), TileSizes(64, 64, 4, 3)} <= {*tried}


def test_what_is_wrong_by_more_than_roundoff_is_found(benchmark: Any) -> None:
    """One element off by 8 units of its query's largest value, and one that was never written, outside the sample."""
    case = benchmark.Case("prompt", "fp16", 2, 200, 5, 3, 4)
    sides = benchmark.Sides(benchmark.InterpretedMachine(), 90)
    exact = torch.randn(2, 3, 200, 4, generator=torch.Generator().manual_seed(1))
    sampled = sides.sampled(case)
    assert (len(sampled), int(sampled[0]), int(sampled[-1])) == (64, 0, 199)
    expected = exact[:, :, sampled].double()
    assert sides.compare(case, exact, expected).units == 0
    found = exact.clone()
    found[1, 2, 199, 3] += 8 * 2**-11 * float(exact[1, 2, 199].abs().max())
    error = sides.compare(case, found, expected)
    assert (error.units, error.place) == (pytest.approx(8, rel=1e-3), (1, 2, 199, 3))
    assert error.wrong == "wrong: 8 units of roundoff, at most 6, at (row, head, query, element) = (1, 2, 199, 3)"
    found = exact.clone()
    found[0, 0, 1, 0] = torch.nan  # queries 0 and 3 are compared, 1 is not
    assert 1 not in sampled.tolist()
    assert sides.compare(case, found, expected).units == float("inf")


OTHERS: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = [
    ("step", (2, 1, 260), {"int8": True, "groups": 2}),
    ("biased", (1, 9, 9), {}),
    ("windows", (1, 9, 9), {}),
    ("masked", (3, 9, 9), {}),
]


@pytest.mark.parametrize(("kind", "sizes", "more"), OTHERS)
def test_float64_is_what_pytorch_computes_of_the_same_tensors(benchmark: Any, kind: str, sizes: Any, more: Any) -> None:
    """Of integers with scales, biases, additive masks and padding; rows by themselves and all at once."""
    case = benchmark.Case(kind, "fp32", *sizes, 4, 8, **more)
    sides = benchmark.Sides(benchmark.InterpretedMachine(), 90)
    tensors = sides.tensors(case)
    side = sides.theirs(case, tensors, "math")
    side.run()
    expected = sides.expected(case, tensors)
    assert sides.compare(case, side.output(), expected).wrong is None
    assert (tensors.bias is None, tensors.mask is None) == (kind in ("step", "masked"), kind != "masked")


def test_no_case_is_begun_that_would_pass_the_limit(benchmark: Any) -> None:
    """After a case of 10 s another needs 15: begun at 20 of 40 s, not at 30."""
    now = [0.0]
    budget = benchmark.Budget(40.0, clock=lambda: now[0])
    began = []
    for _ in range(4):
        began.append(budget.begin())
        now[0] += 10.0
        budget.end()
    assert began == [True, True, True, False]


def test_a_run_without_time_says_what_is_left(benchmark: Any, tmp_path: Path) -> None:
    """What an earlier run of another pack has is dropped; of this one it is kept."""
    sides = benchmark.Sides(benchmark.InterpretedMachine(), 90)
    cases = [case.tiny() for case in benchmark.cases(ONLY)]
    about = {"machine": "it", "sm": 90, "pack": "one", "versions": {"triton": "3.9"}}
    row = {"side": "ours", "about": "", "units": 1.0, "wrong": None}
    known = {"kind": "prompt", "name": TINY[0], "rows": [row], "refused": {}, "most": 6}
    (tmp_path / "it.json").write_text(json.dumps({**about, "timed": False, "cases": [known]}))
    for pack, left in (("one", TINY[1:]), ("other", TINY)):
        report = benchmark.check(
            sides, cases, tmp_path / "it", about | {"pack": pack}, benchmark.Budget(0.0), fresh=False
        )
        assert (report["left"], json.loads((tmp_path / "it.json").read_text())["left"]) == (left, left)
    assert f"the time was up (2 cases): {', '.join(TINY)}" in (tmp_path / "it.md").read_text()


def test_a_gpu_has_its_own_ptx_or_the_last_that_is_not_specific(benchmark: Any) -> None:
    pack = benchmark.Pack(Path("pack"), "", Path("wheel"), (80, 90), {})
    assert [pack.sm_for(sm, "it") for sm in (80, 86, 89, 90, 100, 120)] == [80, 80, 80, 90, 80, 80]
    hopper = replace(pack, sms=(90,))
    with pytest.raises(benchmark.CheckError, match=r'it is SM89, and pack has kernels for SM90.*GPU_SMS="89"'):
        hopper.sm_for(89, "it")
    with pytest.raises(benchmark.CheckError, match="it is SM75"):
        pack.sm_for(75, "it")


def test_packages_that_are_absent_or_old_are_named_together(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "2.4.1+cu121", "numpy": "1.26.0"}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    wanted = {"torch": (2, 5), "numpy": (1, 26), "cuda-bindings": (12, 8)}
    with pytest.raises(
        benchmark.CheckError, match=r"has torch 2\.4\.1.cu121, not torch 2\.5 or newer; no cuda-bindings 12"
    ):
        benchmark.require(wanted)


def damage(path: Path, kind: str) -> None:
    manifest = path / "manifest.json"
    about = json.loads(manifest.read_text())
    kernel = path / sorted(name for name in about["files"] if name.startswith("kernels/"))[0]
    match kind:
        case "absent":
            manifest.unlink()
        case "missing":
            kernel.unlink()
        case "longer":
            kernel.write_bytes(kernel.read_bytes() + b" ")
        case "flipped":
            kernel.write_bytes(kernel.read_bytes().replace(b"sm_90a", b"sm_90b"))
        case "format":
            manifest.write_text(json.dumps(about | {"format": 2}))
        case "cut":
            manifest.write_text(manifest.read_text()[:200])
        case "fields":
            manifest.write_text(json.dumps({"format": 1, "files": []}))
        case "outside":
            entry = {"size": 1, "sha256": ""}
            manifest.write_text(json.dumps(about | {"files": about["files"] | {"../other": entry}}))
        case "wheels":
            files = {name: entry for name, entry in about["files"].items() if not name.endswith(".whl")}
            manifest.write_text(json.dumps(about | {"files": files}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("absent", "there is no .*manifest.json; expected the wheel and the kernels"),
        ("missing", r"damaged: kernels/\w+.json is missing"),
        ("longer", r"damaged: kernels/\w+.json has \d+ bytes, not \d+"),
        ("flipped", r"damaged: kernels/\w+.json has another SHA-256"),
        ("format", "is of format 2; expected 1"),
        ("cut", "cannot be read"),
        ("fields", "cannot be read"),
        ("outside", "damaged: ../other leaves the folder"),
        ("wheels", "names 0 wheels and 1 SMs"),
    ],
)
def test_a_damaged_pack_is_refused_before_it_is_read(benchmark: Any, pack: Path, kind: str, said: str) -> None:
    assert benchmark.read_pack(pack).sms == (90,)
    damage(pack, kind)
    with pytest.raises(benchmark.CheckError, match=f"{said}.*make gpu-check-build"):
        benchmark.read_pack(pack)


def test_a_pack_of_other_sources_is_refused(benchmark: Any, made: Path, tmp_path: Path) -> None:
    """The PTX of a kernel that has been changed since would be checked in its place."""
    plugins = tmp_path / "repository" / "export" / "plugins"
    shutil.copytree(REPO / "export" / "plugins", plugins)
    benchmark.unpack_wheel(benchmark.read_pack(made), tmp_path / "site", plugins.parents[1])
    (plugins / "flash_attention.py").write_text("changed")
    with pytest.raises(benchmark.CheckError, match=r"another flash_attention\.py than this working tree"):
        benchmark.unpack_wheel(benchmark.read_pack(made), tmp_path / "site", plugins.parents[1])


def test_the_dry_run_interprets_the_kernels_of_the_pack(made: Path, tmp_path: Path) -> None:
    """Parity of a causal prompt and of a step in two splits; the results say what they are, and go elsewhere."""
    done = run("gpu_check", "--dry-run", "--pack", str(made), "--out", str(tmp_path), "--only", *ONLY)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu-check-dry-run.json").read_text())
    rows = {each["name"]: each["rows"] for each in report["cases"]}
    assert [*rows] == TINY
    assert all(0.1 < row["units"] < 5 and "p50_ms" not in row for (row,) in rows.values())
    assert rows[TINY[1]][0]["about"].startswith("16x64, 4, 3, ")
    assert (report["timed"], report["sm"], report["roofline"], report["left"]) == (False, 90, None, [])
    page = (tmp_path / "gpu-check-dry-run.md").read_text()
    assert "**A dry run: tiny shapes in Triton's interpreter on a CPU. No GPU, no times.**" in page
    assert "ms" not in re.sub("terms|programs", "", page.split("## ", 1)[1])


def test_a_dry_run_is_no_result(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["--dry-run", "--out", str(REPO / "docs" / "results")])
    assert "expected another folder: a dry run is no result" in capsys.readouterr().err
    assert benchmark.parse(["--dry-run"]).out == REPO / "build" / "gpu-check-dry-run"
    assert benchmark.parse([]).out == REPO / "docs" / "results"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to PACKAGES and what these need, Triton excepted: PyTorch with CUDA has it, and need not."""
    folder = tmp_path_factory.mktemp("alone")
    wanted, seen = [*PACKAGES], {"triton"}
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system
        needs = [need for need in distribution.requires or [] if "extra ==" not in need]
        wanted += [str(re.match(r"[\w.-]+", need)[0]) for need in needs]  # type: ignore[index]
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(top)))
            if not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def on_a_fake(alone: Path, *options: str) -> tuple[dict[str, Any], str, str]:
    script = TESTS / "support" / "gpu_check_on_a_fake.py"
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(script), str(BENCHMARKS), str(alone), "--", *options]
    done = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *printed, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(printed), done.stderr


def test_without_a_gpu_it_says_so(alone: Path, made: Path, tmp_path: Path) -> None:
    found, _, said = on_a_fake(alone, "--pack", str(made), "--out", str(tmp_path))
    assert (found["status"], [*tmp_path.iterdir()]) == (2, [])
    assert "nothing was checked: no NVIDIA GPU can be used here" in said or "cannot be called" in said
    assert "GPU_CHECK_ARGS=--dry-run" in said


def test_a_run_needs_four_packages(alone: Path, made: Path, tmp_path: Path) -> None:
    """All of a run on a GPU but the GPU: no Triton, nothing of the wheel's dependencies."""
    found, printed, said = on_a_fake(alone, "--fake", "--pack", str(made), "--out", str(tmp_path), "--only", *ONLY)
    assert found["status"] == 0, printed + said
    assert {"torch", "numpy", "transom"} <= {*found["imported"]}
    assert {"triton", "onnx", "onnx_ir", "ml_dtypes", "tokenizers", "PIL", "safetensors", "typer", "rich"}.isdisjoint(
        [*found["imported"], *(each.name for each in alone.iterdir())]
    )
    assert [line.split(":")[0] for line in printed.splitlines()[:2]] == TINY
    assert printed.endswith(f"2 of 2 cases right, 0 left; {tmp_path / 'gpu-check-nvidia-h200.md'}")
    report = json.loads((tmp_path / "gpu-check-nvidia-h200.json").read_text())
    assert (report["machine"], report["sm"], report["versions"]["driver for CUDA"]) == ("NVIDIA H200", 90, "13.0")
    prompt, step = ({row["side"]: row for row in each["rows"]} for each in report["cases"])
    assert (prompt["ours"]["p50_ms"], prompt["torch math"]["p50_ms"], prompt["ours"]["wrong"]) == (2.0, 1.0, None)
    assert step["ours"]["p50_ms"] == 3.0  # two launches
    assert {*prompt, *report["cases"][0]["refused"]} == {"ours", *PEERS}
    page = (tmp_path / "gpu-check-nvidia-h200.md").read_text()
    assert "# The attention kernel on NVIDIA H200" in page
    assert [part for part in (report["date"], "SM90", "| 2.0000 (") if part not in page] == []
