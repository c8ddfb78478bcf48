"""The record of a model family, with which each family's file ends, and checks of config.json's fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from transom.runtime.errors import CheckpointError
from transom.runtime.graph_spec import Axis, Graph


@dataclass(frozen=True)
class Source:
    """The parts of a checkpoint that a family's config may depend on."""

    config_json: Mapping[str, Any]  # parsed
    names: frozenset[str]  # of the stored weights
    task: str
    pooling: Mapping[str, Any]  # sentence-transformers' modules: {"mode", "normalize"}, or empty
    image_size: tuple[int, int] | None = None  # asked for by the user
    processor_size: tuple[int, int] | None = None  # that the checkpoint's image processor resizes to


@dataclass(frozen=True)
class Family:
    """A model family: its architectures, its weights' names and the graphs that are exported of it.

    name              the family's name in bundle.json
    model_types       values of ``model_type`` in config.json
    prefix            what checkpoints with a head put before the names of the other weights
    architectures     transformers' class name -> the task it is exported for
    tasks             every task that a checkpoint of the family can be exported for
    config            Source -> the family's frozen config
    build             config, task -> the module that holds the weights; the part of it behind a graph takes
                      the graph's inputs in order and returns its outputs in order
    rename            stored name, config, task -> the module's name; None: the weight of another task's head
    convert           the module's name, stored tensor, config -> the tensor in the shape that the module has
    graphs            config, task -> the named tensors of each graph
    axes              config -> the bounds of the graphs' named axes
    tied_to           stored name that ``rename`` leaves out, config, task -> the module's name of the weight that it
                      repeats; None where it repeats none
    computed          config -> weights that a checkpoint need not store; a stored one wins
    parts             module -> the module behind each graph, by the graph's name
    options           module -> numbers of the checkpoint that the runtime needs beside the graphs
    marks             config -> token ids that a graph looks for among its input ids: parity puts them there
    labels            config -> names of the labels where the head itself decides them; empty: config.json's
    undefined         transformers' class name -> what differs, of architectures that are not defined
    unread_heads      transformers' class name -> what differs, of heads alone: another task of the checkpoint is read
    unprefixed_heads  how the names of heads begin that checkpoints store without the prefix; for messages
    """

    name: str
    model_types: tuple[str, ...]
    prefix: str
    architectures: Mapping[str, str]
    tasks: tuple[str, ...]
    config: Callable[[Source], Any]
    build: Callable[[Any, str], nn.Module]
    rename: Callable[[str, Any, str], str | None]
    convert: Callable[[str, Tensor, Any], Tensor]
    graphs: Callable[[Any, str], tuple[Graph, ...]]
    axes: Callable[[Any], dict[str, Axis]]
    tied_to: Callable[[str, Any, str], str | None] = lambda name, config, task: None
    computed: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    parts: Callable[[nn.Module], dict[str, nn.Module]] = lambda module: {"model": module}
    options: Callable[[nn.Module], dict[str, Any]] = lambda module: {}
    marks: Callable[[Any], tuple[int, ...]] = lambda config: ()
    labels: Callable[[Any], tuple[str, ...]] = lambda config: ()
    unprefixed_heads: tuple[str, ...] = ()
    undefined: Mapping[str, str] = field(default_factory=dict)
    unread_heads: Mapping[str, str] = field(default_factory=dict)


class GraphModule(nn.Module):
    """One method of the model as a module, for the exporter."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = getattr(self.model, self.method)(*inputs)
        return outputs


MAX_LAYERS = 1_000  # far past any known model; keeps a hostile config from building modules for ever
HEADS = (("hidden_size", "num_attention_heads"),)
MAX_SIZE = 2**31 - 1  # of any one dimension


def config_fields(
    config_json: Mapping[str, Any],
    sizes: Mapping[str, int],
    others: Mapping[str, Any],
    activations: Mapping[str, Any],
    heads: Iterable[tuple[str, str]] = HEADS,
    where: str = "config.json",
) -> dict[str, Any]:
    """Take the named fields from config.json, or the part of it that ``where`` names, and check them all.

    ``sizes`` are positive integers, numbers of layers by their name among them; ``others`` have the type of their
    default (``layer_norm_eps`` between 0 and 1, a str is an activation's name); ``heads`` are pairs of a width and
    the number of heads that must divide it. Raises CheckpointError naming every field that is wrong.
    """
    found = {name: config_json.get(name, default) for name, default in {**sizes, **others}.items()}
    problems = []
    for name, value in found.items():
        if name in sizes:
            limit = MAX_LAYERS if "layer" in name or name == "depth" else MAX_SIZE
            if type(value) is not int or not 1 <= value <= limit:
                problems.append(f"{name} is {value!r}, expected an integer in 1..{limit}")
        elif isinstance(others[name], str):
            if not isinstance(value, str) or value not in activations:
                problems.append(f"{name} is {value!r}, expected one of {', '.join(activations)}")
        elif isinstance(others[name], bool):
            if type(value) is not bool:
                problems.append(f"{name} is {value!r}, expected true or false")
        elif type(value) not in (int, float) or not 0 < value < 1:
            problems.append(f"{name} is {value!r}, expected a number between 0 and 1")
    if not problems:
        problems = [
            f"{width} {found[width]} is no multiple of {count} {found[count]}"
            for width, count in heads
            if found[width] % found[count]
        ]
    if problems:
        raise CheckpointError(f"{where} cannot be used: {'; '.join(problems)}. Correct these fields.")
    return found


def label_count(config_json: Mapping[str, Any]) -> int:
    """Count the labels that config.json declares: id2label, else num_labels, else transformers' default 2."""
    labels = config_json.get("id2label")
    if isinstance(labels, dict) and labels:
        return len(labels)
    count = config_json.get("num_labels", 2)
    if type(count) is not int or not 1 <= count <= MAX_SIZE:
        raise CheckpointError(f"config.json: num_labels is {count!r}, expected a positive integer.")
    return count


def label_names(config_json: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the labels in the order of their ids, ``LABEL_<i>`` where config.json names none."""
    labels = config_json.get("id2label") or {}
    names = tuple(f"LABEL_{i}" for i in range(label_count(config_json)))
    if not labels:
        return names
    if not isinstance(labels, dict):
        raise CheckpointError(f"config.json: id2label is {labels!r:.80}, expected an object of names by id. Fix it.")
    if sorted(labels, key=str) != sorted((str(i) for i in range(len(names))), key=str):
        raise CheckpointError(
            f"config.json: id2label has the ids {', '.join(sorted(map(str, labels))[:8])}, "
            f"expected 0..{len(names) - 1} without gaps."
        )
    return tuple(str(labels[str(i)]) for i in range(len(names)))
