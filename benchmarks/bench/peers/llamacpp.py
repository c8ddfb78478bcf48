"""llama.cpp by xllamacpp: GPT-2 as GGUF in F32, Q8_0 and Q4_0, written with the gguf package.

Every matrix is quantised, embeddings and head too; norms, biases and positions are F32, as by llama.cpp's converter.
The vocabulary is made up: requests and answers are token ids. The server runs inside this process, without HTTP.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.paths import Paths
from bench.session import Arrays, Calls
from bench.workloads import THREADS, VOCABULARY, Workload

LAYERS = 12
CONTEXT = 1024
TENSORS = {  # GGUF's name: transformers' name, whether its matrix is (in, out)
    "token_embd.weight": ("wte.weight", False),
    "position_embd.weight": ("wpe.weight", False),
    "output_norm.weight": ("ln_f.weight", False),
    "output_norm.bias": ("ln_f.bias", False),
}
LAYER_TENSORS = {
    "attn_norm": ("ln_1", False),
    "attn_qkv": ("attn.c_attn", True),
    "attn_output": ("attn.c_proj", True),
    "ffn_norm": ("ln_2", False),
    "ffn_up": ("mlp.c_fc", True),
    "ffn_down": ("mlp.c_proj", True),
}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("xllamacpp", "gguf")}


def file_of(variant: str, paths: Paths) -> Path:
    return paths.peer("llamacpp") / f"gpt-{variant}.gguf"


def prepare(variant: str, model: str, paths: Paths) -> str:
    """Write the GGUF file."""
    import gguf

    target = file_of(variant, paths)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    kind = gguf.GGMLQuantizationType[variant.upper()]
    writer = gguf.GGUFWriter(partial, "gpt2")
    size = VOCABULARY[model]
    writer.add_name("gpt2")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(768)
    writer.add_feed_forward_length(3072)
    writer.add_block_count(LAYERS)
    writer.add_head_count(12)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(size - 1)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)
    for name, array in tensors(paths.checkpoint(model) / "model.safetensors").items():
        if array.ndim == 2 and name != "position_embd.weight" and variant != "f32":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)
    return f"{variant.upper()}, embeddings and head too"


def tensors(file: Path) -> dict[str, Any]:
    """Return the weights by GGUF's names, matrices as (out, in), float32."""
    stored = safetensors(file)
    names = dict(TENSORS)
    for i in range(LAYERS):
        for ours, (theirs, turned) in LAYER_TENSORS.items():
            for kind in ("weight", "bias"):
                names[f"blk.{i}.{ours}.{kind}"] = (f"h.{i}.{theirs}.{kind}", turned and kind == "weight")
    found = {}
    for name, (theirs, turned) in names.items():
        array = stored[f"transformer.{theirs}"]
        found[name] = np.ascontiguousarray(array.T if turned else array)
    found["output.weight"] = found["token_embd.weight"]
    return found


def safetensors(file: Path) -> dict[str, Any]:
    """Return the float32 tensors of a safetensors file, by numpy alone."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(file, np.uint8, "r", offset=8 + length)
    found = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        if entry["dtype"] == "F32":
            found[name] = np.frombuffer(data[first:end].tobytes(), np.float32).reshape(entry["shape"])
    return found


def open_session(variant: str, workload: Workload, inputs: Arrays, paths: Paths) -> Calls:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file_of(variant, paths))
    settings.n_ctx = CONTEXT
    settings.n_parallel = 1
    settings.n_batch = settings.n_ubatch = CONTEXT
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
    settings.cache_prompt = False
    settings.warmup = False
    settings.n_gpu_layers = 0
    server = xllamacpp.Server(settings)
    ids = inputs["input_ids"][0].tolist()

    def generate(new: int) -> Any:
        answer = server.handle_completions(
            {
                "prompt": ids, "n_predict": new, "temperature": 0.0, "top_k": 1, "cache_prompt": False,
                "ignore_eos": True, "stream": False,
            }
        )  # fmt: skip
        found = json.loads(answer) if isinstance(answer, str) else answer
        if "choices" not in found:
            raise RuntimeError(f"the server answered {str(found)[:200]}")
        return [int(token) for token in found["choices"][0]["text"].split("t")[1:]]

    return Calls(workload, generate=generate)
