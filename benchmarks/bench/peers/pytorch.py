"""PyTorch with transformers' models: eager, compiled by Inductor, BF16, dynamically quantised linear layers.

GPT-2's layers are transformers' ``Conv1D``, which ``quantize_dynamic`` does not know: it has no INT8 here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from bench.paths import Paths
from bench.session import Arrays, Calls
from bench.workloads import ENCODER, GENERATION, THREADS, WORKLOADS, Workload


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def prepare(variant: str, model: str, paths: Paths) -> str:
    """Compile once, so that Inductor's cache has the kernels."""
    if "compiled" in variant:
        import numpy as np

        for workload in WORKLOADS.values():
            if workload.model == model and workload.core:
                inputs = dict(np.load(paths.inputs(workload.name)))
                open_session(variant, workload, inputs, paths).outputs()
    return ""


def open_session(variant: str, workload: Workload, inputs: Arrays, paths: Paths) -> Calls:
    import torch

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    torch._dynamo.reset()  # another size of the same model would otherwise be compiled for any size
    model = changed(loaded(workload.model, paths), variant)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    if "pixel_values" in tensors and "bf16" in variant:
        tensors["pixel_values"] = tensors["pixel_values"].to(torch.bfloat16)
    if workload.kind == ENCODER:
        call = encoder_call(model, workload)
        if "compiled" in variant:
            call = torch.compile(call, dynamic=False)
        return Calls(workload, run=lambda: call(**tensors).float().numpy())
    if "compiled" in variant:
        generate = compiled_greedy(model, tensors["input_ids"], workload.new)
    else:
        generate = generation(model, tensors, workload)
    logits = None
    if workload.kind == GENERATION:
        logits = lambda: model(tensors["input_ids"], logits_to_keep=1).logits[0, -1].float().numpy()  # noqa: E731
    return Calls(workload, generate=generate, logits=logits)


def loaded(name: str, paths: Paths) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    kind = {
        "bert": transformers.BertModel,
        "gpt": transformers.GPT2LMHeadModel,
        "vit": transformers.ViTForImageClassification,
        "clip": transformers.CLIPModel,
        "transformer": transformers.MarianMTModel,
    }[name]
    return kind.from_pretrained(paths.checkpoint(name)).eval()


def changed(model: Any, variant: str) -> Any:
    """Return the model in the variant's number format."""
    import torch

    if "bf16" in variant:
        return model.to(torch.bfloat16)
    if variant == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    return model


def encoder_call(model: Any, workload: Workload) -> Callable[..., Any]:
    """Return the function of the inputs that gives what is compared."""
    if workload.model == "bert":
        return lambda **inputs: model(**inputs).last_hidden_state
    if workload.model == "vit":
        return lambda **inputs: model(**inputs).logits
    if workload.part == "image":
        return lambda **inputs: model.visual_projection(model.vision_model(**inputs).pooler_output)
    return lambda **inputs: model.text_projection(model.text_model(**inputs).pooler_output)


def generation(model: Any, tensors: Arrays, workload: Workload) -> Callable[[int], Any]:
    """Return transformers' own ``generate``, greedy or by beams, always as long as asked."""

    def generate(new: int) -> Any:
        found = model.generate(
            **tensors, max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=workload.beams,
            pad_token_id=model.config.pad_token_id or 0,
        )[0]  # fmt: skip
        return found[-new:].numpy()

    return generate


def compiled_greedy(model: Any, ids: Any, new: int) -> Callable[[int], Any]:
    """Return a greedy loop over a compiled forward and transformers' static cache, made anew for each generation."""
    import torch
    from transformers import StaticCache

    forward = torch.compile(model.forward, dynamic=False)
    length = ids.shape[1] + new

    def generate(count: int) -> Any:
        cache = StaticCache(config=model.config, max_cache_len=length)
        logits = forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens = [logits[0, -1].argmax()]
        position = torch.tensor([ids.shape[1]])
        while len(tokens) < count:
            found = forward(
                tokens[-1].view(1, 1), past_key_values=cache, use_cache=True, position_ids=position[None] + 0,
                logits_to_keep=1,
            )  # fmt: skip
            tokens.append(found.logits[0, -1].argmax())
            position = position + 1
        return torch.stack(tokens).numpy()

    return generate
