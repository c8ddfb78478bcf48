"""CTranslate2: converters of its own, float32 and int8.

Its converter reads transformers' models, so conversion runs with this project's libraries on the path; checkpoints have
no tokenizer, and tokens are the words "0", "1", ... of a vocabulary made up. It runs BERT, GPT-2 and Marian.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.paths import Paths
from bench.session import Arrays, Calls
from bench.workloads import ENCODER, GENERATION, THREADS, Workload

COMPUTE = {"fp32": "float32", "int8": "int8"}
LIBRARIES = "BENCH_LIBRARIES"  # the site-packages with torch and transformers
LOG_TAIL = 400


def versions() -> dict[str, str]:
    return {"ctranslate2": version("ctranslate2")}


def folder(variant: str, model: str, paths: Paths) -> Path:
    return paths.peer("ctranslate2") / f"{model}-{variant}"


def prepare(variant: str, model: str, paths: Paths) -> str:
    """Convert in a process of its own that sees torch and transformers."""
    target = folder(variant, model, paths)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    search = os.pathsep.join([os.environ["PYTHONPATH"], os.environ[LIBRARIES]])
    command = [
        sys.executable,
        "-m",
        "bench.peers.ctranslate2",
        str(paths.checkpoint(model)),
        model,
        variant,
        str(partial),
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][-LOG_TAIL:])
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return f"quantization={COMPUTE[variant]}"


def convert(checkpoint: str, model: str, variant: str, target: str) -> None:
    """Convert a checkpoint that has no tokenizer."""
    import transformers
    from ctranslate2.converters import transformers as converters

    kind = {"bert": "BertConfig", "gpt": "GPT2Config", "transformer": "MarianConfig"}[model]
    base = converters._MODEL_LOADERS[kind].__class__
    size = transformers.AutoConfig.from_pretrained(checkpoint).vocab_size

    class Loader(base):  # type: ignore[misc, valid-type]
        def get_model_spec(self, model: Any) -> Any:
            if kind == "BertConfig":  # transformers 5 has no other positions, and no such setting
                model.config.position_embedding_type = "absolute"
            return super().get_model_spec(model)

        def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
            return [str(token) for token in range(size)]

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            config.unk_token = config.bos_token = config.eos_token = "0"
            if hasattr(model.config, "layer_norm_eps"):
                config.layer_norm_epsilon = model.config.layer_norm_eps
            if kind == "MarianConfig":
                config.decoder_start_token = str(model.config.decoder_start_token_id)

        def set_decoder(self, spec: Any, decoder: Any) -> None:
            super().set_decoder(spec, decoder)
            if kind == "MarianConfig":  # the start token is the padding token, whose embedding is zero
                spec.start_from_zero_embedding = True

        def _remove_pad_weights(self, spec: Any) -> None:
            """Keep the padding token: PyTorch counts it too."""

    converters._MODEL_LOADERS[kind] = Loader()

    class Converter(converters.TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *arguments: Any, **settings: Any) -> None:
            return None

    Converter(checkpoint).convert(target, quantization=COMPUTE[variant], force=True)


def open_session(variant: str, workload: Workload, inputs: Arrays, paths: Paths) -> Calls:
    import ctranslate2

    settings = {"device": "cpu", "compute_type": COMPUTE[variant], "intra_threads": THREADS, "inter_threads": 1}
    path = str(folder(variant, workload.model, paths))
    ids = inputs["input_ids"].tolist()
    if workload.kind == ENCODER:
        encoder = ctranslate2.Encoder(path, **settings)
        return Calls(workload, run=lambda: np.array(encoder.forward_batch(ids).last_hidden_state))
    prompt = [[str(token) for token in row] for row in ids]
    if workload.kind == GENERATION:
        generator = ctranslate2.Generator(path, **settings)

        def generate(new: int) -> Any:
            found = generator.generate_batch(
                prompt, max_length=new, min_length=new, beam_size=1, sampling_topk=1, include_prompt_in_result=False
            )
            return found[0].sequences_ids[0]

        return Calls(workload, generate=generate, logits=lambda: np.array(generator.forward_batch(prompt))[0, -1])
    translator = ctranslate2.Translator(path, **settings)

    def translate(new: int) -> Any:
        found = translator.translate_batch(
            prompt, beam_size=workload.beams, max_decoding_length=new, min_decoding_length=new
        )
        return [int(token) for token in found[0].hypotheses[0]]

    return Calls(workload, generate=translate)


if __name__ == "__main__":
    convert(*sys.argv[1:])
