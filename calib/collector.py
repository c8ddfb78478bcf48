"""Collect statistics of the tensors of an FP32 graph while it runs as a backend, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.calib.graph_hash import MODULE
from transom.calib.histogram import Histogram
from transom.calib.random_input_check import RandomInputCheck
from transom.calib.table import ChannelRanges, TensorRanges
from transom.runtime.backends.base import Array
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.backends.spinning import thread_entries
from transom.runtime.errors import BackendError, CalibrationError, one_line
from transom.runtime.graph_spec import Graph

MASK = "attention_mask"  # the input that says which positions are padding
ROWS = 512  # kept per tensor, of BERT-base's widest: 6 MB
INLINE = 1024  # bytes: small initializers stay in the model, ONNX Runtime computes shapes from them
SEED = 5  # which rows are kept is chance, the same chance in every run


class CollectingBackend:
    """A backend whose ``ranges`` are those of ``tensors`` over all calls so far.

    ``model`` is left as it is; ``tensors`` are float32 tensors of its main graph, inputs and outputs among them.
    Those in ``channels`` are also measured channel by channel (last axis), and ``rows`` of their positions, at
    most ROWS, are kept: a fair sample of all positions, for ``kept_rows``. Positions that MASK marks as padding
    are not counted. The caller sets ``sample``, which errors name.

    Raises CalibrationError for a value that is NaN or infinite, a tensor the graph does not have, and a graph that
    fails on a sample.
    """

    device = "cpu"

    def __init__(
        self,
        model: ir.Model,
        graph: Graph,
        tensors: Sequence[str],
        channels: Collection[str] = (),
        rows: int = 0,
        threads: int | None = None,
    ) -> None:
        self.graph = graph
        self.sample = ""
        self.random_input_check = RandomInputCheck()
        names = list(dict.fromkeys([*tensors, *channels]))
        self._model = model
        values = instrumented_values(model, names)
        mask = next((value for value in model.graph.inputs if value.name == MASK), None)
        self._instrumented = {
            name: TensorStats(
                module_of(value), is_padded(value, mask), name in channels, min(rows, ROWS) if name in channels else 0
            )
            for name, value in values.items()
        }
        self._lock = threading.Lock()
        self._session, self._weights = open_instrumented(model, values, threads)

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Run the graph as any backend does, and count the values of its tensors."""
        written = {tensor.name: tensor.aliases for tensor in self.graph.outputs if tensor.aliases is not None}
        names = list(dict.fromkeys([*(name for name in self._instrumented if name not in feeds), *shapes, *written]))
        try:
            results = self._session.run(names, dict(feeds))
        except Exception as error:  # the library raises bare RuntimeError and its own types alike
            raise CalibrationError(
                f"ONNX Runtime failed on sample {self.sample or '?'} in the graph {self.graph.name!r}: "
                f"{one_line(error)}. Look at that sample."
            ) from None
        found = {**feeds, **dict(zip(names, results, strict=True))}
        with self._lock:
            self.random_input_check.update(feeds)
            for name, stats in self._instrumented.items():
                self._count(name, stats, found[name], feeds.get(MASK))
        for name, buffer in written.items():
            feeds[buffer][...] = found[name]
        return {name: found[name] for name in shapes}

    def _count(self, name: str, stats: TensorStats, values: Array, mask: Array | None) -> None:
        try:
            stats.update(values, mask)
        except CalibrationError as error:
            raise CalibrationError(
                f"{name} (module {stats.module or 'top'}) of the graph {self.graph.name!r} has {error} in sample "
                f"{self.sample or '?'}; expected finite values. Leave that sample out, or look at the checkpoint."
            ) from None

    @property
    def ranges(self) -> dict[str, TensorRanges]:
        """Return the ranges by tensor, in the order asked. Raises CalibrationError if one was never computed."""
        ranges = {name: stats.ranges() for name, stats in self._instrumented.items()}
        require_reached(ranges, self._model)
        return ranges

    def take_ranges(self) -> dict[str, TensorRanges]:
        """Return the ranges by tensor of the calls since the last time, which may have reached only some of them."""
        ranges = {name: stats.ranges() for name, stats in self._instrumented.items()}
        for stats in self._instrumented.values():
            stats.histogram = Histogram()
        return ranges

    def kept_rows(self, name: str) -> NDArray[np.float32]:
        """Return positions of the tensor, (R, E), R at most ``rows``."""
        return self._instrumented[name].reservoir.rows


class TensorStats:
    """The histogram of one tensor and, where asked for, its channels' ranges and some of its positions."""

    def __init__(self, module: str, padded: bool, by_channel: bool, rows: int) -> None:
        self.module = module
        self.histogram = Histogram()
        self.reservoir = Reservoir(rows)
        self._keeps_rows = rows > 0
        self._padded = padded
        self._by_channel = by_channel
        self._channels: tuple[Array, Array] | None = None

    def update(self, values: Array, mask: Array | None) -> None:
        """Count ``values``, float32 of any shape; (B, S, ...) where it is padded, and ``mask`` is (B, S)."""
        if self._padded and mask is not None and values.shape[:2] == mask.shape and not mask.all():
            values = values[mask != 0]
        self.histogram.update(values)
        if self._by_channel and values.size:
            rows = values.reshape(-1, values.shape[-1])
            least, most = rows.min(axis=0), rows.max(axis=0)
            if self._channels is not None:
                least, most = np.minimum(least, self._channels[0]), np.maximum(most, self._channels[1])
            self._channels = (least, most)
            if self._keeps_rows:
                self.reservoir.offer(rows)

    def ranges(self) -> TensorRanges:
        return TensorRanges(self.histogram, ChannelRanges(*self._channels) if self._channels is not None else None)


class Reservoir:
    """A sample of at most ``size`` rows of all that are offered, each as likely as any other.

    Each row draws a number, and the rows with the smallest numbers stay (bottom-k sampling).
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._chance = np.random.default_rng(SEED)
        self._drawn: NDArray[np.float64] = np.empty(0)
        self.rows: NDArray[np.float32] = np.empty((0, 0), np.float32)

    def offer(self, rows: NDArray[np.float32]) -> None:
        """Draw a number for each of ``rows`` (N, E), and keep those that are among the smallest."""
        drawn = self._chance.random(len(rows))
        free = self._size - len(self._drawn)
        if free > 0:
            self.rows = np.concatenate([self.rows.reshape(-1, rows.shape[1]), rows[:free]])
            self._drawn = np.concatenate([self._drawn, drawn[:free]])
            drawn, rows = drawn[free:], rows[free:]
        held = len(self._drawn)
        stay = np.argsort(np.concatenate([self._drawn, drawn]), kind="stable")[: self._size]
        enter = stay[stay >= held] - held
        leave = np.ones(held, bool)
        leave[stay[stay < held]] = False
        self.rows[leave], self._drawn[leave] = rows[enter], drawn[enter]


def require_reached(ranges: Mapping[str, TensorRanges], model: ir.Model) -> None:
    """Raise CalibrationError where one of the ``ranges``, by name of a tensor of ``model``, is of no value at all."""
    missed = next((name for name, found in ranges.items() if not found.histogram.count), None)
    if missed is not None:
        module = module_of(instrumented_values(model, [missed])[missed]) or "top"
        raise CalibrationError(
            f"no sample reached {missed} (module {module}) of the graph {model.graph.name!r}. Give calibration data "
            "that uses every graph of the model."
        )


def instrumented_values(model: ir.Model, names: Iterable[str]) -> dict[str, ir.Value]:
    """Return the float32 tensors of the main graph with these names; CalibrationError for a name that is none."""
    values = {value.name: value for value in model.graph.inputs}
    values |= {value.name: value for node in model.graph for value in node.outputs}
    found = {}
    for name in names:
        value = values.get(name)
        if value is None or value.dtype not in (ir.DataType.FLOAT, None):
            has = "has no such tensor" if value is None else f"has it as {value.dtype}"
            raise CalibrationError(
                f"{name!r} cannot be measured: the graph {model.graph.name!r} {has}; expected a float32 tensor. "
                "Name tensors of the FP32 graph."
            )
        found[name] = value
    return found


def module_of(value: ir.Value) -> str:
    """Return the path of the module that computed the value; empty for a graph input."""
    node = value.producer()
    return node.metadata_props.get(MODULE, "") if node is not None else ""


def is_padded(value: ir.Value, mask: ir.Value | None) -> bool:
    """Return whether the leading axes may be those of the mask, by their names: sizes may be equal by chance.

    Where names are not known, ``TensorStats.update`` still compares the sizes.
    """
    if mask is None or mask.shape is None or len(mask.shape) != 2:
        return False
    leading = list(value.shape)[:2] if value.shape is not None else []
    return all(ours == theirs or None in (ours, theirs) for ours, theirs in zip(leading, mask.shape, strict=False))


def open_instrumented(model: ir.Model, values: Mapping[str, ir.Value], threads: int | None) -> tuple[Any, Any]:
    """Return a session that outputs ``values`` as well, and the weights, which it shares with ``model``."""
    instrumented = model.clone()
    inner = {value.name: value for node in instrumented.graph for value in node.outputs}
    known = {value.name for value in (*instrumented.graph.inputs, *instrumented.graph.outputs)}
    instrumented.graph.outputs.extend(inner[name] for name in values if name not in known)
    for value in instrumented.graph.outputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    library = onnxruntime()
    weights = {}
    for name, value in instrumented.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > INLINE:
            array = np.require(tensor.numpy(), requirements=["C", "A"])
            weights[name] = library.OrtValue.ortvalue_from_numpy(array)
            value.const_value = ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name
            )
    options = library.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    options.enable_cpu_mem_arena = False  # give memory back between shapes
    options.enable_mem_pattern = False  # a plan of it would be kept for every shape
    options.enable_mem_reuse = False  # ONNX Runtime infers wrong shapes of some tensors of cross-attention
    for key, setting in thread_entries().items():
        options.add_session_config_entry(key, setting)
    options.add_external_initializers([*weights], [*weights.values()])
    try:
        data = ir.to_proto(instrumented).SerializeToString()
        session = library.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise BackendError(f"ONNX Runtime cannot load the graph {model.graph.name!r}: {one_line(error)}") from None
    return session, weights
