"""Checkpoints with random weights, made by transformers, and bundles exported from them once per run.

torch and transformers are imported where they are needed: xdist's controller and small selections of tests are not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cheap_traces import pytest_collection_finish as pytest_collection_finish
from cheap_traces import pytest_runtest_setup as pytest_runtest_setup
from cheap_traces import pytest_sessionfinish as pytest_sessionfinish
from time_limits import MAKING_S, within
from time_limits import pytest_fixture_setup as pytest_fixture_setup

# Where the run itself was started in the background, SIGINT is ignored, and every process that a test starts would
# inherit that; the tests of interruptions send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before anything imports huggingface_hub: no test reaches for the network; those of the hub set it themselves.
os.environ["HF_HUB_OFFLINE"] = "1"
# And before torch imports triton: our kernels are interpreted, on the CPU; what compiles them runs in its own process.
# With TRANSOM_KERNEL_DEVICE=cuda the kernel's tests run on a GPU, compiled and launched by Triton: `make test-gpu`.
if os.environ.get("TRANSOM_KERNEL_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.register_assert_rewrite(
    "attention_reference",
    "command_line",
    "decoder_definitions",
    "encoder_family",
    "recurrent_family",
    "row_independence",
    "tiny_models",
)

WORDS = """
the a of and to in is it that was for on are as with his they at be this have from or one had by word but
not what all were we when your can said there use an each which she do how their if will up other about out many then
them these so some her would make like him into time has look two more write go see number no way could people my than
first water been call who oil its now find long down day did get come made may part capital france paris city
"""


def vocabulary() -> list[str]:
    """A WordPiece vocabulary of 5 special tokens, every printable character, and some words."""
    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *WORDS.split()]


BERT = {  # head size 80, three layers, a prime intermediate size: nothing a kernel could like
    "vocab_size": len(vocabulary()),
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 203,
    "max_position_embeddings": 67,
}
VIT = {
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 203,
    "image_size": 20,
    "patch_size": 4,
}
CITIES = {0: "O", 1: "B-CITY", 2: "I-CITY", 3: "B-DAY"}
LABELLED: dict[str, dict[str, Any]] = {  # what a head has in ``exported`` unless the test says otherwise
    "BertForSequenceClassification": {"num_labels": 5},
    "BertForTokenClassification": {"id2label": CITIES, "label2id": {name: number for number, name in CITIES.items()}},
}

MakeCheckpoint = Callable[..., Path]
Exported = Callable[..., tuple[Path, Path]]
Once = Callable[[str, Callable[[Path], object]], Path]


GPT2 = {
    "vocab_size": 101,
    "n_positions": 67,
    "n_embd": 160,
    "n_layer": 3,
    "n_head": 2,
    "n_inner": 203,
    "bos_token_id": 1,
    "eos_token_id": 100,
}
MARIAN = {
    "vocab_size": 101,
    "max_position_embeddings": 67,
    "d_model": 160,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 203,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 77,
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": 100,
    "eos_token_id": 0,
    "decoder_start_token_id": 100,
    "forced_eos_token_id": 0,
}
CLIP = {  # each tower with other sizes
    "projection_dim": 37,
    "text_config": {
        "vocab_size": 518,
        "hidden_size": 120,
        "intermediate_size": 203,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 23,
        "bos_token_id": 516,
        "eos_token_id": 517,
        "pad_token_id": 517,
    },
    "vision_config": {**VIT, "hidden_size": 160},
}
KINDS = {"Bert": ("BertConfig", BERT), "ViT": ("ViTConfig", VIT), "GPT2": ("GPT2Config", GPT2)}
KINDS |= {"Marian": ("MarianConfig", MARIAN), "CLIP": ("CLIPConfig", CLIP)}


def save_checkpoint(
    folder: Path,
    architecture: str,
    *,
    seed: int = 0,
    tokenizer: bool = True,
    wordpiece: bool | None = None,
    shard: str = "5GB",
    kind: tuple[str, dict[str, Any]] | None = None,
    **config: Any,
) -> Path:
    """Write what ``save_pretrained`` writes.

    Weights are normal with deviation 0.2, larger than at initialisation, so that every layer matters. ``kind`` is the
    config's class in transformers and its sizes, those of KINDS by default. ``wordpiece`` adds ``vocabulary()``; BERT
    folders have it by default. CLIP's get a vocabulary and an image processor. ``tokenizer=False`` leaves them out.
    """
    import torch
    import transformers

    bert = architecture.startswith("Bert") if wordpiece is None else wordpiece
    known = [kind] if kind else [found for prefix, found in KINDS.items() if architecture.startswith(prefix)]
    assert known, f"no line in KINDS for {architecture}"
    config_class, defaults = known[0]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(getattr(transformers, config_class)(**{**defaults, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:  # Marian's are no parameters but sinusoids
                parameter.normal_(std=0.2)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    model.save_pretrained(folder, max_shard_size=shard)
    if bert and tokenizer:
        (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    if architecture.startswith("CLIP") and tokenizer:
        save_clip_processor(folder)
    return folder


def save_clip_processor(folder: Path) -> None:
    """Every byte, alone and at a word's end, two merges, and an image processor for 20x20 pixels."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), "th", "the</w>", "unused", "too"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 23}')
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **sizes})
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread_unless_asked() -> Iterator[None]:
    """Give a session one thread where no number is asked for: processes of a run share the cores; idle threads spin.

    That took a tenth of a run's time. Tests of more threads ask for them, and `make export` takes all cores.
    """
    from transom.runtime.backends.ort_library import onnxruntime

    class Session(onnxruntime().InferenceSession):  # type: ignore[misc]
        def __init__(self, model: Any, sess_options: Any = None, *more: Any, **named: Any) -> None:
            if sess_options is not None and sess_options.intra_op_num_threads == 0:
                sess_options.intra_op_num_threads = 1
            super().__init__(model, sess_options, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime(), "InferenceSession", Session)
        yield


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """``make_checkpoint("BertForMaskedLM", num_labels=5)`` -> a new folder, which the test may change."""

    def make(architecture: str, **options: Any) -> Path:
        return save_checkpoint(tmp_path_factory.mktemp(architecture), architecture, **options)

    return make


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Once]:
    """``once(name, make)`` -> a folder that ``make(folder)`` filled, once per run, whichever worker came first.

    Nobody may change what is in it: tests that damage something damage a copy. This is checked at the end.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared = Path(os.environ.get("TRANSOM_TEST_SHARED", shared))  # `make mutate` runs the tests many times
    shared.mkdir(exist_ok=True)
    used: set[str] = set()

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, finished = shared / name, shared / f"{name}.finished"
        with within(MAKING_S, f"making or waiting for {name}"), (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed half-way
                folder.mkdir()
                make(folder)
                finished.write_text(listing(folder))
        used.add(name)
        return folder

    yield get
    changed = [name for name in sorted(used) if listing(shared / name) != (shared / f"{name}.finished").read_text()]
    assert not changed, f"tests changed what they share: {', '.join(changed)}"


def listing(folder: Path) -> str:
    """Every file below the folder with its size and the time of its last change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "\n".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


@pytest.fixture(scope="session")
def exported(once: Once) -> Exported:
    """``exported("BertForTokenClassification")`` -> (checkpoint, bundle) in FP32, of at most 3 rows a call (B)."""

    def get(architecture: str, **config: Any) -> tuple[Path, Path]:
        config = LABELLED.get(architecture, {}) | config

        def make(folder: Path) -> None:
            export_to(folder, save_checkpoint(folder / "checkpoint", architecture, **config), max_sizes={"B": 3})

        key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
        folder = once(f"{architecture}-{key}", make)
        return folder / "checkpoint", folder / "bundle"

    return get


def export_to(folder: Path, source: Path | str, **options: Any) -> None:
    from transom.export.pipeline import export

    with pytest.MonkeyPatch.context() as patch:
        trace_once(patch)
        export(str(source), folder / "bundle", **options)


TRACES: dict[str, Any] = {}  # of this process, by the hash of what was traced


def trace_once(patch: pytest.MonkeyPatch) -> None:
    """Let exports of equal weights share one trace: of a tiny model, tracing is nearly the whole export."""
    from transom.export import pipeline

    trace = pipeline.onnx_from_module

    def copy_of_trace(module: Any, graph: Any, axes: Mapping[str, Any]) -> Any:
        weights = b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())
        plain = (bool, int, float, str, tuple)  # settings without weights: an activation, a pooling, a head's kind
        settings = [
            {name: value for name, value in vars(part).items() if isinstance(value, plain)} for part in module.modules()
        ]
        functions = [getattr(value, "__qualname__", "") for part in module.modules() for value in vars(part).values()]
        described = repr((graph, sorted(axes.items()), settings, functions))
        key = hashlib.sha256(weights + described.encode()).hexdigest()
        if key not in TRACES:
            TRACES[key] = trace(module, graph, axes)
        return TRACES[key].clone()

    patch.setattr(pipeline, "onnx_from_module", copy_of_trace)


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that export, but whose subject is not the tracing."""
    trace_once(monkeypatch)


@pytest.fixture(scope="session")
def bert_checkpoint(once: Once) -> Path:
    return once("bert-checkpoint", lambda folder: save_checkpoint(folder, "BertModel"))


@pytest.fixture(scope="session")
def shallow_bert(once: Once) -> Path:
    """The same checkpoint of one layer: for exports that nobody looks into."""
    return once("shallow-bert-checkpoint", lambda folder: save_checkpoint(folder, "BertModel", num_hidden_layers=1))


@pytest.fixture(scope="session")
def bert_bundle(bert_checkpoint: Path, once: Once) -> Path:
    """A tiny random BERT, feature-extraction, FP32, with a tokenizer."""
    return once("bert", lambda folder: export_to(folder, bert_checkpoint)) / "bundle"


@pytest.fixture(scope="session")
def vit_bundle(once: Once) -> Path:
    """The reference ViT, image-classification, FP32."""
    return once("vit", lambda folder: export_to(folder, "vit")) / "bundle"


@pytest.fixture(scope="session")
def int8_bundle(once: Once) -> Path:
    """The reference ViT, image-classification, INT8: calibrated, and its accuracy gated."""
    return once("int8-vit", lambda folder: export_to(folder, "vit", precision="int8")) / "bundle"


@pytest.fixture(scope="session")
def dates_bundle(once: Once) -> Path:
    """The reference Transformer, which turns dates into ISO 8601, FP32; exported as a folder, so without its score."""
    return once("dates", lambda folder: export_to(folder, reference("transformer"))) / "bundle"


@pytest.fixture(scope="session")
def random_seq2seq_bundle(once: Once) -> Path:
    """A tiny random seq2seq with attention, of words; up to 80 of them in a source."""
    return once("random-seq2seq", lambda folder: export_recurrent(folder, "seq2seq")) / "bundle"


@pytest.fixture(scope="session")
def random_fixed_bundle(once: Once) -> Path:
    """The same without attention."""
    return once("random-fixed", lambda folder: export_recurrent(folder, "seq2seq", attention=False)) / "bundle"


@pytest.fixture(scope="session")
def random_captioner_bundle(once: Once) -> Path:
    """A tiny random Show, Attend and Tell, of words, for images of 20x12 pixels and a grid of 10x6."""
    return once("random-captioner", lambda folder: export_recurrent(folder, "captioner")) / "bundle"


@pytest.fixture(scope="session")
def random_flamingo_bundle(once: Once) -> Path:
    """A small random Flamingo with its gates wide open, of words, for images of 20x12 pixels; at most 4 rows a call."""
    return once("random-flamingo", export_flamingo) / "bundle"


def export_flamingo(folder: Path) -> None:
    from flamingo_models import write_flamingo

    write_flamingo(folder / "checkpoint", gates=1.0)
    export_to(folder, folder / "checkpoint", max_sizes={"B": 4})


def export_recurrent(folder: Path, kind: str, new_tokens: int = 12, **settings: Any) -> None:
    """Export a random seq2seq or captioner that writes ``new_tokens`` tokens, whatever they are."""
    from recurrent_models import write_captioner, write_seq2seq

    checkpoint = folder / "checkpoint"
    if kind == "captioner":
        write_captioner(checkpoint, **settings)
    else:
        write_seq2seq(checkpoint, **{"tokenizer": True, "max_source_positions": 80, **settings})
    generation = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "eos_token_id": 2, "pad_token_id": 0}
    (checkpoint / "generation_config.json").write_text(json.dumps({**generation, "decoder_start_token_id": 1}))
    export_to(folder, checkpoint, max_sizes={"B": 3})


@pytest.fixture(scope="session")
def gpt_bundle(once: Once) -> Path:
    """The reference GPT, which goes on from a prompt, FP32; exported as a folder, so without its score."""
    return once("gpt", lambda folder: export_to(folder, reference("gpt"))) / "bundle"


@pytest.fixture(scope="session")
def half_gpt_bundle(once: Once) -> Path:
    """The reference GPT in FP16, of at most two rows (B)."""

    def make(folder: Path) -> None:
        export_to(folder, reference("gpt"), precision="fp16", max_sizes={"B": 2})

    return once("half-gpt", make) / "bundle"


@pytest.fixture(scope="session")
def clip_bundle(once: Once) -> Path:
    """The reference CLIP, which names digits, FP32; exported as a folder, so without its score."""
    return once("clip", lambda folder: export_to(folder, reference("clip"))) / "bundle"


@pytest.fixture(scope="session")
def lists_bundle(once: Once) -> Path:
    """The reference seq2seq with attention, which turns lists of dates into ISO 8601, FP32; without its score."""
    return once("lists", lambda folder: export_to(folder, reference("seq2seq"))) / "bundle"


@pytest.fixture(scope="session")
def captions_bundle(once: Once) -> Path:
    """The reference Show, Attend and Tell, FP32; exported as a folder, so without its score."""
    return once("captions", lambda folder: export_to(folder, reference("show_attend_tell"))) / "bundle"


@pytest.fixture(scope="session")
def flamingo_bundle(once: Once) -> Path:
    """The reference Flamingo, which answers questions about images of digits, FP32; without its score."""
    return once("flamingo", lambda folder: export_to(folder, reference("flamingo"))) / "bundle"


@pytest.fixture(scope="session")
def bytes_bundle(once: Once) -> Path:
    """The reference Perceiver on bytes, FP32; exported as a folder, so without its score."""
    return once("bytes", lambda folder: export_to(folder, reference("perceiver_bytes"))) / "bundle"


def reference(name: str) -> Path:
    from transom.export.reference_models import reference_folder

    return reference_folder(name)
