"""The report of a bundle with engines: table, bars, names as bundle.json tells them, harmless whatever that holds."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import changed_bundle
from json_mutations import mutated
from report_pages import Page
from transom.export.report import report as report_module
from transom.export.report.engines import LOOKS, engines_section
from transom.export.report.kernels import (
    ATTENTION,
    CHAINS,
    INTEGERS,
    KINDS,
    MOVES,
    PRODUCTS,
    SINGLE,
    UNNAMED,
    kernels_from_json,
    kind_of,
)
from transom.export.report.rendering import TEMPLATES
from transom.export.report.report import write_report

EVIL = "<script>alert(1)</script>\"'>\x00\x1b[31m\u202e&amp;</title></style>"
Words = dict[str, Any]


def profile(name: str, **changes: Any) -> Words:
    """Ten kernels: 2 of attention, 3 of integers, 1 other product, 2 chains, 1 that moves, 1 single step."""
    return {
        "profile": name,
        "attention": {"fused": 2, "of": 2, "unfused": []},
        "gelu": {"fused": 1, "of": 1},
        "int8": {"products": 5, "of": 6, "dequantized": ["MatMul_d.product"]},
        "kernels": 10,
        "alike": {
            "_gemm_mha_v2": 2,
            "MatMul_a.product+MatMul_b.product [profile 1]+MatMul_c.product": 1,
            "MatMul_e.product": 2,
            "__myl_CastMulFc": 1,
            "__myl_MulAddReluMulMinMaxRounCast": 2,
            "__myl_ReshTran": 1,
            "__myl_Cums": 1,
        },
        "alone": ["node_cumsum"],
        **changes,
    }


def engine(target: str, prefill: Words, decode: Words) -> Words:
    made = {"target": target, "graph": "decoder", "size": 5, "seconds": 1.5, "profiles": [prefill, decode]}
    return {
        "library": "TensorRT-RTX",
        "version": "1.7.1.116",
        "plans": {"decoder": f"engines/{target}.plan"},
        "graphs": {"decoder": {**made, "memory": {"activation": 2 << 20, "weights": 7}}},
    }


ENGINES = {
    "rtx-sm75": engine(
        "rtx-sm75", profile("prefill", attention={"fused": 1, "of": 2, "unfused": ["attend_1"]}), profile("decode")
    ),
    "rtx-sm86": engine("rtx-sm86", profile("prefill"), profile("decode")),
    "tensorrt": {**engine("tensorrt", profile("prefill"), profile("decode")), "sm": "sm87"},
}
FILES = {f"engines/{target}.plan": SimpleNamespace(size=3 << 20) for target in ENGINES}


def manifest(engines: Any, precision: str = "int8") -> Any:
    return SimpleNamespace(engines=engines, files=FILES, precision=precision)


def drawn(change: Callable[[Words], object] = lambda fields: None) -> str:
    """The section alone; ``change`` is done to ``engines``."""
    fields = copy.deepcopy(ENGINES)
    change(fields)
    return engines_section(manifest(fields))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_gemm_mha_v2", ATTENTION),
        ("_gemv_mha_v1", ATTENTION),
        ("MatMul_val_3.product", INTEGERS),
        ("MatMul_val_3.product [profile 1]+MatMul_val_2.product", INTEGERS),
        ("MatMul_wide.product", PRODUCTS),
        ("MatMul_wide.product [profile 1]+MatMul_val_2.product", PRODUCTS),
        ("__mye45644+__mye45632", PRODUCTS),
        ("node_conv2d", PRODUCTS),
        ("node_max_pool2d_1", SINGLE),
        ("__mye_unroll", PRODUCTS),
        ("$$myelin$$(Unnamed Loop* 0)^MatMul_gru.step.recurrent", PRODUCTS),
        ("MatMul_attention.scores", PRODUCTS),
        ("__myl_FcAddMulTanh", PRODUCTS),
        ("__myl_Fc", PRODUCTS),
        ("__myl_AddSqrtDiv", CHAINS),
        ("__myl_MoveReshMulMinMaxRounCastTran", CHAINS),
        ("__myl_ReshTran", MOVES),
        ("__myl_Cast", MOVES),
        ("copy_h2d___mye32684", MOVES),
        ("__myl_Cums", SINGLE),
        ("__myl_", CHAINS),
    ],
)
def test_kinds_of_kernels_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name, {"MatMul_wide.product"}) == kind


def test_kernels_that_have_no_name_are_counted_too() -> None:
    found = kernels_from_json(profile("all", kernels=14))
    assert found.counts == {ATTENTION: 2, INTEGERS: 3, PRODUCTS: 1, CHAINS: 2, MOVES: 1, SINGLE: 1, UNNAMED: 4}
    assert found.total == 14
    assert kernels_from_json({"kernels": 3, "alike": {"_gemm_mha_v2": 5}}).counts == {ATTENTION: 5}
    assert kernels_from_json({"alike": {"a": 0, "b": -1, "c": True, "d": "9"}}).counts == {}


def test_the_table_has_a_row_for_each_profile() -> None:
    page = Page(drawn())
    head, *rows = page.table("TensorRT engines")
    assert [dict(zip(head, row, strict=True)) for row in (rows[0], rows[-1])] == [
        {
            "target": "rtx-sm75", "runs on": "Turing: RTX 20, T4", "graph": "decoder", "profile": "prefill",
            "plan": "3.0 MiB", "memory": "2.0 MiB", "attention": "1 of 2", "GELU": "1 of 1", "INT8": "5 of 6",
            "kernels": "10",
        },
        {
            "target": "tensorrt", "runs on": "the GPU that built it, SM87", "graph": "decoder", "profile": "decode",
            "plan": "3.0 MiB", "memory": "2.0 MiB", "attention": "2 of 2", "GELU": "1 of 1", "INT8": "5 of 6",
            "kernels": "10",
        },
    ]  # fmt: skip
    assert len(rows) == 6
    text = "".join(page.text)
    assert "Built for rtx-sm75, rtx-sm86, tensorrt by TensorRT-RTX 1.7.1.116." in text
    assert "read from the builder's log. That needs no GPU, and it is no measurement" in text
    assert '<b class="limit">1 of 2</b>' in page.html


def test_what_did_not_fuse_is_named_where_it_did_not() -> None:
    html = drawn()
    page = Page(html)
    assert page.headings == ["TensorRT engines", "What did not fuse", "Nodes that are a kernel by themselves"]
    wide = "<b>Integer products that are dequantised first:</b> <code>MatMul_d.product</code>"
    unfused = '<b class="limit">Attention in several kernels:</b> <code>attend_1</code>'
    one, two = "decoder, prefill <small>rtx-sm75</small>", "decoder, prefill <small>rtx-sm86, tensorrt</small>"
    for name, recorded in ((one, unfused), (one, wide), (two, wide)):
        assert f"<div>{name}</div><div>{recorded}</div>" in html
    assert html.count("attend_1") == 1
    assert "is fused" not in html
    assert "<code>node_cumsum</code>" in html


def test_names_that_bundle_json_leaves_out_are_counted() -> None:
    def unnamed(fields: Words) -> None:
        fields["rtx-sm86"]["graphs"]["decoder"]["profiles"] = [
            profile(
                "all",
                attention={"fused": 1, "of": 5},
                gelu={"fused": 0, "of": 3},
                int8={"products": 1, "of": 3},
                alone=[f"node_{i}" for i in range(30)],
            )
        ]

    html = drawn(unnamed)
    assert "Attention in several kernels:</b> 4, not named" in html
    assert "dequantised first:</b> 2, not named" in html
    assert "GELUs in a kernel of their own:</b> 3<" in html
    assert "<code>node_11</code> and 18 more" in html
    assert "<div>decoder <small>rtx-sm86</small></div>" in html  # one profile needs no name


def test_everything_fused_and_fp32() -> None:
    fused = profile("all", int8={"products": 6, "of": 6, "dequantized": []}, alone=[])
    html = engines_section(manifest({"rtx-sm89": engine("rtx-sm89", fused, fused)}))
    assert "<p>Every attention, GELU and integer product that was counted is fused.</p>" in html
    assert Page(html).headings == ["TensorRT engines"]
    none = {"fused": 0, "of": 0}
    plain = profile("all", attention=none, gelu=none, int8={"products": 0, "of": 0}, alone=[])
    made = engine("rtx-sm89", plain, plain)
    made["graphs"]["decoder"]["written_out"] = {"node_1": "in FP32", "node_2": "in FP32", "node_3": f"of {EVIL}"}
    made["graphs"]["decoder"]["plugins"] = {"node_4": "in FP32"}
    html = engines_section(manifest({"rtx-sm89": made}, "fp32"))
    assert Page(html).headings == ["TensorRT engines", "Attention that is not TensorRT's own"]
    assert "2 in FP32: two products and a softmax<br>1 of &lt;script&gt;" in html
    assert "<br>1 in FP32: a kernel of our own</div>" in html
    assert "is fused" not in html
    assert Page(html).table("TensorRT engines")[1][6:] == ["–", "–", "–", "10"]
    assert engines_section(manifest({})) == ""


def test_loops_are_shown_with_their_kernels_a_step() -> None:
    """Without its steps a loop is named alone; of what is no loop nothing is shown."""
    fused = profile("all", int8={"products": 6, "of": 6, "dequantized": []}, alone=[])
    looped = {**fused, "loops": [{"kernels": 17, "steps": 8}, {"kernels": 16, "steps": 8}]}
    html = engines_section(manifest({"rtx-sm89": engine("rtx-sm89", looped, fused)}))
    assert Page(html).headings == ["TensorRT engines", "Loops"]
    assert "<div>2 loops of 2.1 kernels a step</div>" in html
    for steps in (None, 0, EVIL):
        unknown = {**fused, "loops": [{"kernels": 17, "steps": steps}]}
        assert "<div>a loop</div>" in engines_section(manifest({"rtx-sm89": engine("rtx-sm89", unknown, fused)}))
    for strange in (EVIL, [EVIL], [{"kernels": EVIL, "steps": 1}], [{"steps": 4}], {"kernels": 3}):
        html = engines_section(manifest({"rtx-sm89": engine("rtx-sm89", {**fused, "loops": strange}, fused)}))
        assert Page(html).headings == ["TensorRT engines"]


def test_a_bar_has_its_kinds_side_by_side_on_one_scale() -> None:
    def longer(fields: Words) -> None:
        for each in fields.values():
            each["graphs"]["decoder"]["profiles"][0]["kernels"] = 20  # ten more, without names

    html = drawn(longer)
    rows = re.findall(r"<svg.*?</svg>", html)
    assert len(rows) == 3  # prefill of SM75, prefill of the others, decode of all
    found = re.findall(r'<rect x="([\d.]+)%" width="([\d.]+)%" [^>]*><title>([^<]*)</title>', rows[1])
    assert found == [
        ("0.00", "10.00", "fused attention: 2"), ("10.00", "15.00", "integer products: 3"),
        ("25.00", "5.00", "other products: 1"), ("30.00", "10.00", "fused elementwise: 2"),
        ("40.00", "5.00", "data movement: 1"), ("45.00", "5.00", "single steps: 1"),
        ("50.00", "50.00", "not named: 10"),
    ]  # fmt: skip
    assert sum(float(width) for width in re.findall(r' width="([\d.]+)%" y', rows[2])) == pytest.approx(50)
    assert re.findall(r"</i>([^<]*)</span>", html) == [*KINDS]
    assert 'aria-label="decoder, decode: 10 kernels by kind"' in rows[2]


def test_every_kind_has_a_look_and_the_page_has_it() -> None:
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    assert LOOKS.keys() == {*KINDS}
    for colour, _, letters in LOOKS.values():
        assert f"svg .{colour} " in style
        assert f"svg text.{letters} " in style


def test_kernels_stand_by_name_in_folded_lists() -> None:
    page = Page(drawn())
    lists = [rows for _, rows in page.tables if rows[0] == ["kernels", "what", "name"]]
    assert len(lists) == 3
    assert lists[0][1:3] == [
        ["2", "fused attention", "_gemm_mha_v2"],
        ["1", "integer products", "MatMul_a.product+MatMul_b.product [profile 1]+MatMul_c.product"],
    ]
    assert "10 kernels of decoder, decode for rtx-sm75, rtx-sm86, tensorrt" in "".join(page.text)
    assert page.html.count("<details>") == 3


def test_serial_numbers_do_not_part_equal_engines() -> None:
    def serials(fields: Words) -> None:
        for number, each in enumerate(fields.values()):
            each["graphs"]["decoder"]["profiles"] = [profile("all", alike={f"copy_h2d___mye{number}": 1})]

    html = drawn(serials)
    assert html.count("<svg") == 1
    assert "decoder <small>rtx-sm75, rtx-sm86, tensorrt</small>" in html


def everywhere(value: Any) -> Callable[[Words], object]:
    """Puts ``value`` in the place of every leaf, and every key's name beside it."""

    def replaced(recorded: Any) -> Any:
        if isinstance(recorded, dict):
            return {key: replaced(each) for key, each in recorded.items()} | {EVIL: value}
        return [replaced(each) for each in recorded] + [value] if isinstance(recorded, list) else value

    return lambda fields: fields.update({target: replaced(each) for target, each in fields.items()})


def of_all(**changes: Any) -> Callable[[Words], object]:
    def change(fields: Words) -> None:
        for each in fields.values():
            each["graphs"]["decoder"]["profiles"] = [profile("all", **changes)]

    return change


def test_what_the_log_does_not_tell_is_no_shortfall() -> None:
    fields = engine("rtx-sm86", profile("prefill", attention=STRANGE), profile("decode"))
    html = engines_section(manifest({"rtx-sm86": fields}))
    assert "Not understood in the builder&#39;s log" in html or "Not understood in the builder's log" in html
    assert "<code>attend_1</code>" in html
    assert "Attention in several kernels" not in html


STRANGE = {"fused": 1, "of": 2, "unfused": [], "not_understood": {"attend_1": "the layer '_flash' of kind 'kgen'"}}
MILLION = 10**6
HOSTILE: dict[str, Callable[[Words], object]] = {
    **{f"{type(odd).__name__} {odd!r:.20} everywhere": everywhere(odd)
       for odd in (EVIL, None, True, -1, 2**63, 10**400, 1e308, 5e-324, [], {}, [[None]], {EVIL: EVIL})},
    "words for objects": lambda w: w.update({"rtx-sm86": EVIL, EVIL: {"plans": EVIL}, "x": {"plans": {EVIL: EVIL}}}),
    "graphs of nonsense": lambda w: w["rtx-sm86"].update(graphs=EVIL, sm=EVIL, library=EVIL, version=EVIL),
    "profiles of nonsense": lambda w: w["rtx-sm86"]["graphs"]["decoder"].update(profiles=[EVIL, None, 1, {EVIL: 1}]),
    "very many targets": lambda w: w.update({f"rtx-sm{i}": w["rtx-sm86"] for i in range(9999)}),
    "very many profiles": lambda w: w["rtx-sm75"]["graphs"]["decoder"].update(profiles=[profile("p")] * MILLION),
    "a million kernels by name": of_all(alike=dict.fromkeys(map(str, range(MILLION)), 1)),
    "a million unfused": of_all(attention={"fused": 0, "of": MILLION, "unfused": ["a"] * MILLION}),
    "a million not understood": of_all(
        attention={"fused": 0, "of": MILLION, "not_understood": {f"{EVIL}{i}": EVIL for i in range(MILLION)}}
    ),
    "not understood nonsense": of_all(gelu={"fused": 0, "of": 2, "not_understood": [EVIL]}),
    "a million dequantised": of_all(int8={"products": 0, "of": MILLION, "dequantized": ["a"] * MILLION}),
    "a million alone": of_all(alone=["&" * 1000] * MILLION),
    "names of markup": of_all(alike={f"{EVIL}{i}": 1 for i in range(2000)}, alone=[EVIL] * 99),
    "long names": of_all(alike={f"{i}{'&' * 10**5}": 1 for i in range(99)}),
    "vast counts": of_all(alike={"_gemm_mha_v2": 2**63 - 1, "b": 2**63 - 1}, kernels=2**63 - 1),
    "more fused than there are": of_all(attention={"fused": 9, "of": 2}, int8={"products": -1, "of": 2}),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_figures_give_harmless_markup(change: Callable[[Words], object]) -> None:
    fields = copy.deepcopy(ENGINES)
    change(fields)
    started = time.process_time()
    html = engines_section(manifest(fields))
    assert time.process_time() - started < 3
    page = Page(html)
    assert "<script" not in html
    assert len(html) < 400_000
    assert not set("\x00\x1b\u202e") & set(html)
    assert not {"nan", "inf", "None"} & set(re.findall(r"\w+", "".join(page.text)))
    assert not re.search(r'"-?(nan|inf)', html)


def test_damaged_figures_give_harmless_markup() -> None:
    rng = Random(0)
    for _ in range(100):
        fields = mutated(ENGINES, rng)
        assert not re.search(r'"-?(nan|inf)', Page(engines_section(manifest(fields))).html)


def test_the_page_of_a_bundle_with_engines(vit_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan is read for the report: any file of the bundle can stand for one."""
    monkeypatch.setattr(report_module, "RUNS", 2)
    monkeypatch.setattr(report_module, "WARMUP", 0)

    def built(fields: Words) -> None:
        text = json.dumps(engine("rtx-sm86", profile("all"), profile("all")))
        recorded = json.loads(text.replace("decoder", "model"))
        fields["engines"] = {"rtx-sm86": {**recorded, "plans": {"model": "golden.safetensors"}}}

    out, bundle = tmp_path / "report.html", changed_bundle(vit_bundle, tmp_path, built)
    write_report(bundle, [], out)
    page = Page(out.read_text(encoding="utf-8"))
    assert page.headings.index("Score") < page.headings.index("TensorRT engines") < page.headings.index("Size")
    assert page.table("TensorRT engines")[1][:4] == ["rtx-sm86", "Ampere: RTX 30, A10", "model", "all"]
