"""Each guard of an export that no other test takes away by itself: what is refused, and what is left behind.

No model is traced here. tests/guards/export.toml takes the guards away one by one, and expects a test to fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from bad_bundles import replaced
from paths import KEPT
from tiny_graphs import graph_of
from transom.export import bundle_writer as bundle_module
from transom.export import pipeline
from transom.export import staging as leftovers
from transom.export.bundle_graphs import load_external
from transom.export.bundle_writer import BundleWriter, add_to_bundle, check_out, new_bundle, write_manifest
from transom.export.checkpoint import reload_checkpoint
from transom.export.parity.backends import open_default_files
from transom.export.parity.fp16_range import beyond_fp16, require_fp16_range
from transom.export.passes.fp16_embeddings import fp16_embeddings
from transom.export.passes.half_precision import convert_precision
from transom.export.pipeline import check_options, export
from transom.export.quantization.options import QuantizeOptions
from transom.export.staging import OLD, PARTIAL, remove_stale, staging_dir
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, CheckpointError, ExportError, PrecisionError
from transom.runtime.manifest import MANIFEST


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished bundle where an export shall go."""
    return Path(shutil.copytree(KEPT / "bert-fp32", tmp_path / "out"))


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --out and --force


@pytest.mark.parametrize("name", ["", ".", "/", "bundles/.."])
def test_out_names_a_folder(name: str) -> None:
    with pytest.raises(ExportError, match="expected the path of a new folder"):
        check_out(Path(name), force=True)


def test_a_bundle_is_replaced_by_force_alone(out: Path) -> None:
    check_out(out, force=True)
    with pytest.raises(ExportError, match="exists; give another folder, or --force to replace it"):
        check_out(out, force=False)


@pytest.mark.parametrize("kind", ["file", "full", "link to a bundle", "link to nothing"])
def test_force_replaces_nothing_but_bundles(out: Path, kind: str) -> None:
    other = out.parent / "other"
    match kind:
        case "file":
            other.write_text("a thesis")
        case "full":
            other.mkdir()
            (other / "thesis.txt").write_text("years of work")
        case "link to a bundle":
            other.symlink_to(out)
        case _:
            other.symlink_to(out.parent / "nothing")
    with pytest.raises(ExportError, match="exists and is no bundle; --force replaces only bundles"):
        check_out(other, force=True)
    with pytest.raises(ExportError, match="exists; give another folder"):
        check_out(other, force=False)


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", force=True)


def test_out_is_looked_at_before_any_work(out: Path) -> None:
    """The checkpoint is none either, which would take its time to find out."""
    with pytest.raises(ExportError, match="exists; give another folder"):
        export(str(out.parent / "no checkpoint"), out)
    with pytest.raises(CheckpointError):
        export(str(out.parent / "no checkpoint"), out, force=True)


def test_what_appeared_at_out_in_the_meantime_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="exists; give another folder"), new_bundle(out, force=False):  # noqa: PT012
        out.mkdir()
        (out / MANIFEST).write_text("another's")
    assert listing(tmp_path) == {"out/bundle.json": b"another's"}


# what is left behind


class Stop(Exception):
    """What ends an export half-way."""


def test_an_export_that_fails_leaves_nothing_or_the_old_bundle(out: Path) -> None:
    before = listing(out.parent)
    for place, force in ((out, True), (out.parent / "new/folder/out", False)):
        with pytest.raises(Stop), new_bundle(place, force=force) as writer:  # noqa: PT012
            writer.add("model.onnx", b"half")
            raise Stop
    assert listing(out.parent) == before
    assert os.listdir(out.parent) == ["out"]


def test_the_old_bundle_comes_back_where_the_new_one_cannot_be_put(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = listing(out), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == PARTIAL and target == out:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match=r"No space left on device\. Nothing was left there\. Free some space"):  # noqa: SIM117
        with new_bundle(out, force=True) as writer:
            writer.add("model.onnx", b"new")
    assert listing(out) == before
    assert os.listdir(out.parent) == ["out"]


def test_a_reader_sees_the_old_bundle_until_the_new_one_is_whole(out: Path) -> None:
    before = listing(out)
    with new_bundle(out, force=True) as writer:
        writer.add("model.onnx", b"new")
        writer.describe({})
        assert listing(out) == before
    assert listing(out).keys() == {"model.onnx", MANIFEST}


def test_a_file_is_written_beside_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that ends half-way, as on a full disk, leaves the old bytes."""
    writer = BundleWriter(tmp_path)
    writer.add("a", b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        writer.add("a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a file of the right name has all of its bytes."""
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append("sync") or sync(descriptor))
    monkeypatch.setattr(Path, "replace", lambda self, to: steps.append("name") or replace(self, to))
    BundleWriter(tmp_path).add("a", b"new")
    assert steps == ["sync", "name"]


def test_numbers_that_json_has_not_are_not_written(tmp_path: Path) -> None:
    for number in (nan, inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_manifest(tmp_path, {"parity": {"worst": number}})
    assert os.listdir(tmp_path) == []


def test_what_is_added_replaces_a_file_without_a_moment_of_two_minds(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the file and bundle.json, the bundle is one without that file, not one of a wrong hash."""
    write = bundle_module.write_bytes

    def stop(path: Path, data: bytes) -> None:
        write(path, data)
        if path.name == "golden.safetensors":
            raise Stop

    monkeypatch.setattr(bundle_module, "write_bytes", stop)
    with pytest.raises(Stop):
        add_to_bundle(out, {"golden.safetensors": b"other"})
    assert "golden.safetensors" not in Bundle(out).manifest.files
    monkeypatch.undo()
    add_to_bundle(out, {"golden.safetensors": b"other"})
    assert Bundle(out).read("golden.safetensors") == b"other"


def test_nothing_is_added_through_a_link_that_leaves(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    (out / "engines").symlink_to(out.parent / "elsewhere")
    with pytest.raises(ExportError, match="engines is a link that leaves the bundle; nothing is written there"):
        add_to_bundle(out, {"engines/x.plan": b"plan"})
    assert os.listdir(out.parent / "elsewhere") == []


def test_a_bundle_that_cannot_be_added_to_is_an_error_of_ours(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(bundle_module, "write_bytes", refuse)
    with pytest.raises(ExportError, match=r"cannot write into .*: Read-only file system\. Check the folder"):
        add_to_bundle(out, {"x": b"x"})


# leftovers


def test_only_folders_of_ours_are_cleared(tmp_path: Path) -> None:
    ours = [".transom-abcd1234.partial", ".transom-abcd_234.old"]
    others = [".transom-abc.partial", "x.transom-abcd1234.partial", ".transom-abcd1234.partial.txt", ".partial", "out"]
    for name in (*ours, *others):
        (tmp_path / name).mkdir()
    remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_what_a_living_export_writes_is_not_cleared(tmp_path: Path) -> None:
    with staging_dir(tmp_path, PARTIAL) as folder:
        (folder / "model.onnx").write_bytes(b"half")
        remove_stale(tmp_path)
        assert (folder / "model.onnx").read_bytes() == b"half"
    assert os.listdir(tmp_path) == []


def aside(tmp_path: Path) -> Path:
    """What is left of an export that was killed between its two renames."""
    folder = tmp_path / f".transom-abcd1234{OLD}"
    (folder / "out").mkdir(parents=True)
    (folder / "out" / MANIFEST).write_bytes(b"old")
    return folder


def test_what_was_moved_aside_goes_back_where_nothing_is(tmp_path: Path) -> None:
    aside(tmp_path)
    remove_stale(tmp_path)
    assert listing(tmp_path) == {"out/bundle.json": b"old"}


def test_what_was_moved_aside_replaces_nothing(tmp_path: Path) -> None:
    aside(tmp_path)
    (tmp_path / "out").mkdir()
    remove_stale(tmp_path)
    assert listing(tmp_path) == {}
    assert os.listdir(tmp_path) == ["out"]


def test_an_only_copy_is_kept_where_it_cannot_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = aside(tmp_path)

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    remove_stale(tmp_path)
    assert listing(folder) == {"out/bundle.json": b"old"}


def test_what_is_half_deleted_is_never_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it deletes the old bundle, an export leaves garbage by its name."""
    aside(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(leftovers.shutil, "rmtree", lambda folder, ignore_errors: None)
    remove_stale(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", PARTIAL]


# options and checkpoints


def test_precisions_are_those_that_are_known() -> None:
    with pytest.raises(ExportError, match="--precision is 'fp8'; expected one of fp32, fp16, bf16, int8, int4"):
        check_options("fp8", "vit", QuantizeOptions())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_options_for_integers_need_integers(precision: str) -> None:
    assert check_options(precision, "vit", QuantizeOptions()) is None
    with pytest.raises(ExportError, match="is not quantised, and an option for quantisation is given"):
        check_options(precision, "vit", QuantizeOptions(method="minmax"))


def test_a_bundle_is_compared_with_its_own_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(KEPT / "bert-fp32")
    hashes = {"sha256": bundle.manifest.source["sha256"]}

    loaded = SimpleNamespace(checkpoint=SimpleNamespace(folder=Path("checkpoint")), **hashes)
    monkeypatch.setattr("transom.export.checkpoint.load_checkpoint", lambda *source, **options: loaded)
    assert reload_checkpoint(bundle) is loaded
    loaded.sha256 = "0" * 64
    with pytest.raises(CheckpointError, match="is not the checkpoint that .* was made from: its hash differs"):  # noqa: RUF043
        reload_checkpoint(bundle)


# half precision


@pytest.mark.parametrize("value", [65505.0, -1e30, inf], ids=str)
def test_a_weight_that_fp16_cannot_hold_is_refused(value: float) -> None:
    text = "g (float[1, 2] x) => (float[1, 2] y) { y = Add(x, w) }"
    convert_precision(graph_of(text, {"w": [[1.0, 65504.0]]}), "fp16")
    with pytest.raises(PrecisionError, match=r"the weight w \(module a\.b\) reaches .*, fp16 ends at 65504"):
        convert_precision(graph_of(text, {"w": [[1.0, value]]}, ["a.b"]), "fp16")
    convert_precision(graph_of(text, {"w": [[1.0, value]]}), "bf16")


@pytest.mark.parametrize("value", [65504.0, 1e5, inf, nan], ids=str)
def test_a_tensor_at_the_end_of_fp16_is_refused(value: float) -> None:
    largest: Mapping[str, tuple[float, str]] = {"x": (65503.0, ""), "y": (value, "encoder.layer.1"), "z": (1e9, "top")}
    assert list(beyond_fp16(largest)) == ["y", "z"]
    with pytest.raises(
        PrecisionError, match=r"cannot hold 2 tensor\(s\), first y \(module encoder\.layer\.1\) reaches"
    ):
        require_fp16_range(largest)
    require_fp16_range({"x": (65503.0, "")})
    require_fp16_range({"x": (1e9, "sentence_pooling.sum")})  # that module stays in FP32


@pytest.mark.parametrize(("value", "halved"), [(65504.0, True), (65536.0, False), (nan, False)], ids=str)
def test_a_table_of_embeddings_is_halved_where_fp16_holds_it(value: float, halved: bool) -> None:
    model = graph_of("g (int64[1] i) => (float[1, 2] y) { y = Gather(w, i) }", {"w": [[value, 1.0], [2.0, 3.0]]})
    assert fp16_embeddings(model) is halved


def test_the_file_for_gpus_is_opened_though_nothing_runs_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(KEPT / "bert-int8", tmp_path / "bundle"))
    open_default_files(Bundle(folder))
    replaced("model.onnx", lambda data: b"no graph")(folder)
    with pytest.raises(ExportError, match=r"model\.onnx, which would ship for GPUs, does not load: "):
        open_default_files(Bundle(folder))


def test_the_file_for_gpus_has_the_edges_of_bundle_json(tmp_path: Path) -> None:
    """Its caches are in half precision; those of the variant for the CPU are not."""
    folder = Path(shutil.copytree(KEPT / "gpt-int8", tmp_path / "bundle"))
    open_default_files(Bundle(folder))
    replaced("decoder.onnx", lambda data: (folder / "decoder.cpu.onnx").read_bytes())(folder)
    with pytest.raises(
        ExportError, match=r"decoder\.onnx, which would ship for GPUs, has key_cache\.0, .* in another dtype"
    ):
        open_default_files(Bundle(folder))


@pytest.mark.parametrize(("offset", "length"), [(8, 16), (24, 0), (-8, 16)], ids=str)
def test_weights_lie_inside_their_file(offset: int, length: int) -> None:
    def external(start: int, size: int) -> ir.ExternalTensor:
        return ir.ExternalTensor("w", start, size, ir.DataType.FLOAT, shape=ir.Shape([4]), name="w", base_dir="")

    assert load_external(external(4, 16), bytes(20)).numpy().tolist() == [0, 0, 0, 0]
    with pytest.raises(BundleError, match="the weight w lies beyond the end of the weights"):
        load_external(external(offset, length), bytes(20))


def test_the_stages_of_an_export_are_all_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each check of ``export`` is asked, and what it raises ends the export with nothing left behind."""
    graph = Bundle(KEPT / "bert-fp32").manifest.graphs[0].graph
    fake = SimpleNamespace(
        graphs=(graph,), axes={}, preprocess=None, checkpoint=SimpleNamespace(source="x"),
        parts=lambda: {"model": None}, open_tokenizer=lambda: None, tokenizers=[], give_back=lambda: None,
        require_unchanged=lambda: None, marks=(),
    )  # fmt: skip
    asked: list[str] = []

    def stage(name: str, result: Any = None) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            asked.append(name)
            if name == failing:
                raise ExportError(name)
            return result

        return called

    class Side:
        def __enter__(self) -> Side:
            return self

        def __exit__(self, *error: object) -> None: ...

    for name, result in {
        "load_checkpoint": fake, "onnx_from_module": graph_of("g (float[1] x) => (float[1] y) { y = Neg (x) }"),
        "make_variants": SimpleNamespace(emulated=(1,)), "manifest_fields": {"precision": "fp16"},
        "write_files": None, "open_default_files": None,
        "open_pytorch": Side(), "ParityCases": [1], "parity_inputs": {}, "open_bundle": Side(),
        "emulated_variants": None, "open_variants": Side(), "open_native": None,
        "measure_ranges": SimpleNamespace(tensors={}), "require_fp16_range": None, "check_parity": [],
        "check_greedy": [], "score_both": None, "parity_to_json": {},
    }.items():  # fmt: skip
        monkeypatch.setattr(pipeline, name, stage(name, result))
    staged = SimpleNamespace(manifest=SimpleNamespace(precision="fp16"))
    monkeypatch.setattr(pipeline.BundleWriter, "staged", stage("staged", staged))
    monkeypatch.setattr(pipeline.BundleWriter, "manifest", stage("manifest", staged.manifest))
    failing = ""
    assert export("x", tmp_path / "whole", precision="fp16") is staged.manifest
    checks = [
        "open_default_files",
        "measure_ranges",
        "require_fp16_range",
        "open_variants",
        "check_parity",
        "check_greedy",
    ]
    assert [name for name in asked if name in checks] == checks
    for failing in checks:
        with pytest.raises(ExportError, match=failing):
            export("x", tmp_path / "out", precision="fp16")
        assert os.listdir(tmp_path) == ["whole"]
