"""A checkpoint, opened and understood: everything the later stages need of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transom.export.processors.generation_config import generation_from_checkpoint
from transom.export.processors.image import image_preprocess_from_checkpoint
from transom.export.processors.tokenizer import target_tokenizer_from_checkpoint, tokenizer_from_checkpoint
from transom.models.checkpoint import Checkpoint, open_checkpoint
from transom.models.family import Family, Source, label_names
from transom.models.registry import find_family, find_task
from transom.models.weights import build_module, stored_names
from transom.runtime.errors import CheckpointError, ExportError
from transom.runtime.feeds import is_decoder
from transom.runtime.generation import GenerationConfig
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.text.tokenizer import MAX_LENGTH, TextTokenizer, TokenizerSpec

LABELLED = ("text-classification", "token-classification", "image-classification")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint as a module with weights, its graph, and how its inputs are made."""

    checkpoint: Checkpoint
    family: Family
    task: str
    config: Any  # the family's frozen dataclass
    module: Any  # torch.nn.Module in FP32; this file leaves torch to models/
    left_out: list[str]  # stored weights that the task does not use
    graphs: tuple[Graph, ...]
    axes: Mapping[str, Axis]
    tokenizer: tuple[bytes, TokenizerSpec] | None
    target_tokenizer: tuple[bytes, TokenizerSpec] | None
    preprocess: ImagePreprocess | None
    labels: tuple[str, ...]
    options: Mapping[str, Any]
    generation: GenerationConfig | None  # of families with a decoder

    def parts(self) -> dict[str, Any]:
        """The torch.nn.Module behind each graph, by the graph's name."""
        parts = self.family.parts(self.module)
        return {graph.name: parts[graph.name] for graph in self.graphs}

    def open_tokenizer(self) -> TextTokenizer | None:
        """The checkpoint's tokenizer without a limit: samples are cut to the shapes of the grid."""
        if self.tokenizer is None:
            return None
        data, spec = self.tokenizer
        return TextTokenizer(data, replace(spec, max_length=MAX_LENGTH), max_tokens=MAX_LENGTH)


def load_checkpoint(
    source: str,
    *,
    task: str | None,
    max_sizes: Mapping[str, int],
    image_size: tuple[int, int] | None,
    ignore_unused: bool,
) -> LoadedCheckpoint:
    """Find SOURCE, choose family and task, read its processors, fill the module.

    Everything cheap is checked before the weights are read. Raises CheckpointError, or ExportError
    for an axis or image size that the family does not have.
    """
    checkpoint = open_checkpoint(source)
    family = find_family(checkpoint.config_json)
    chosen = find_task(family, checkpoint.config_json, task)
    names = stored_names(checkpoint.weight_files)
    config = family.config(Source(checkpoint.config_json, names, chosen, checkpoint.pooling, image_size))
    graphs = family.graphs(config, chosen)
    longest = family.axes(config)  # the model's own bounds: a tokenizer says what an export with others would take
    axes = with_bounds(longest, max_sizes)
    inputs = {tensor.name: tensor for graph in graphs for tensor in graph.inputs}
    if image_size is not None and "pixel_values" not in inputs:
        raise ExportError(f"--image-size is given, but a {family.name} takes {', '.join(inputs)}; leave it out.")
    tokenizer = target_tokenizer = preprocess = None
    if "input_ids" in inputs:
        tokenizer = tokenizer_for(checkpoint, chosen, longest["S"].max, inputs["input_ids"].exclusive_max or 0)
    if "pixel_values" in inputs:
        preprocess = preprocess_for(checkpoint, inputs["pixel_values"].shape)
    labels = label_names(checkpoint.config_json) if chosen in LABELLED else ()
    if "decoder_input_ids" in inputs:
        target = inputs["decoder_input_ids"]
        target_tokenizer = target_tokenizer_from_checkpoint(checkpoint.folder, longest["T"].max, target.exclusive_max)
    decoders = [graph for graph in graphs if is_decoder(graph)]
    generation = None
    if decoders:
        generation = generation_from_checkpoint(checkpoint.folder, int(decoders[0].outputs[0].shape[2]))
        if "decoder_input_ids" in inputs and generation.start_token is None:
            raise CheckpointError(
                f"{checkpoint.folder}: neither generation_config.json nor config.json has a decoder_start_token_id, "
                "with which every output begins. Add it: Marian's is its pad_token_id."
            )
    module, left_out = build_module(family, config, chosen, checkpoint.weight_files, ignore_unused=ignore_unused)
    return LoadedCheckpoint(
        checkpoint=checkpoint,
        family=family,
        task=chosen,
        config=config,
        module=module,
        left_out=left_out,
        graphs=graphs,
        axes=axes,
        tokenizer=tokenizer,
        target_tokenizer=target_tokenizer,
        preprocess=preprocess,
        labels=labels,
        options={**task_options(checkpoint, chosen), **family.options(module)},
        generation=generation,
    )


def with_bounds(axes: Mapping[str, Axis], max_sizes: Mapping[str, int]) -> dict[str, Axis]:
    """The family's axes with the maxima the user asked for."""
    bounded = dict(axes)
    for name, size in max_sizes.items():
        if name not in axes:
            raise ExportError(f"--max names the axis {name!r}; this model has {', '.join(axes)}.")
        ceiling = axes[name].max if name != "B" else 65_536  # rows are bounded by memory alone
        if not axes[name].min <= size <= ceiling:
            raise ExportError(f"--max {name}={size} is out of range; this model allows {axes[name].min}..{ceiling}.")
        bounded[name] = replace(axes[name], opt=min(axes[name].opt, size), max=size)
    return bounded


def tokenizer_for(checkpoint: Checkpoint, task: str, longest: int, rows: int) -> tuple[bytes, TokenizerSpec] | None:
    """The checkpoint's tokenizer; None where it has none. ``rows`` is the length of the embedding table.

    A vocabulary without a padding token is padded with id 0 instead of an id past the table.
    """
    found = tokenizer_from_checkpoint(checkpoint.folder, longest, rows)
    if found is None:
        return None
    data, spec = found
    if task == "fill-mask" and spec.mask_id is not None and spec.mask_id >= rows:
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer's {spec.mask_token} has id {spec.mask_id}, the model has {rows} "
            "tokens; this is not the tokenizer of this model, or it has no mask token. Export with another --task."
        )
    if spec.pad_id >= rows:
        spec = replace(spec, pad_token=None, pad_id=0)
    return data, spec


def preprocess_for(checkpoint: Checkpoint, shape: tuple[str | int, ...]) -> ImagePreprocess | None:
    """How images become ``pixel_values`` (B, C, height, width); None for other than three channels."""
    _, channels, height, width = shape
    if channels != 3:
        return None  # no image processor makes such pixels; the bundle takes raw arrays
    return image_preprocess_from_checkpoint(checkpoint.folder, int(height), int(width))


def task_options(checkpoint: Checkpoint, task: str) -> dict[str, Any]:
    """What the runtime's tasks need to know beside the graph."""
    options: dict[str, Any] = {}
    if task in ("text-classification", "image-classification") and checkpoint.config_json.get("problem_type"):
        options["problem_type"] = str(checkpoint.config_json["problem_type"])
    if checkpoint.pooling.get("prompt"):
        options["prompt"] = checkpoint.pooling["prompt"]
    return options
