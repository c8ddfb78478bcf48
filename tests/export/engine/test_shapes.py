"""Engines of narrower sizes than their bundle: asked for, recorded, obeyed; and engines that are taken out again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import changed_bundle, document, error_line, transom
from paths import REPO
from rtx import needs_rtx
from transom.export import bundle_writer as writer
from transom.export.bundle_writer import add_to_bundle
from transom.export.engine import remove
from transom.export.engine.profiles import profiles_of
from transom.export.engine.shapes import Shapes, bounds_to_json, narrowed
from transom.export.engine.trt_graphs import tensorrt_graphs
from transom.export.engine.trt_parity import require_trt_parity
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, ExportError
from transom.runtime.feeds import allowed_sizes, engine_axes, wider
from transom.runtime.graph_spec import Axis, Graph, Tensor

STORED = REPO / "tests/bundles/0.1.0"

pytestmark = pytest.mark.skipif(not STORED.is_dir(), reason="the repository is not at hand")

AXES = {"B": Axis(1, 1, 16), "S": Axis(1, 128, 512)}
ENCODER = Graph("model", (Tensor("input_ids", "int64", ("B", "S")),), (Tensor("y", "float32", ("B", 5)),))
CACHED = {"B": Axis(1, 1, 4), "S": Axis(1, 8, 64), "C": Axis(1, 64, 64, "S"), "P": Axis(1, 1, 64, "S")}
DECODER = Graph(
    "decoder",
    (
        Tensor("input_ids", "int64", ("B", "S")),
        Tensor("logits_positions", "int64", ("B", "P")),
        Tensor("key_cache.0", "float32", ("B", 3, "C", 8), state=True),
    ),
    (Tensor("key_cache.0.written", "float32", ("B", 3, "C", 8), state=True, aliases="key_cache.0"),),
)

GROUPS = {**CACHED, "I": Axis(1, 1, 6), "G": Axis(1, 1, 4, same_as="B", divides="B")}
READS_IMAGES = replace(
    DECODER, inputs=(*DECODER.inputs, Tensor("image_key.0", "float32", ("G", 3, "I", 5, 8), default=0, state=True))
)

STEPS = {"B": Axis(1, 1, 4), "S": Axis(1, 8, 64), "T": Axis(1, 1, 1)}
RECURRENT = Graph(
    "decoder",
    (
        Tensor("decoder_input_ids", "int64", ("B", "T")),
        Tensor("cross_key", "float32", ("B", "S", 7), state=True),
        Tensor("hidden_state.0", "float32", ("B", 8), state=True),
    ),
    (Tensor("hidden_state.0.next", "float32", ("B", 8), state=True, aliases="hidden_state.0"),),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stored(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED / name, tmp_path / name))


def sizes_of(axes: dict[str, Axis]) -> dict[str, tuple[int, int, int]]:
    return {name: (axis.min, axis.opt, axis.max) for name, axis in axes.items()}


def test_an_engine_has_a_group_for_each_row() -> None:
    """Corners of a profile hold together, as B = K * G with K = 1; fewer groups are the runtime's to spread."""
    for shapes, rows, groups in (
        (Shapes(), (1, 1, 4), (1, 1, 4)),
        (Shapes(max={"B": 2}), (1, 1, 2), (1, 1, 2)),
        (Shapes({"B": 2}, {"B": 3}, {"B": 3, "I": 2}), (2, 3, 3), (1, 1, 3)),
    ):
        found = narrowed(GROUPS, [READS_IMAGES], shapes)
        assert (sizes_of(found)["B"], sizes_of(found)["G"]) == (rows, groups)
        for profile in profiles_of(READS_IMAGES, found):
            for corner, size in enumerate(rows):
                images, tokens = profile.shapes["image_key.0"][corner], profile.shapes["input_ids"][corner]
                assert (images[0], tokens[0]) == (size, size)
            assert profile.shapes["image_key.0"][2][2] == found["I"].max
    recorded = bounds_to_json(narrowed(GROUPS, [READS_IMAGES], Shapes(max={"B": 2, "I": 3})), [READS_IMAGES])
    assert (recorded["G"], recorded["I"]) == ({"min": 1, "opt": 1, "max": 2}, {"min": 1, "opt": 1, "max": 3})


@pytest.mark.parametrize("option", ["min", "opt", "max"])
def test_groups_are_not_asked_for(option: str) -> None:
    with pytest.raises(ExportError, match=rf"--{option} G=2: an engine has one for each row; give --{option} B"):
        narrowed(GROUPS, [READS_IMAGES], Shapes(**{option: {"G": 2}}))


def test_an_axis_that_is_not_named_keeps_the_bundles_bounds() -> None:
    assert narrowed(AXES, [ENCODER], Shapes()) == AXES
    found = narrowed(AXES, [ENCODER], Shapes({"S": 8}, {"S": 64}, {"S": 100, "B": 4}))
    assert sizes_of(found) == {"B": (1, 1, 4), "S": (8, 64, 100)}
    assert sizes_of(narrowed(AXES, [ENCODER], Shapes(max={"S": 100})))["S"] == (1, 100, 100)  # tuned for its nearest
    assert sizes_of(narrowed(AXES, [ENCODER], Shapes(min={"B": 2})))["B"] == (2, 2, 16)
    (profile,) = profiles_of(ENCODER, found)
    assert profile.shapes["input_ids"] == ((1, 8), (1, 64), (4, 100))
    assert bounds_to_json(found, [ENCODER])["S"] == {"min": 8, "opt": 64, "max": 100}


def test_prompts_and_positions_of_a_decoder_follow_its_cache() -> None:
    found = narrowed(CACHED, [DECODER], Shapes(max={"C": 32}))
    assert sizes_of(found) == {"B": (1, 1, 4), "S": (1, 8, 32), "C": (1, 32, 32), "P": (1, 1, 32)}
    assert sizes_of(narrowed(CACHED, [DECODER], Shapes(max={"S": 16})))["P"] == (1, 1, 16)
    prefill, decode = profiles_of(DECODER, found)
    assert prefill.shapes["key_cache.0"][0] == (1, 3, 32, 8)
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (4, 1))


def test_a_recurrent_decoder_has_one_profile_of_single_steps() -> None:
    found = narrowed(STEPS, [RECURRENT], Shapes({"S": 2}, {"S": 5}, {"S": 9, "B": 2}))
    assert sizes_of(found) == {"B": (1, 1, 2), "S": (2, 5, 9), "T": (1, 1, 1)}
    (profile,) = profiles_of(RECURRENT, found)
    assert profile.name == "decode"
    assert profile.shapes == {
        "decoder_input_ids": ((1, 1), (1, 1), (2, 1)),
        "cross_key": ((1, 2, 7), (1, 5, 7), (2, 9, 7)),
        "hidden_state.0": ((1, 8), (1, 8), (2, 8)),
    }


@pytest.mark.parametrize(
    ("axes", "graph", "shapes", "said"),
    [
        (AXES, ENCODER, Shapes(max={"X": 5}), r"--max names the axis 'X'; this bundle has B, S\. Nothing was built"),
        (AXES, ENCODER, Shapes(max={"S": 600}), r"--max S=600 is out of range; this bundle allows 1..512; export"),
        (AXES, ENCODER, Shapes(max={"S": 0}), r"--max S=0 is out of range; this bundle allows 1\.\.512\."),
        (AXES, ENCODER, Shapes({"S": 9}, {"S": 5}), "axis S would have min 9, opt 5, max 512; expected them in"),
        (AXES, ENCODER, Shapes({"S": 9}, max={"S": 5}), "axis S would have min 9, opt 9, max 5"),
        (AXES, ENCODER, Shapes({"Y": 1}, {"S": 999}), r"--min names the axis 'Y'.*; --opt S=999 is out of range"),
        (CACHED, DECODER, Shapes({"C": 8}), "--min C=8: a cache has one length in an engine; give --max C"),
        (CACHED, DECODER, Shapes(opt={"C": 8}), "--opt C=8: a cache has one length"),
        (CACHED, DECODER, Shapes({"S": 2}), "--min S=2: a step has one new token in each row, so it has to be 1"),
        (STEPS, RECURRENT, Shapes(max={"T": 2}), r"--max T=2 is out of range; .* allows 1..1; a recurrent state"),
        (STEPS, RECURRENT, Shapes({"T": 2}), r"allows 1\.\.1; a recurrent state is moved by one token at a time\."),
        (STEPS, RECURRENT, Shapes(max={"C": 5}), r"--max names the axis 'C'; this bundle has B, S, T\. Nothing was"),
        (STEPS, RECURRENT, Shapes(max={"S": 65}), r"--max S=65 is out of range; this bundle allows 1\.\.64; export"),
        (CACHED, DECODER, Shapes(max={"C": 8, "S": 9}), "axis S would reach 9, and C 8, which bounds it"),
        (CACHED, DECODER, Shapes(opt={"S": 9}, max={"C": 8}), "axis S would reach 64, and C 8, which bounds it"),
    ],
)  # fmt: skip
def test_bounds_that_cannot_be(axes: dict[str, Axis], graph: Graph, shapes: Shapes, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        narrowed(axes, [graph], shapes)


def test_errors_name_the_engines_bounds_and_the_build_that_widens_them() -> None:
    from transom.runtime.manifest_graphs import Plan

    plan = Plan("p", "TensorRT-RTX", "1.7", None, "rtx-sm89", {"S": Axis(8, 64, 100), "B": Axis(1, 1, 16)})
    axes = engine_axes(AXES, plan)
    assert axes["B"] == AXES["B"]  # which is the bundle's own bound
    assert allowed_sizes("S", axes["S"], 200) == (
        "8..100 in the engine for rtx-sm89. Run `transom build BUNDLE --target rtx-sm89 --max S=200`."
    )
    assert allowed_sizes("S", axes["S"], 3).endswith("Run `transom build BUNDLE --target rtx-sm89 --min S=3`.")
    assert allowed_sizes("S", axes["S"], 600) == (
        "8..100 in the engine for rtx-sm89. Export again with --max S=600, then run "
        "`transom build BUNDLE --target rtx-sm89 --max S=600`."
    )
    assert allowed_sizes("S", axes["S"], 0) == "8..100 in the engine for rtx-sm89."
    assert allowed_sizes("S", AXES["S"], 600) == "1..512. Export again with --max S=600."
    assert wider(AXES, {"S": 600, "B": 17}) == "Export again with --max S=600 --max B=17"


def test_a_wrong_option_is_a_wrong_call(tmp_path: Path) -> None:
    folder = stored("bert-fp16", tmp_path)
    result = transom("build", folder, "--target", "rtx-sm86", "--opt", "S")
    assert (result.exit_code, "--opt is 'S'; expected AXIS=SIZE" in result.stderr) == (2, True)
    said = error_line(transom("build", folder, "--target", "rtx-sm86", "--max", "S=8"))
    assert "--max S=8 is out of range; this bundle allows 1..7; export again with --max S=8. Nothing was built." in said


@needs_rtx
def test_bounds_are_built_recorded_and_shown(tmp_path: Path) -> None:
    folder = stored("bert-fp16", tmp_path)
    told = document(
        transom("build", folder, "--target", "rtx-sm86", "--min", "S=2", "--opt", "S=3", "--max", "B=1,S=5", "--json")
    )
    assert [engine["target"] for engine in told["engines"]] == ["rtx-sm86"]
    manifest = Bundle(folder).manifest
    bounds = {"B": {"min": 1, "opt": 1, "max": 1}, "S": {"min": 2, "opt": 3, "max": 5}}
    assert manifest.engines["rtx-sm86"]["axes"] == bounds
    assert manifest.graphs[0].plans["rtx-sm86"].axes == {"B": Axis(1, 1, 1), "S": Axis(2, 3, 5)}
    assert "B=1..1, S=2..5" in transom("inspect", folder).stdout
    with load(folder) as bert:  # on the CPU nothing is narrower
        assert (bert.max_size("S"), bert.max_size("B")) == (7, 2)


@needs_rtx
def test_a_shorter_cache_is_checked_as_far_as_it_reaches(tmp_path: Path) -> None:
    """The golden generation has prompts of one token and six more: a cache of four holds a part of it, one a token."""
    bundle = Bundle(STORED / "gpt-fp32")
    specs = [file.graph for file in bundle.manifest.graphs]
    for length in (4, 1):
        axes = narrowed(bundle.manifest.axes, specs, Shapes(max={"C": length}))
        assert axes["S"].max == min(7, length)
        assert require_trt_parity(bundle, tensorrt_graphs(bundle, axes=axes), axes) < 2e-5
    folder = stored("gpt-fp32", tmp_path)
    assert transom("build", folder, "--target", "rtx-sm89", "--max", "C=4").exit_code == 0
    assert Bundle(folder).manifest.engines["rtx-sm89"]["axes"]["C"] == {"min": 1, "opt": 4, "max": 4}


def test_prompts_longer_than_the_cache_are_cut_for_the_check(gpt_bundle: Path) -> None:
    """Its golden prompts have 96 tokens; what both sides read is theirs to choose."""
    bundle = Bundle(gpt_bundle)
    axes = narrowed(bundle.manifest.axes, [file.graph for file in bundle.manifest.graphs], Shapes(max={"C": 24}))
    assert require_trt_parity(bundle, tensorrt_graphs(bundle, axes=axes), axes) < 2e-5


def with_engine(folder: Path, target: str = "rtx-sm86", **more: Any) -> Path:
    """A bundle with a plan, which nothing here reads."""
    bundle = Bundle(folder)
    names = {file.graph.name: f"engines/{target}.{file.graph.name}.plan" for file in bundle.manifest.graphs}
    plans = {name: f"{target} {name}".encode() for name in names.values()}
    described = {"library": "TensorRT-RTX", "version": "1.7.1", "plans": names, **more}
    add_to_bundle(folder, plans, {"engines": {**bundle.manifest.engines, target: described}})
    return folder


@pytest.mark.parametrize(
    "axes",
    [
        [], "S", {"S": 5}, {"X": {"min": 1, "opt": 1, "max": 1}}, {"S": {"min": 1, "opt": 1}},
        {"S": {"min": 0, "opt": 1, "max": 1}}, {"S": {"min": 1, "opt": 1, "max": 8}},
        {"S": {"min": 3, "opt": 1, "max": 5}},
        {"S": {"min": 1.0, "opt": 1, "max": 1}}, {"S": {"min": True, "opt": 1, "max": 1}},
        {"S": {"min": 1, "opt": 1, "max": 1, "like": "B"}},
    ],
)  # fmt: skip
def test_recorded_bounds_are_checked(axes: Any, tmp_path: Path) -> None:
    folder = with_engine(stored("bert-fp32", tmp_path))
    changed = changed_bundle(folder, tmp_path, lambda words: words["engines"]["rtx-sm86"].update(axes=axes))
    with pytest.raises(BundleError, match=r"engines\.rtx-sm86\.axes is .*, expected min, opt and max of axes"):
        Bundle(changed)


def test_an_engine_without_recorded_bounds_has_the_bundles(tmp_path: Path) -> None:
    """As version 0.1.0 wrote them."""
    bundle = Bundle(with_engine(stored("bert-fp32", tmp_path)))
    plan = bundle.manifest.graphs[0].plans["rtx-sm86"]
    assert (plan.target, plan.axes) == ("rtx-sm86", {})
    assert engine_axes(bundle.manifest.axes, plan) == bundle.manifest.axes
    assert transom("inspect", bundle.folder).exit_code == 0


def test_an_engine_is_taken_out_of_a_bundle(tmp_path: Path) -> None:
    folder = with_engine(with_engine(stored("clip-fp32", tmp_path)), "rtx-sm89")
    before = json.loads((folder / "bundle.json").read_text())
    told = document(transom("remove-engine", folder, "--target", "rtx-sm86", "--json"))
    assert told["targets"] == ["rtx-sm86"]
    assert sorted(told["removed"]) == ["engines/rtx-sm86.image.plan", "engines/rtx-sm86.text.plan"]
    manifest = Bundle(folder).manifest
    assert [*manifest.engines] == ["rtx-sm89"]
    assert not [name for name in manifest.files if "sm86" in name]
    assert sorted(path.name for path in (folder / "engines").iterdir()) == ["rtx-sm89.image.plan", "rtx-sm89.text.plan"]
    text = transom("remove-engine", folder, "--target", "rtx-sm89").stdout
    assert "removed engines/rtx-sm89.image.plan, 36 B" in text
    assert not (folder / "engines").exists()
    after = json.loads((folder / "bundle.json").read_text())
    assert "engines" not in after
    rest = {key: value for key, value in before.items() if key not in ("engines", "files", "manifest_sha256")}
    assert {key: after[key] for key in rest} == rest
    assert error_line(transom("remove-engine", folder, "--target", "rtx-sm89")).endswith(
        "has no engine for 'rtx-sm89'; it has none. Nothing was removed."
    )


def test_nothing_is_removed_where_one_target_has_no_engine(tmp_path: Path) -> None:
    folder = with_engine(stored("bert-fp32", tmp_path))
    said = error_line(transom("remove-engine", folder, "--target", "rtx-sm86", "--target", "rtx-sm90"))
    assert "has no engine for 'rtx-sm90'; it has rtx-sm86. Nothing was removed." in said
    assert [*Bundle(folder).manifest.engines] == ["rtx-sm86"]


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_removal_leaves_a_bundle_that_loads(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C as the manifest is written, and as the second file is removed; the same command finishes."""
    folder = with_engine(stored("clip-fp32", tmp_path))
    with monkeypatch.context() as patch:
        if after == 0:
            patch.setattr(remove, "write_manifest", interrupt)
        else:
            unlink, removed = Path.unlink, []

            def once(path: Path, **options: Any) -> None:
                if removed:
                    raise KeyboardInterrupt
                removed.append(path)
                unlink(path, **options)

            patch.setattr(Path, "unlink", once)
        with pytest.raises(KeyboardInterrupt):
            remove.remove_engines(Bundle(folder), ["rtx-sm86"])
    assert [*Bundle(folder).manifest.engines] == (["rtx-sm86"] if after == 0 else [])
    remove.remove_engines(Bundle(folder), ["rtx-sm86"])
    assert Bundle(folder).manifest.engines == {}
    assert not (folder / "engines").exists()


def interrupt(*given: Any) -> None:
    raise KeyboardInterrupt


def test_an_engine_that_is_built_again_leaves_at_every_moment_a_bundle_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the old plan and the new one: the bundle has no engine for the target, and loads."""
    folder = with_engine(with_engine(stored("bert-fp32", tmp_path)), "rtx-sm89")
    write = writer.write_bytes

    def interrupted(path: Path, data: bytes) -> None:
        if path.suffix == ".plan":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(writer, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with_engine(folder)
    assert [*Bundle(folder).manifest.engines] == ["rtx-sm89"]
    monkeypatch.undo()
    with_engine(folder)
    assert {*Bundle(folder).manifest.engines} == {"rtx-sm86", "rtx-sm89"}


def test_completion_and_help_know_the_options() -> None:
    for command, expected in (("build", ("--min", "--opt", "--max")), ("remove-engine", ("--target", "--json"))):
        text = transom(command, "--help").stdout
        assert all(option in text for option in expected)
        assert f"  transom {command} bundles/" in text
        assert [line for line in text.splitlines() if len(line) > 80] == []
