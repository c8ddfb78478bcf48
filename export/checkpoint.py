"""Checkpoints: opened and loaded for an export, and loaded again for a bundle that was exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transom.export.processors.generation_config import generation_from_checkpoint
from transom.export.processors.image import image_preprocess_from_checkpoint, processor_size
from transom.export.processors.tokenizer import (
    LoadedTokenizer,
    TokenizerFiles,
    read_target_tokenizer,
    read_tokenizer,
)
from transom.export.reference_models import reference_folders
from transom.models.checkpoint import Checkpoint, open_checkpoint
from transom.models.family import Family, Source, label_names
from transom.models.mapped_weights import MappedWeights
from transom.models.registry import find_family, find_task
from transom.models.weights import build_module
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CheckpointError, ExportError
from transom.runtime.generation import GenerationConfig
from transom.runtime.graph_spec import CACHE, Axis, Graph, is_decoder
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.manifest import Manifest
from transom.runtime.text.tokenizer import TextTokenizer
from transom.runtime.text.tokenizer_spec import MAX_LENGTH

LABELLED = ("text-classification", "token-classification", "image-classification")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint as a module with its weights, its graphs, and the processors that make their inputs."""

    checkpoint: Checkpoint
    family: Family
    task: str
    config: Any  # the family's frozen dataclass
    module: Any  # torch.nn.Module in FP32; this file leaves torch to models/
    left_out: list[str]  # stored weights that the task does not use
    graphs: tuple[Graph, ...]
    axes: Mapping[str, Axis]
    tokenizer: LoadedTokenizer | None
    target_tokenizer: LoadedTokenizer | None
    preprocess: ImagePreprocess | None
    labels: tuple[str, ...]
    options: Mapping[str, Any]
    generation: GenerationConfig | None  # of families with a decoder
    mapped: Sequence[MappedWeights] = ()  # the files whose memory the module's weights share

    def give_back(self) -> None:
        """Give the weights' memory back to the system until the module computes again."""
        for file in self.mapped:
            file.give_back()

    def require_unchanged(self) -> None:
        """Raise CheckpointError where a file of weights changed since it was opened."""
        for file in self.mapped:
            file.require_unchanged()

    @cached_property
    def sha256(self) -> str:
        """Hash of the files that the graphs are made of, in hex; they are read when it is first asked for."""
        return self.checkpoint.sha256()

    @property
    def tokenizers(self) -> list[LoadedTokenizer]:
        """Return the tokenizers that there are: none, one, or that of the inputs and that of the outputs."""
        return [tokenizer for tokenizer in (self.tokenizer, self.target_tokenizer) if tokenizer is not None]

    def parts(self) -> dict[str, Any]:
        """Return the torch.nn.Module behind each graph, by the graph's name."""
        parts = self.family.parts(self.module)
        return {graph.name: parts[graph.name] for graph in self.graphs}

    @property
    def marks(self) -> tuple[int, ...]:
        """Return the token ids that a graph looks for among its input ids."""
        return self.family.marks(self.config)

    def open_tokenizer(self) -> TextTokenizer | None:
        """Return the checkpoint's tokenizer without a limit: parity inputs are cut to the shapes of the grid."""
        if self.tokenizer is None:
            return None
        spec = replace(self.tokenizer.spec, max_length=MAX_LENGTH)
        return self.tokenizer.opened.with_limits(spec, MAX_LENGTH)


def load_checkpoint(
    source: str,
    *,
    task: str | None,
    max_sizes: Mapping[str, int],
    image_size: tuple[int, int] | None,
    ignore_unused: bool,
) -> LoadedCheckpoint:
    """Find ``source``, choose family and task, read its processors, fill the module.

    Everything cheap is checked before the weights are read. Raises CheckpointError, or ExportError
    for an axis or image size that the family does not have.
    """
    checkpoint = open_checkpoint(source, reference_folders())
    family = find_family(checkpoint.config_json)
    chosen = find_task(family, checkpoint.config_json, task)
    mapped = [MappedWeights(path) for path in checkpoint.weight_files]
    names = frozenset(name for file in mapped for name in file)
    stored_size = processor_size(checkpoint.folder)
    config = family.config(Source(checkpoint.config_json, names, chosen, checkpoint.pooling, image_size, stored_size))
    graphs = family.graphs(config, chosen)
    longest = family.axes(config)  # the model's own bounds: a tokenizer says what an export with others would take
    axes = with_bounds(longest, max_sizes)
    inputs = {tensor.name: tensor for graph in graphs for tensor in graph.inputs}
    if image_size is not None and "pixel_values" not in inputs:
        raise ExportError(f"--image-size is given, but {family.name} takes {', '.join(inputs)}; leave it out.")
    tokenizer_files = TokenizerFiles(checkpoint.folder)
    tokenizer = target_tokenizer = preprocess = None
    if "input_ids" in inputs:
        tokenizer = tokenizer_for(tokenizer_files, chosen, longest["S"].max, inputs["input_ids"].exclusive_max or 0)
    if "pixel_values" in inputs:
        preprocess = preprocess_for(checkpoint, inputs["pixel_values"].shape)
    labels = (family.labels(config) or label_names(checkpoint.config_json)) if chosen in LABELLED else ()
    if "decoder_input_ids" in inputs:
        rows = inputs["decoder_input_ids"].exclusive_max or 0
        most = longest["T"].max if CACHE in longest else MAX_LENGTH  # no positions bound a recurrent state
        if "input_ids" in inputs:
            target_tokenizer = read_target_tokenizer(tokenizer_files, most, rows)
        else:  # what is written is all the text that there is
            target_tokenizer = tokenizer_for(tokenizer_files, chosen, most, rows)
    decoders = [graph for graph in graphs if is_decoder(graph)]
    generation = None
    if decoders:
        generation = generation_from_checkpoint(checkpoint.folder, int(decoders[0].outputs[0].shape[2]))
        if "decoder_input_ids" in inputs and generation.start_token is None:
            raise CheckpointError(
                f"{checkpoint.folder}: neither generation_config.json nor config.json has a decoder_start_token_id, "
                "with which every output begins. Add it: Marian's is its pad_token_id."
            )
    module, left_out = build_module(family, config, chosen, mapped, ignore_unused=ignore_unused)
    return LoadedCheckpoint(
        checkpoint=checkpoint,
        family=family,
        task=chosen,
        config=config,
        module=module,
        mapped=mapped,
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


def reload_checkpoint(bundle: Bundle, source: str | None = None) -> LoadedCheckpoint:
    """Load the checkpoint that ``bundle`` was exported from, with the bundle's bounds.

    ``source`` says where it lies now, if it moved. Raises CheckpointError where it is gone, or is another one.
    """
    manifest = bundle.manifest
    loaded = load_checkpoint(
        source or str(manifest.source.get("checkpoint")),
        task=manifest.task,
        max_sizes={name: axis.max for name, axis in manifest.axes.items()},
        image_size=image_size_of(manifest),
        ignore_unused=True,
    )
    if loaded.sha256 != manifest.source.get("sha256"):
        raise CheckpointError(
            f"{loaded.checkpoint.folder} is not the checkpoint that {bundle.folder} was made from: its hash differs. "
            "Give the right one with --source, or export again."
        )
    return loaded


def image_size_of(manifest: Manifest) -> tuple[int, int] | None:
    """Return (height, width) in pixels that the bundle was exported for; None where it takes no images."""
    for file in manifest.graphs:
        for tensor in file.graph.inputs:
            if tensor.name == "pixel_values":
                return int(tensor.shape[2]), int(tensor.shape[3])
    return None


BY_MEMORY = ("B", "G", "I")  # rows, groups of rows and images, whose number no part of a model bounds


def with_bounds(axes: Mapping[str, Axis], max_sizes: Mapping[str, int]) -> dict[str, Axis]:
    """Return the family's axes with the maxima that the user asked for; an axis that divides another is no larger."""
    bounded = dict(axes)
    for name, size in max_sizes.items():
        if name not in axes:
            raise ExportError(f"--max names the axis {name!r}; this model has {', '.join(axes)}.")
        ceiling = 65_536 if name in BY_MEMORY else axes[name].max
        if not axes[name].min <= size <= ceiling:
            raise ExportError(f"--max {name}={size} is out of range; this model allows {axes[name].min}..{ceiling}.")
        bounded[name] = replace(axes[name], opt=min(axes[name].opt, size), max=size)
    for name, axis in axes.items():
        if axis.divides is not None:
            most = bounded[axis.divides].max
            size = min(max_sizes.get(name, most), most)
            bounded[name] = replace(axis, opt=min(axis.opt, size), max=size)
    return bounded


def tokenizer_for(files: TokenizerFiles, task: str, longest: int, rows: int) -> LoadedTokenizer | None:
    """Read the checkpoint's tokenizer; None where it has none. ``rows`` is the length of the embedding table.

    A vocabulary without a padding token is padded with id 0 instead of an id past the table.
    """
    tokenizer = read_tokenizer(files, longest, rows)
    if tokenizer is None:
        return None
    spec = tokenizer.spec
    if task == "fill-mask" and spec.mask_id is not None and spec.mask_id >= rows:
        raise CheckpointError(
            f"{files.folder}: the tokenizer's {spec.mask_token} has id {spec.mask_id}, the model has {rows} "
            "tokens; this is not the tokenizer of this model, or it has no mask token. Export with another --task."
        )
    return tokenizer.with_spec(replace(spec, pad_token=None, pad_id=0)) if spec.pad_id >= rows else tokenizer


def preprocess_for(checkpoint: Checkpoint, shape: tuple[str | int, ...]) -> ImagePreprocess | None:
    """Read how images become ``pixel_values`` (B, C, height, width); None for other than three channels."""
    _, channels, height, width = shape
    if channels != 3:
        return None  # no image processor makes such pixels; the bundle takes raw arrays
    return image_preprocess_from_checkpoint(checkpoint.folder, int(height), int(width))


def task_options(checkpoint: Checkpoint, task: str) -> dict[str, Any]:
    """Return the settings that the runtime's tasks need beside the graphs."""
    options: dict[str, Any] = {}
    if task in ("text-classification", "image-classification") and checkpoint.config_json.get("problem_type"):
        options["problem_type"] = str(checkpoint.config_json["problem_type"])
    if checkpoint.pooling.get("prompt"):
        options["prompt"] = checkpoint.pooling["prompt"]
    return options
