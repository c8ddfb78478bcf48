"""The peers: environments, pinned versions, variants, and which models each variant has."""

from __future__ import annotations

from dataclasses import dataclass

from bench.workloads import WORKLOADS

ENCODERS = ("bert", "vit", "clip")
DECODERS = ("gpt", "transformer")
ALL = (*ENCODERS, *DECODERS)
FP32, BF16, INT8, INT4 = "fp32", "bf16", "int8", "int4"
PRECISIONS = (FP32, BF16, INT8, INT4)


@dataclass(frozen=True)
class Variant:
    """A way of running a model, its number format, its name in tables. ``saturates``: only there where sums do."""

    name: str
    precision: str
    label: str
    models: tuple[str, ...]
    saturates: bool = False


@dataclass(frozen=True)
class Peer:
    """A tool. ``requirements`` are pip's, for an environment of its own; none: this project's environment."""

    name: str
    title: str
    variants: tuple[Variant, ...]
    requirements: tuple[str, ...] = ()
    module: str = ""
    ours: bool = False

    @property
    def worker_module(self) -> str:
        return self.module or self.name


# This project's bundles executed by ONNX Runtime, where its own kernels would be chosen.
BY_ONNXRUNTIME = {"fp32-onnxruntime": FP32, "int8-onnxruntime": INT8}


def own(name: str, title: str) -> Peer:
    """Return this project, or an earlier installation of it, which has no kernels to choose from."""
    ours = name == "transom"
    variants = (
        Variant(FP32, FP32, "FP32", ALL),
        Variant(INT8, INT8, "INT8", ALL),
        *(Variant(key, kind, f"{kind.upper()}, ONNX Runtime", ALL) for key, kind in BY_ONNXRUNTIME.items() if ours),
        Variant("int8-saturating", INT8, "INT8, saturating sums", ALL, saturates=True),
        Variant(INT4, INT4, "INT4 weights", ("gpt",)),
    )
    return Peer(name, title, variants, ours=ours)


PEERS = (
    own("transom", "Transom"),
    own("earlier", "Transom, earlier"),
    Peer(
        "pytorch",
        "PyTorch",
        (
            Variant("fp32", FP32, "eager", ALL),
            Variant("fp32-compiled", FP32, "compiled", (*ENCODERS, "gpt")),
            Variant("bf16", BF16, "eager", DECODERS),
            Variant("bf16-compiled", BF16, "compiled", ENCODERS),
            Variant("int8", INT8, "dynamic", (*ENCODERS, "transformer")),
        ),
    ),
    Peer(
        "onnxruntime",
        "ONNX Runtime on our FP32 graph",
        (
            Variant("fp32", FP32, "FP32", ENCODERS),
            Variant("dynamic", INT8, "dynamic", (*ENCODERS, "transformer")),
            Variant("dynamic-saturating", INT8, "dynamic, saturating sums", (*ENCODERS, "transformer"), saturates=True),
            Variant("static", INT8, "static Q/DQ", ENCODERS),
        ),
    ),
    Peer(
        "handlaid",
        "ONNX Runtime, hand-laid graph",
        (
            Variant("fp32", FP32, "FP32", ("gpt",)),
            Variant("dynamic", INT8, "dynamic", ("gpt",)),
            Variant("dynamic-saturating", INT8, "dynamic, saturating sums", ("gpt",), saturates=True),
            Variant("nbits8", INT8, "MatMulNBits, 8 bits", ("gpt",)),
            Variant("nbits4", INT4, "MatMulNBits, 4 bits", ("gpt",)),
        ),
    ),
    Peer(
        "openvino",
        "OpenVINO",
        (
            Variant("fp32", FP32, "FP32", ALL),
            Variant("bf16", BF16, "BF16", ALL),
            Variant("int8", INT8, "NNCF", ALL),
            Variant("int8-bf16", INT8, "NNCF, BF16 elsewhere", ENCODERS),
        ),
        ("openvino==2026.4.1", "nncf==3.4.0"),
    ),
    Peer(
        "ctranslate2",
        "CTranslate2",
        (
            Variant("fp32", FP32, "FP32", ("bert", "gpt", "transformer")),
            Variant("int8", INT8, "INT8", ("bert", "gpt", "transformer")),
        ),
        ("ctranslate2==4.8.5",),
    ),
    Peer(
        "llamacpp",
        "llama.cpp",
        (
            Variant("f32", FP32, "F32", ("gpt",)),
            Variant("q8_0", INT8, "Q8_0", ("gpt",)),
            Variant("q4_0", INT4, "Q4_0", ("gpt",)),
        ),
        ("xllamacpp==2026.10.11549", "gguf==0.19.0"),
    ),
)
BY_NAME = {peer.name: peer for peer in PEERS}
MODELS = tuple(dict.fromkeys(workload.model for workload in WORKLOADS.values()))
