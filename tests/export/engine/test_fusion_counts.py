"""What fuses, by family, precision and GPU: counts that no change of a pass, an export or a library moves unseen.

The weights are the reference models'. An FP32 bundle is carried to a precision by what an export carries it with, less
the parity and the gate, which have tests of their own; integers are calibrated on eight samples, for what becomes a
kernel does not depend on the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from command_line import as_quantized
from conftest import export_to, reference
from rtx import counted, needs_rtx
from transom.calib.data import MIN_SAMPLES, open_calibration_data
from transom.export.bundle_graphs import canonical_graphs
from transom.export.bundle_writer import BundleWriter
from transom.export.engine.build import Engine, engine_of
from transom.export.engine.build_process import build_engine
from transom.export.engine.evidence import Evidence
from transom.export.engine.profiles import profiles_of
from transom.export.engine.targets import find_targets
from transom.export.engine.trt_graphs import tensorrt_graphs
from transom.export.quantization.calibrate import calibrate
from transom.export.quantization.options import DEFAULTS
from transom.export.quantization.quantizer import Quantizer
from transom.export.reference_models import REFERENCE_MODELS
from transom.export.variants import Variants, make_variants
from transom.runtime.bundle import Bundle, read_manifest
from transom.runtime.manifest_graphs import graph_to_json

Once = Callable[[str, Callable[[Path], object]], Path]


class Pin(NamedTuple):
    """One profile of one graph: attentions and GELUs, all of them fused; products, in int8 all of integers; kernels."""

    family: str
    graph: str
    profile: str
    attention: int
    gelu: int
    products: int
    fp16: int  # kernels
    bf16: int
    int8: int


# Reference models that have no kind of layer that another has are left out: MiniLM, the Perceiver of bytes (whose heads
# of two widths tests/families builds), seq2seq without attention (as well)
PINS = (
    # of                               attention GELU products | kernels: fp16, bf16 (of families IN_BF16), int8
    Pin("vit", "model", "all", 3, 3, 19, 38, 38, 42),
    Pin("bert", "model", "all", 4, 5, 26, 61, 61, 65),
    Pin("gpt", "decoder", "prefill", 4, 4, 25, 58, 58, 63),
    Pin("gpt", "decoder", "decode", 4, 4, 25, 40, 40, 47),
    Pin("transformer", "encoder", "all", 2, 0, 16, 36, 36, 38),
    Pin("transformer", "decoder", "prefill", 4, 0, 17, 55, 55, 57),
    Pin("transformer", "decoder", "decode", 4, 0, 17, 31, 31, 39),
    Pin("clip", "image", "all", 3, 0, 19, 42, 42, 42),
    Pin("clip", "text", "all", 2, 0, 13, 29, 29, 30),
    Pin("seq2seq", "encoder", "all", 0, 0, 2, 33, 31, 34),
    Pin("seq2seq", "decoder", "decode", 0, 0, 10, 15, 15, 16),
    Pin("perceiver", "model", "all", 5, 6, 35, 68, 68, 75),  # beside the single query of the output, decomposed
    Pin("show_attend_tell", "encoder", "all", 0, 0, 4, 15, 17, 16),
    Pin("show_attend_tell", "decoder", "decode", 0, 0, 8, 15, 15, 17),
    Pin("flamingo", "encoder", "all", 5, 3, 34, 69, 69, 74),
    Pin("flamingo", "decoder", "prefill", 6, 4, 33, 81, 81, 88),  # two of them gated cross-attention
    Pin("flamingo", "decoder", "decode", 6, 4, 33, 55, 55, 68),
    Pin("swin", "model", "all", 4, 4, 26, 56, 56, 61),
    Pin("swinv2", "model", "all", 4, 4, 26, 65, 65, 70),
    Pin("vit_hybrid", "model", "all", 2, 2, 15, 70, 71, 75),  # 13 linear layers and two convolutions
)
MORE = {("rtx-sm86", "transformer", "prefill"): 2}  # kernels than elsewhere
FP32 = Pin("vit", "model", "all", 0, 3, 0, 53, 53, 53)  # products and a softmax, in which there is nothing to fuse
TARGETS = ("rtx-sm86", "rtx-sm89", "rtx-sm120")
THREE_TARGETS = ("vit", "gpt", "transformer", "clip", "swin")  # one of each kind of layer; tests/families has more
# Kernels of BF16 are those of FP16 but for recurrent layers and convolutions
IN_BF16 = ("vit", "gpt", "seq2seq", "show_attend_tell", "vit_hybrid")

BUNDLES = {"vit": "vit_bundle", "gpt": "gpt_bundle", "transformer": "dates_bundle", "clip": "clip_bundle"}
BUNDLES |= {"flamingo": "flamingo_bundle"}


pytestmark = needs_rtx


def fp32_bundle(family: str, request: pytest.FixtureRequest, once: Once) -> Path:
    if family in BUNDLES:
        return Path(request.getfixturevalue(BUNDLES[family]))
    return once(f"{family}-reference", lambda folder: export_to(folder, reference(family))) / "bundle"


def converted(bundle: Bundle, family: str, precision: str, folder: Path) -> Bundle:
    """The bundle's graphs in ``precision``, as an export would write them."""
    fields = read_manifest(bundle.folder)
    for left_out in ("tokenizer", "target_tokenizer", "format", "format_version"):
        fields.pop(left_out, None)
    variants = variants_of(bundle, family, precision)
    fields |= {"precision": precision, "graphs": [graph_to_json(graph) for graph in variants.graphs]}
    if precision == "int8":
        as_quantized(fields)
    writer = BundleWriter(folder)
    for name, data in variants.files.items():
        writer.add(name, data)
    writer.describe(fields)
    return Bundle(folder)


def variants_of(bundle: Bundle, family: str, precision: str) -> Variants:
    canonical, graphs = canonical_graphs(bundle), tuple(file.graph for file in bundle.manifest.graphs)
    if precision != "int8":
        return make_variants(canonical, graphs, precision)
    data = open_calibration_data((REFERENCE_MODELS[family].calibration_set,))
    config = DEFAULTS.config(precision, graphs)
    few = replace(data, samples=data.samples[:MIN_SAMPLES], entries=data.entries[:MIN_SAMPLES])
    table = calibrate(bundle, canonical, config, few, smooth=False, report=lambda _: None)
    ranges = {
        name: {tensor: found.histogram for tensor, found in graph.tensors.items()}
        for name, graph in table.graphs.items()
    }
    return Quantizer(canonical, graphs, config, ranges).variants()


def engines_of(bundle: Bundle, targets: Sequence[str]) -> list[Engine]:
    """Every graph for every target."""
    engines, graphs = [], tensorrt_graphs(bundle)
    for file in bundle.manifest.graphs:
        name, graph = file.graph.name, graphs[file.graph.name]
        profiles, model = profiles_of(file.graph, bundle.manifest.axes), graph.serialized()
        for target in find_targets(targets):
            engines.append(
                engine_of(target, name, graph, build_engine(name, model, profiles, target), profiles, 0.0, Evidence())
            )
    return engines


def require_pinned(
    bundle: Bundle, pins: Mapping[tuple[str, str], Pin], precision: str, targets: Sequence[str] = TARGETS
) -> None:
    engines = engines_of(bundle, targets)
    found = {(e.target, e.graph, fusion.profile): fusion for e in engines for fusion in e.fusions}
    assert {*found} == {(target, *profile) for target in targets for profile in pins}
    for (target, graph, profile), fusion in found.items():
        pin = pins[graph, profile]
        products = pin.products if precision == "int8" else 0
        kernels = getattr(pin, precision, pin.fp16) + MORE.get((target, pin.family, profile), 0)
        counts = {
            "attention": (fusion.attention, fusion.attentions),
            "GELU": (fusion.gelus_fused, fusion.gelus),
            "integer products": (fusion.int8, fusion.linears),
            "kernels": fusion.kernels,
        }
        assert counts == {
            "attention": (pin.attention, pin.attention),
            "GELU": (pin.gelu, pin.gelu),
            "integer products": (products, products),
            "kernels": counted(kernels),
        }, (target, graph, profile, fusion.unfused, fusion.dequantized)


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        (family, precision)
        for family in dict.fromkeys(pin.family for pin in PINS)
        for precision in ("fp16", "bf16", "int8")
        if precision != "bf16" or family in IN_BF16
    ],
)
def test_everything_fuses(
    family: str,
    precision: str,
    request: pytest.FixtureRequest,
    once: Once,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = converted(Bundle(fp32_bundle(family, request, once)), family, precision, tmp_path)
    pins = {(pin.graph, pin.profile): pin for pin in PINS if pin.family == family}
    three = family in THREE_TARGETS and precision != "bf16"
    require_pinned(bundle, pins, precision, TARGETS if three else TARGETS[:1])


def test_fp32_has_no_attention_to_fuse(vit_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    require_pinned(Bundle(vit_bundle), {("model", "all"): FP32}, "fp32")
