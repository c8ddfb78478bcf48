"""What the builder's log says became of a graph: kernels, profiles, attention, GELU, integers; and the targets."""

from __future__ import annotations

import pytest

from builder_logs import layer
from transom.cli.build import print_kernels
from transom.cli.inspect_bundle import fusion_text
from transom.export.engine.build import Engine, require_fused
from transom.export.engine.build_log import Fusion, Loop, fusion_of, kernels_of, loops_of, memory_of
from transom.export.engine.profiles import cache_sizes, profiles_of
from transom.export.engine.targets import TARGETS, find_targets, require_precision
from transom.runtime.errors import EngineError, ExportError
from transom.runtime.graph_spec import Axis, Graph, Tensor

LOG = [
    "Parsing node: attend [Attention]",
    layer("__mye1_0_myl0_0", kind="shape_call"),
    layer("up.product_myl0_1", "up", "DequantizeLinear_up", kind="gemm", dtype="Int8"),
    layer("__myl_AddErf_myl0_2", "up", "bias", "gelu", "quantize"),
    layer("_gemm_mha_v2_myl0_3", "attend"),
    layer("__myl_CastMulFc_myl0_4", "down", kind="runtime_fusion"),
    layer("__myl_Repl_myl0_5", "expand"),
    layer("[ShapeHostToDeviceCopy 0] [profile 1]", kind="ShapeHostToDevice"),
    layer("up.product [profile 1]_myl3_1", "up", kind="gemm", dtype="Int8"),
    layer("__myl_Erf_myl3_2", "gelu"),
    layer("__myl_Mul_myl3_3", "attend", "bias"),
    layer("down.product [profile 1]_myl3_4", "down", kind="gemm", dtype="Int8"),
    "Total Activation Memory: 100 bytes",
    "Total Activation Memory: 300 bytes",
    "Total Weights Memory: 7 bytes",
]
OPERATORS = {
    "up": "MatMul",
    "down": "MatMul",
    "attend": "Attention",
    "gelu": "Gelu",
    "expand": "Expand",
    "bias": "Add",
}


def test_layers_are_counted_by_profile() -> None:
    prefill, decode = (
        fusion_of(name, kernels, OPERATORS, ["up", "down"])
        for name, kernels in zip(("prefill", "decode"), kernels_of(LOG, 2), strict=True)
    )
    assert prefill.summary() == "prefill: attention 1 of 1, GELU 1 of 1, INT8 1 of 2, 5 kernels"
    assert (prefill.unfused, prefill.dequantized, prefill.unfused_nodes) == ((), ("down",), ("expand",))
    assert decode.summary() == "decode: attention 0 of 1, GELU 0 of 1, INT8 2 of 2, 4 kernels"
    assert (decode.unfused, decode.dequantized, decode.unfused_nodes) == (("attend",), (), ("gelu",))
    assert dict(prefill.kernel_counts)["up.product"] == 1  # by name without a serial number
    assert "up.product" in decode.kernel_counts
    assert decode.to_json()["attention"] == {"fused": 0, "of": 1, "unfused": ["attend"]}
    assert memory_of(LOG) == {"activation": 300, "weights": 7}


UNROLLED = "__myl_SlicAddSigmTanhSele"
LOOP = [  # of two steps a pass, and of one for what is left; before it a product, behind it a copy of its output
    layer("copy_d2h___mye3_myl0_0", kind="copy"),
    layer("__myl_FcAdd_myl0_1", "products", kind="runtime_fusion"),
    layer("cbr__mye9_myl0_2", kind="cjmp"),
    layer("init_hvar^7i64_myl0_3", kind="memset"),
    layer("__mye8_zero_trip_check_myl0_4", kind="cjmp"),
    layer("__myl_Cast_myl0_5"),
    layer("__mye14_unroll0_myl0_6", kind="gemm"),
    layer(f"{UNROLLED}_myl0_7"),
    layer("__mye15_unroll1_myl0_8", kind="gemm"),
    layer(f"{UNROLLED}_myl0_9"),
    layer("adv_off^hvar^7i64_myl0_10", kind="add"),
    layer("clp___mye9_myl0_11", kind="cjmp"),
    layer("__mye8_zero_trip_myl0_12", kind="cjmp"),
    layer("__mye11_init_myl0_13", kind="copy"),
    layer("__myl_FcCast_myl0_14", "scan.recurrent", kind="runtime_fusion"),
    layer(f"{UNROLLED}_myl0_15", "scan.gate", "scan.sum"),
    layer("__mye8_remaining_cloop_myl0_16", kind="cjmp"),
    layer("__myl_Slic_myl0_17", "outputs"),
]


def test_a_loop_is_counted_once_and_without_what_counts_its_steps() -> None:
    """Five kernels for two steps; jumps, addresses and the step's number are none."""
    (kernels,) = kernels_of(LOOP, 1)
    operators = {"products": "MatMul", "scan": "Scan", "scan.recurrent": "MatMul", "outputs": "Slice"}
    found = fusion_of("all", kernels, operators, [])
    assert found.loops == (Loop(kernels=5, steps=2),)
    assert found.summary() == "all: a loop of 2.5 kernels a step, 10 kernels"
    assert found.to_json()["loops"] == [{"kernels": 5, "steps": 2}]
    assert found.kernel_counts["__mye_unroll"] == 2  # products of two steps are equal kernels
    assert found.unfused_nodes == ("outputs",)
    assert fusion_text(found.to_json()) == found.summary()
    assert "loops" not in fusion_of("all", kernels[:2], operators, []).to_json()


def test_a_loop_whose_product_is_no_kernel_of_its_own() -> None:
    """How many steps a pass takes is then not known."""
    log = [line for line in LOOP if "unroll" not in line and "FcCast" not in line]
    (kernels,) = kernels_of(log, 1)
    assert loops_of(kernels) == (Loop(3, None),)
    found = fusion_of("all", kernels, {}, [])
    assert found.to_json()["loops"] == [{"kernels": 3, "steps": None}]
    assert found.summary() == fusion_text(found.to_json()) == "all: a loop, 7 kernels"


def test_a_loop_that_is_not_unrolled_takes_one_step_a_pass() -> None:
    """As of a GRU that stays one: two products a step. A second loop is not counted as the rest of the first."""
    body = [layer(f"loop^{n} [Matrix Multiply]_myl0_{n}", kind="gemm") for n in range(2)]
    jumps = [
        layer(f"{name}__mye{n}_myl0_9", kind="cjmp") for n, name in ((1, "cbr"), (2, "clp_"), (3, "cbr"), (4, "clp_"))
    ]
    (kernels,) = kernels_of([jumps[0], *body, jumps[1], jumps[2], *body[:1], jumps[3]], 1)
    found = fusion_of("all", kernels, {"gru": "GRU"}, [])
    assert found.loops == (Loop(2, 1), Loop(1, 1))
    assert found.summary() == "all: 2 loops of 1.5 kernels a step, 3 kernels"


def renamed(log: list[str], **names: str) -> list[str]:
    """The log of a version that calls things otherwise."""
    for old, new in names.items():
        log = [line.replace(old, new) for line in log]
    return log


def fusion(log: list[str]) -> Fusion:
    (kernels,) = kernels_of(log, 1)
    return fusion_of("all", kernels, OPERATORS, ["up", "down"])


ONE_PROFILE = LOG[:7]


def test_names_that_are_not_known_are_no_verdict() -> None:
    """Another name of the fused kernel, of the node, or of every layer: neither fused nor not, with what was seen."""
    sound = fusion(ONE_PROFILE)
    assert (sound.attention, sound.unfused, sound.unrecognized) == (1, (), {})
    assert "not_understood" not in sound.to_json()["attention"]

    kernel = fusion(renamed(ONE_PROFILE, _gemm_mha_v2="_flash_fwd"))
    assert (kernel.attention, kernel.unfused) == (0, ())
    assert kernel.unrecognized_attention == {"attend": "the layer '_flash_fwd' of kind 'kgen'"}
    assert kernel.summary() == "all: attention 0 of 1 (1 not understood), GELU 1 of 1, INT8 1 of 2, 5 kernels"
    assert kernel.to_json()["attention"] == {
        "fused": 0, "of": 1, "unfused": [], "not_understood": {"attend": "the layer '_flash_fwd' of kind 'kgen'"}
    }  # fmt: skip

    node = fusion(renamed(ONE_PROFILE, **{"ONNX Layer": "ONNX Node"}))
    assert node.unrecognized == dict.fromkeys(("attend", "gelu", "up", "down"), "no layer names it")
    assert (node.unfused, node.dequantized, node.gelus_fused, node.int8) == ((), (), 0, 0)

    nothing = fusion(renamed(ONE_PROFILE, LayerType="Kind"))
    assert nothing.kernels == 0
    assert nothing.unrecognized == dict.fromkeys(("attend", "gelu", "up", "down"), "no layer was found in the log")

    product = fusion(renamed(ONE_PROFILE, **{"LayerType: gemm": "LayerType: igemm"}))
    assert (product.int8, product.dequantized) == (
        0,
        ("down",),
    )  # a kernel of steps is known to be no product of integers
    assert product.unrecognized_linears == {"up": "the layer 'up.product' of kind 'igemm'"}


def test_attention_in_kernels_that_are_known_is_not_fused() -> None:
    """Steps of the compiler and products: however many other layers are strange, this one is understood."""
    log = [
        *ONE_PROFILE[:4],
        layer("attend_scores_myl0_3", "attend", kind="gemm"),
        layer("__myl_MaxrSubExp_myl0_4", "attend"),
        layer("strange_myl0_5", "expand", kind="new"),
        layer("__myl_CastMulFc_myl0_6", "down", kind="runtime_fusion"),
    ]
    found = fusion(log)
    assert (found.attention, found.unfused, found.unrecognized) == (0, ("attend",), {})
    mixed = fusion([*log, layer("_flash_fwd_myl0_7", "attend")])
    assert (mixed.unfused, [*mixed.unrecognized]) == ((), ["attend"])


def test_a_log_that_is_not_understood_fails_the_build_in_words_of_its_own() -> None:
    def engine(*fusions: Fusion) -> Engine:
        return Engine("rtx-sm86", "model", 1, 0.0, fusions, {}, {}, {}, {})

    strange, lost = (
        fusion(renamed(ONE_PROFILE, _gemm_mha_v2="_flash_fwd")),
        fusion(renamed(ONE_PROFILE, _gemm_mha_v2="__myl_Fc")),
    )
    require_fused(engine(fusion(ONE_PROFILE)))
    with pytest.raises(
        EngineError, match=r"0 of 1 attentions became one kernel each in the profile all; attend did not\."
    ):
        require_fused(engine(strange, lost))
    said = (
        r"^whether attention fused in the graph 'model' for rtx-sm86 is not understood: .* of attend the layer "
        r"'_flash_fwd' of kind 'kgen'\. Nothing was written\. Upgrade Transom, or build with TensorRT-RTX 1\.7, "
        r".* or give --allow-unfused to take the engine as it is\.$"
    )
    with pytest.raises(EngineError, match=said):
        require_fused(engine(fusion(ONE_PROFILE), strange))


def test_reports_tell_what_is_not_understood(capsys: pytest.CaptureFixture[str]) -> None:
    strange = fusion(renamed(ONE_PROFILE, _gemm_mha_v2="_flash_fwd"))
    assert fusion_text(strange.to_json()) == strange.summary()
    print_kernels(Engine("rtx-sm86", "model", 1, 0.0, (strange,), {}, {}, {}, {}))
    told = capsys.readouterr().out
    assert "not understood, which is neither fused nor not: of attend the layer '_flash_fwd'" in told
    assert "attention that is not one kernel" not in told


def test_several_groups_of_one_profile_are_told_by_the_marks() -> None:
    log = [
        layer("a_myl0_1", "up"),
        layer("b_myl1_1", "up"),
        layer("c [profile 1]_myl2_1", "up"),
        layer("d_myl2_2", "up"),
    ]
    assert [[kernel.name[0] for kernel in kernels] for kernels in kernels_of(log, 2)] == [["a", "b"], ["c", "d"]]


def test_targets_by_name() -> None:
    assert [*TARGETS] == [*(f"rtx-sm{sm}" for sm in (75, 80, 86, 89, 120, 121)), "tensorrt"]
    assert [target.name for target in find_targets(["rtx-sm89", "tensorrt", "rtx-sm89"])] == ["rtx-sm89", "tensorrt"]
    with pytest.raises(ExportError, match=r"--target is 'rtx-sm90'; expected one or several of rtx-sm75, .*tensorrt\."):
        find_targets(["rtx-sm86", "rtx-sm90"])
    with pytest.raises(ExportError, match="--target is missing"):
        find_targets([])


@pytest.mark.parametrize(
    ("target", "precision", "elsewhere", "said"),
    [
        ("rtx-sm75", "bf16", "bf16", "Turing has no BF16 arithmetic"),
        ("rtx-sm75", "fp32", "fp32", "no FP32 matrix product for Turing"),
        ("rtx-sm75", "int8", "fp32", "cannot run int8 beside fp32"),
        ("rtx-sm86", "int4", "fp32", "MatMulNBits"),
    ],
)
def test_precisions_that_a_target_does_not_have(target: str, precision: str, elsewhere: str, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        require_precision(TARGETS[target], precision, elsewhere)
    require_precision(TARGETS["rtx-sm75"], "int8", "fp16")
    require_precision(TARGETS["rtx-sm80"], "bf16", "bf16")


def test_profiles_of_an_encoder_and_of_a_decoder() -> None:
    """A decoder's cache has its greatest length in both; a step has one token and one position per row."""
    axes = {"B": Axis(1, 2, 4), "S": Axis(1, 16, 32), "C": Axis(1, 8, 32, "S"), "P": Axis(1, 1, 32, "S")}
    encoder = Graph("model", (Tensor("input_ids", "int64", ("B", "S")),), (Tensor("y", "float32", ("B", 5)),))
    (profile,) = profiles_of(encoder, axes)
    assert (profile.name, profile.shapes) == ("all", {"input_ids": ((1, 1), (2, 16), (4, 32))})
    decoder = Graph(
        "decoder",
        (
            Tensor("input_ids", "int64", ("B", "S")),
            Tensor("logits_positions", "int64", ("B", "P")),
            Tensor("key_cache.0", "float32", ("B", 3, "C", 8), state=True),
        ),
        (Tensor("key_cache.0.written", "float32", ("B", 3, "C", 8), state=True, aliases="key_cache.0"),),
    )
    assert cache_sizes(decoder, axes) == {"C": 32}
    prefill, decode = profiles_of(decoder, axes)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.shapes["input_ids"] == ((1, 1), (2, 16), (4, 32))
    assert decode.shapes["input_ids"] == ((1, 1), (2, 1), (4, 1))
    assert decode.shapes["logits_positions"] == ((1, 1), (2, 1), (4, 1))
    for each in (prefill, decode):
        assert each.shapes["key_cache.0"] == ((1, 3, 32, 8), (2, 3, 32, 8), (4, 3, 32, 8))
