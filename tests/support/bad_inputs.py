"""The rest of the sweep's table: damaged checkpoints, requests that a loaded bundle refuses, and bad command lines."""
# ruff: noqa: E501 - a row is a line

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bad_bundles import Damage, Row, nothing
from transom.runtime.errors import CheckpointError, InputError, ShapeError, TransomError


def edited(change: Callable[[dict[str, Any]], object], name: str = "config.json") -> Damage:
    """A JSON file of the checkpoint changed; made where there is none."""

    def damage(folder: Path) -> None:
        path = folder / name
        words = json.loads(path.read_text()) if path.exists() else {}
        change(words)
        path.write_text(json.dumps(words))

    return damage


def holding(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def cut(keep: float) -> Damage:
    """model.safetensors cut short, to a share or to a number of bytes."""

    def damage(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The header of model.safetensors changed, its length made right again."""

    def damage(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        words = json.loads(data[8 : 8 + size])
        change(words)
        made = json.dumps(words).encode()
        (folder / "model.safetensors").write_bytes(len(made).to_bytes(8, "little") + made + data[8 + size :])

    return damage


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")


def index(weight_map: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


def first(words: dict[str, Any]) -> dict[str, Any]:
    """The header's entry of some weight."""
    found: dict[str, Any] = next(entry for name, entry in words.items() if name != "__metadata__")
    return found


PROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"
DAMAGED: tuple[tuple[str, str, Damage, str], ...] = (
    ("no config", "bert checkpoint", lambda c: (c / "config.json").unlink(), r"has no config\.json"),
    *(("config: " + repr(d[:4]), "bert checkpoint", holding("config.json", d), r"config\.json")
      for d in (b"", b"{", b"[]", b"[" * 100_000, b"nul", b"\xff\xfe{}")),
    ("a negative size", "bert checkpoint", edited(lambda w: w.update(hidden_size=-1)), "hidden_size is -1"),
    ("a billion layers", "bert checkpoint", edited(lambda w: w.update(num_hidden_layers=10**9)), "num_hidden_layers is 1000"),
    ("a billion words", "bert checkpoint", edited(lambda w: w.update(vocab_size=10**9)), r"config\.json asks for"),
    ("a size in words", "vit checkpoint", edited(lambda w: w.update(image_size="big")), "image_size is 'big'"),
    ("a list as activation", "gpt checkpoint", edited(lambda w: w.update(activation_function=["x"])), "activation_function"),
    ("an unknown model", "bert checkpoint", edited(lambda w: w.update(model_type="llama")), "'llama'.*Defined are"),
    ("no model type", "bert checkpoint", edited(lambda w: w.clear()), "Defined are"),
    ("a tower as a list", "clip checkpoint", edited(lambda w: w.update(text_config=[])), "text_config"),
    *((f"weights cut to {keep}", "bert checkpoint", cut(keep), "truncated or damaged") for keep in (0, 7, 100, 0.5)),
    ("a header of 2^60 bytes", "bert checkpoint", holding("model.safetensors", (2**60).to_bytes(8, "little")), "damaged"),
    ("another shape", "bert checkpoint", header(lambda w: first(w).update(shape=[1])), "damaged|config.json asks for"),
    ("another dtype", "bert checkpoint", header(lambda w: first(w).update(dtype="X9")), "truncated or damaged"),
    ("an offset outside", "bert checkpoint", header(lambda w: first(w).update(data_offsets=[0, 2**40])), "damaged"),
    ("pickled weights", "bert checkpoint", pickled, r"pytorch_model\.bin.*can run code"),
    ("an empty index", "bert checkpoint", index({}), "has no weight_map"),
    ("a list as index", "bert checkpoint", index([]), "has no weight_map"),
    ("a shard outside", "bert checkpoint", index({"a": "../model.safetensors"}), "must be a .safetensors file beside it"),
    ("a missing shard", "bert checkpoint", index({"a": "b.safetensors"}), r"missing here: b\.safetensors"),
    ("a vocabulary of bytes", "bert checkpoint", holding("vocab.txt", b"\xff\xfe\x00"), "tokenizer"),
    ("half a tokenizer.json", "bert checkpoint", holding("tokenizer.json", b'{"version": "1.0"'), r"tokenizer\.json"),
    ("a list as settings", "bert checkpoint", holding("tokenizer_config.json", b"[]"), "holds a JSON list, expected"),
    ("merges of nothing", "clip checkpoint", holding("merges.txt", b"#version\na b c\n"), "merges|tokenizer"),
    ("a vocabulary as a list", "clip checkpoint", holding("vocab.json", b"[]"), "vocab"),
    ("a processor of ours not", "vit checkpoint", edited(lambda w: w.update(image_processor_type="X"), PROCESSOR), "is 'X'"),
    ("a size of nothing", "vit checkpoint", edited(lambda w: w.update(size=0), PROCESSOR), "size is 0, expected"),
    ("a std of zero", "vit checkpoint", edited(lambda w: w.update(image_std=[0, 0, 0]), PROCESSOR), "std is 0"),
    ("a filter in words", "vit checkpoint", edited(lambda w: w.update(resample="best"), PROCESSOR), "resample is 'best'"),
    ("half a processor", "vit checkpoint", holding(PROCESSOR, b"{"), r"preprocessor_config\.json is not valid JSON"),
    ("an EOS past the end", "gpt checkpoint", edited(lambda w: w.update(eos_token_id=10**6), GENERATION), "eos_token_id"),
    ("a hot temperature", "gpt checkpoint", edited(lambda w: w.update(temperature="hot"), GENERATION), "temperature is 'hot'"),
    ("a setting we lack", "gpt checkpoint", edited(lambda w: w.update(guidance_scale=2), GENERATION), "does not follow"),
    ("settings as a list", "gpt checkpoint", holding(GENERATION, b"[]"), "holds a JSON list, expected an object"),
)  # fmt: skip
CHECKPOINTS = tuple(Row(what, on, damage, CheckpointError, said) for what, on, damage, said in DAMAGED)


def ids(*shape: int, dtype: str = "int64", value: float = 1) -> Any:
    return np.full(shape, value, dtype)


def raw(arrays: Any, outputs: Any = None) -> Callable[[Any], object]:
    return lambda model: model.run(arrays, outputs)


# At the command line a raw run takes the same arrays from a file, which the test writes: "{npz}"
RAW: tuple[tuple[str, str, dict[str, Any], type[TransomError], str], ...] = (
    ("no input", "bert", {}, InputError, "'input_ids' is missing"),
    ("an unknown input", "bert", {"x": ids(1, 1)}, InputError, "unknown input 'x'"),
    ("int32", "bert", {"input_ids": ids(1, 1, dtype="int32")}, InputError, "has dtype int32; expected int64"),
    ("floats", "bert", {"input_ids": ids(1, 1, dtype="float32")}, InputError, "has dtype float32; expected int64"),
    ("another byte order", "bert", {"input_ids": ids(1, 1, dtype=">i8")}, InputError, "has dtype >i8"),
    ("texts", "bert", {"input_ids": np.array([["a"]])}, InputError, "has dtype <U1"),
    ("rank 1", "bert", {"input_ids": ids(3)}, ShapeError, r"has shape \(3,\); expected 2 axes"),
    ("rank 3", "bert", {"input_ids": ids(1, 1, 1)}, ShapeError, "expected 2 axes"),
    ("no rows", "bert", {"input_ids": ids(0, 4)}, ShapeError, "axis B allows 1"),
    ("no tokens", "bert", {"input_ids": ids(1, 0)}, ShapeError, "axis S allows 1"),
    ("too many tokens", "bert", {"input_ids": ids(1, 68)}, ShapeError, r"axis S allows 1\.\.67\. The model has 67 positions; give no more"),
    ("two lengths", "bert", {"input_ids": ids(1, 4), "attention_mask": ids(1, 5)}, ShapeError, "another input has S=4"),
    ("a negative token", "bert", {"input_ids": ids(1, 1, value=-1)}, InputError, "holds -1; expected values in 0"),
    ("a token past the table", "bert", {"input_ids": ids(1, 1, value=2**40)}, InputError, "holds 1099511627776"),
    ("a third type", "bert", {"input_ids": ids(1, 1), "token_type_ids": ids(1, 1, value=2)}, InputError, "holds 2; expected"),
    ("an image of another size", "vit", {"pixel_values": ids(1, 3, 9, 9, dtype="float32")}, ShapeError, "is fixed at"),
    ("an image of bytes", "vit", {"pixel_values": ids(1, 3, 8, 8, dtype="uint8")}, InputError, "has dtype uint8"),
    ("a cache too short", "gpt", {"input_ids": ids(1, 5), "key_cache.0": ids(1, 2, 2, 80, dtype="float32")}, ShapeError, "C=2"),
    ("a position before 0", "gpt", {"input_ids": ids(1, 5), "write_indices": ids(1, value=-1)}, InputError, "holds -1"),
    ("logits of no token", "gpt", {"input_ids": ids(1, 5), "logits_positions": ids(1, 1, value=5)}, InputError, "0..4"),
)  # fmt: skip


def asked(
    what: str,
    on: str,
    call: Callable[[Any], object],
    said: str,
    *arguments: str,
    error: type[TransomError] = InputError,
) -> Row:
    """A request; without arguments the command line cannot make it."""
    return Row(what, on, nothing, error, said, call, arguments or None)


CALLS = (
    *(Row(f"raw: {what}", on, nothing, error, said, raw(arrays), ("{npz}",)) for what, on, arrays, error, said in RAW),
    asked("a list of arrays", "bert", raw([ids(1, 1)]), "inputs is a list; expected a dict"),
    asked("a list as an array", "bert", raw({"input_ids": [[1]]}), "is a list; expected a numpy array"),
    asked("an unknown output", "bert", raw({"input_ids": ids(1, 1)}, ["x"]), "unknown output 'x'"),
    asked("an empty text", "bert", lambda b: b.embed(""), "has no tokens", ""),
    asked("a blank text", "bert", lambda b: b.embed(" \t\n"), "has no tokens", " \t\n"),
    asked("no texts", "bert", lambda b: b.embed([]), "texts is empty"),
    asked("bytes", "bert", lambda b: b.embed(b"a"), "text 0 is a bytes, expected a str"),
    asked("None among texts", "bert", lambda b: b.embed(["a", None]), "text 1 is a NoneType"),
    asked("half a character", "bert", lambda b: b.embed("a\ud800"), "lone surrogate"),
    asked("another task", "bert", lambda b: b.fill_mask("a [MASK]"), "exported for feature-extraction"),
    asked("no picture", "vit", lambda v: v.classify("absent.png"), "is not a file that is there", "absent.png"),
    asked("an address", "vit", lambda v: v.classify("https://x/y.png"), "Download it first", "https://x/y.png"),
    asked("a folder", "vit", lambda v: v.classify("/"), "is not a file that is there", "/"),
    asked("a device", "vit", lambda v: v.classify("/dev/zero"), "is not a file that is there", "/dev/zero"),
    asked("no image format", "vit", lambda v: v.classify(__file__), "which is none of PNG", __file__),
    asked("a cut image", "vit", lambda v: v.classify(b"\x89PNG\r\n\x1a\n\0\0"), "damaged or cut short"),
    asked("an image of floats", "vit", lambda v: v.classify(ids(4, 4, 3, dtype="float32")), "expected uint8"),
    asked("an image of NaN", "vit", lambda v: v.classify(ids(4, 4, dtype="float32", value=np.nan)), "expected uint8"),
    asked("an image without rows", "vit", lambda v: v.classify(ids(0, 4, 3, dtype="uint8")), "expected uint8"),
    asked("no images", "vit", lambda v: v.classify([]), "the list of images is empty"),
    asked("top 0", "vit", lambda v: v.classify(ids(4, 4, 3, dtype="uint8"), top_k=0), "top_k is 0"),
    asked("no labels", "clip", lambda c: c.zero_shot(ids(4, 4, 3, dtype="uint8"), []), "labels is empty"),
    asked("a label alone", "clip", lambda c: c.embed_labels("cat"), "labels is a str; expected a list"),
    asked("a template without a blank", "clip", lambda c: c.embed_labels(["a"], "photo"), "expected one {} in it"),
    asked("labels that are numbers", "clip", lambda c: c.embed_labels([1]), r"labels\[0\] is a int; expected a str"),
    asked("a text too long", "clip", lambda c: c.embed_text("a " * 99), "at most 23 fit", error=ShapeError),
    asked("no prompt", "gpt", lambda g: g.generate([]), "a prompt is empty"),
    asked("no ids in a prompt", "gpt", lambda g: g.generate([[1], []]), "prompt 1 is empty"),
    asked("a token past the table", "gpt", lambda g: g.generate([10**9]), "holds the id 1000000000", "1000000000"),
    asked("a negative token", "gpt", lambda g: g.generate([-1]), "holds the id -1"),
    asked("halves of tokens", "gpt", lambda g: g.generate([0.5]), "expected integers"),
    asked("texts without tokenizer", "gpt", lambda g: g.generate("a"), "no tokenizer"),
    asked("a prompt too long", "gpt", lambda g: g.generate([1] * 67), "context holds", " ".join(["1"] * 67)),
    asked("an unknown keyword", "gpt", lambda g: g.generate([1], max_tokens=1), "Did you mean max_new_tokens"),
    asked("no new tokens", "gpt", lambda g: g.generate([1], max_new_tokens=0), "max_new_tokens is 0"),
    asked("more than the context", "gpt", lambda g: g.generate([1], max_new_tokens=67), "context holds", "1", "--max-new-tokens", "67"),
    asked("NaN degrees", "gpt", lambda g: g.generate([1], do_sample=True, temperature=np.nan), "temperature is nan"),
    asked("warm and greedy", "gpt", lambda g: g.generate([1], temperature=0.5), "no effect without do_sample", "1", "--temperature", "0.5"),
    asked("beams past the rows", "gpt", lambda g: g.generate([1], num_beams=4), "this bundle allows 3", "1", "--num-beams", "4"),
    asked("a stop nobody can find", "gpt", lambda g: g.generate([1], stop_strings="a"), "no tokenizer to find"),
    asked("a stream of two", "gpt", lambda g: g.stream([[1], [2]]), "stream takes one prompt"),
    asked("a text of one token", "gpt", lambda g: g.score([1]), "no token that could be predicted", "--score", "1"),
    asked("a source too long", "marian", lambda m: m.generate([1] * 68), "axis S allows 67", " ".join(["1"] * 68)),
    asked("a text to translate", "marian", lambda m: m.translate("a"), "no tokenizer"),
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A bad command line: ``{bundle}`` is a whole bundle of BERT, ``{checkpoint}`` its checkpoint, ``{work}`` a folder."""

    arguments: tuple[str, ...]
    status: int  # 1: an error of ours; 2: a wrong call
    said: str


COMMANDS = (
    Command(("inspect", "{work}/absent"), 1, "BundleError: .*is no folder"),
    Command(("inspect", "{work}"), 1, "BundleError: .*has no bundle.json"),
    Command(("selftest", "{checkpoint}"), 1, "BundleError: .*has no bundle.json"),
    Command(("selftest", "{bundle}", "--threads", "0"), 2, "--threads"),
    Command(("selftest", "{bundle}", "--device", "tpu"), 1, "BackendError: device is 'tpu'"),
    Command(("run", "{bundle}"), 2, "INPUT"),
    Command(("run", "{bundle}", "{work}/absent.npz"), 1, "InputError: .*cannot be read as a .npz file"),
    Command(("run", "{bundle}", "{work}/folder.npz"), 1, "InputError: .*it is no regular file"),
    Command(("run", "{bundle}", "{work}/pipe.npz"), 1, "InputError: .*it is no regular file"),
    Command(("run", "{bundle}", "{work}/zeros.npz"), 1, "InputError: .*it unpacks to 4295"),
    Command(("run", "{bundle}", "{work}/pickle.npz"), 1, "InputError: .*cannot be read as a .npz file of plain arrays"),
    Command(("run", "{bundle}", "{work}/text.npz"), 1, "InputError: .*cannot be read as a .npz file of plain arrays"),
    Command(("run", "{bundle}", "a", "--out", "{work}/folder.npz"), 1, "InputError: --out .*cannot be written"),
    Command(("run", "{bundle}", "a", "--out", "{work}/no/out.npz"), 1, "InputError: --out .*cannot be written"),
    Command(("run", "{bundle}", "a", "--out", "{work}/out.txt"), 2, "expected the name of a .npz file"),
    Command(("run", "{bundle}", "a", "--max-new-tokens", "3"), 2, "generates nothing"),
    Command(("run", "{bundle}", "a", "--no-such-option"), 2, "no-such-option"),
    Command(("bench", "{bundle}", "--shape", "S=0"), 2, "S=0"),
    Command(("bench", "{bundle}", "--shape", "S=99999"), 1, "ShapeError: axis S is 99999"),
    Command(("bench", "{bundle}", "--shape", "Q"), 2, "Q"),
    Command(("export", "{checkpoint}"), 2, "--out"),
    Command(("export", "{checkpoint}", "--out", "{work}"), 1, "ExportError: .*--force"),
    Command(("export", "{checkpoint}", "--out", "{work}", "--force"), 1, "ExportError: .*is no bundle"),
    Command(("export", "{checkpoint}", "--out", "{work}/text.npz/new"), 1, "ExportError: cannot write"),
    Command(("export", "{checkpoint}", "--out", "{work}/" + "x" * 300), 1, "ExportError: cannot write .*File name too long"),
    Command(("export", "{checkpoint}", "--out", "{work}/new", "--max", "S=68"), 1, "ExportError: --max S=68 is out of range"),
    Command(("export", "{checkpoint}", "--out", "{work}/new", "--max", "T=1"), 1, "ExportError: --max names the axis 'T'"),
    Command(("export", "{checkpoint}", "--out", "{work}/new", "--max", "S"), 2, "--max"),
    Command(("export", "{checkpoint}", "--out", "{work}/new", "--image-size", "0"), 2, "--image-size"),
    Command(("export", "{checkpoint}", "--out", "{work}/new", "--task", "song"), 1, "CheckpointError: .*'song'"),
    Command(("export", "{checkpoint}", "--out", "{work}/new", "--precision", "fp8"), 2, "fp8"),
    Command(("export", "{work}/absent", "--out", "{work}/new"), 1, "CheckpointError: .*neither a folder nor a hub id"),
    Command(("export", "{work}/text.npz", "--out", "{work}/new"), 1, "CheckpointError: .*is a file"),
    Command(("verify", "{bundle}", "--source", "{work}"), 1, r"CheckpointError: .*no config\.json"),
    Command(("no-such-command",), 2, "no-such-command"),
)  # fmt: skip
