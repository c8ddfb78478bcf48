"""The table of ranges: the result of a calibration, in a file that is bound by hash to the graphs it was taken of.

Every target derives its scales from this one table, so calibrating again is never needed for another
precision or device. The file often comes from elsewhere: ``load_table`` trusts none of it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.calib.histogram import MAX_LIMIT, Histogram
from transom.runtime.errors import BundleError, CalibrationError
from transom.runtime.json_reader import Fields, parse_json, shortened

RANGES = "ranges.json"
FORMAT = "transom-ranges"
FORMAT_VERSION = 1
MAX_TABLE_BYTES = 256 << 20  # of BERT-base: 3 MB
AGAIN = "Calibrate again."
Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ChannelRanges:
    """The least and greatest value of each channel, float32 (E,), over all positions."""

    minimum: Array
    maximum: Array


@dataclass(frozen=True, eq=False)
class TensorRanges:
    """The values of one tensor: their histogram and, where asked for, the ranges of its last axis' channels."""

    histogram: Histogram
    channels: ChannelRanges | None = None


@dataclass(frozen=True, eq=False)
class Smoothing:
    """Factors (E,) by which an activation is divided and the weights that read it are multiplied.

    ``alpha`` is the migration strength they came from (SmoothQuant, arXiv:2211.10438, section 4).
    """

    alpha: float
    factors: Array


@dataclass(frozen=True, eq=False)
class GraphRanges:
    """The ranges of one graph.

    ``sha256`` is of the canonical FP32 graph (``transom.calib.graph_hash.graph_sha256``), before any smoothing.

    ``tensors`` were measured after it. ``smoothing`` is by the names of the activations that are divided.
    """

    sha256: str
    tensors: Mapping[str, TensorRanges]
    smoothing: Mapping[str, Smoothing] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RangeTable:
    """The ranges of ``graphs`` by name; ``data`` has the name, the number of samples and the sha256 of the data."""

    graphs: Mapping[str, GraphRanges]
    data: Mapping[str, Any]

    def require(self, name: str, sha256: str) -> GraphRanges:
        """Return the ranges of the graph called ``name``; CalibrationError where they are another graph's."""
        found = self.graphs.get(name)
        if found is None:
            has = shortened(", ".join(self.graphs)) or "no graph"
            raise CalibrationError(f"the table of ranges is of {has}, this model has the graph {name!r}. {AGAIN}")
        if found.sha256 != sha256:
            raise CalibrationError(
                f"the table of ranges is from another graph {name!r}: its sha256 is {found.sha256[:12]}..., that of "
                f"this one is {sha256[:12]}... Weights, names or operators differ. {AGAIN}"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "data": dict(self.data),
            "graphs": {name: graph_to_json(graph) for name, graph in self.graphs.items()},
        }

    @classmethod
    def from_json(cls, value: Any, where: str = RANGES) -> RangeTable:
        """Read a table, every field checked; CalibrationError lists all that is wrong."""
        problems: list[str] = []
        top = Fields(value, where, problems)
        top.text("format", among=[FORMAT])
        top.integer("format_version", FORMAT_VERSION, FORMAT_VERSION)
        data = top.mapping("data")
        graphs = {str(name): graph_from_json(name, found, problems) for name, found in top.mapping("graphs").items()}
        top.done()
        described = Fields(data, "data", problems)
        described.text("name")
        described.integer("samples", 1, 2**53)
        described.take("sha256", is_sha256, "64 hexadecimal digits")
        described.done()
        if not problems and not graphs:
            problems.append("graphs is empty")
        if problems:
            shown = "; ".join(map(shortened, problems[:4]))
            more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
            raise CalibrationError(f"{where} is no usable table of ranges: {shown}{more}. {AGAIN}")
        return cls(graphs, data)

    def to_bytes(self) -> bytes:
        """Return the file: JSON on one line."""
        return json.dumps(self.to_json(), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def load_table(path: Path | str) -> RangeTable:
    """Read a table from an untrusted file. Raises CalibrationError."""
    path = Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for a writer
            raise CalibrationError(f"{path} is no regular file; expected a table of ranges.")
        with path.open("rb") as file:
            data = file.read(MAX_TABLE_BYTES + 1)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}. Give a table of ranges.") from None
    if len(data) > MAX_TABLE_BYTES:
        raise CalibrationError(f"{path} has {found.st_size} bytes, at most {MAX_TABLE_BYTES} are read. {AGAIN}")
    try:
        value = parse_json(data, str(path))
    except BundleError as error:
        raise CalibrationError(f"{str(error).partition('; copy')[0]}. {AGAIN}") from None
    return RangeTable.from_json(value, str(path))


def graph_to_json(graph: GraphRanges) -> dict[str, Any]:
    return {
        "sha256": graph.sha256,
        "tensors": {name: tensor_to_json(tensor) for name, tensor in graph.tensors.items()},
        "smoothing": {
            name: {"alpha": smoothing.alpha, "factors": shortest(smoothing.factors)}
            for name, smoothing in graph.smoothing.items()
        },
    }


def tensor_to_json(tensor: TensorRanges) -> dict[str, Any]:
    histogram = tensor.histogram.to_json()
    if tensor.channels is None:
        return {"histogram": histogram}
    channels = {"min": shortest(tensor.channels.minimum), "max": shortest(tensor.channels.maximum)}
    return {"histogram": histogram, "channels": channels}


def shortest(values: Array) -> list[float]:
    """Return, for each float32, the float64 with the fewest digits that rounds to it."""
    return [float(str(value)) for value in values]


def graph_from_json(name: str, value: Any, problems: list[str]) -> GraphRanges:
    fields = Fields(value, f"graphs.{name}", problems)
    sha256 = fields.take("sha256", is_sha256, "64 hexadecimal digits")
    tensors, smoothing = fields.mapping("tensors"), fields.mapping("smoothing", {})
    fields.done()
    return GraphRanges(
        sha256,
        {str(key): tensor_from_json(f"{name}.{key}", found, problems) for key, found in tensors.items()},
        {str(key): smoothing_from_json(f"{name}.{key}", found, problems) for key, found in smoothing.items()},
    )


def tensor_from_json(where: str, value: Any, problems: list[str]) -> TensorRanges:
    fields = Fields(value, where, problems)
    histogram = Histogram.from_json(fields.mapping("histogram"), f"{where}.histogram", problems)
    found = fields.mapping("channels", None)
    fields.done()
    if found is None:
        return TensorRanges(histogram)
    fields = Fields(found, f"{where}.channels", problems)
    least = fields.take("min", is_float32s, "finite float32 numbers")
    most = fields.take("max", is_float32s, "finite float32 numbers")
    fields.done()
    if least is None or most is None:
        return TensorRanges(histogram)
    channels = ChannelRanges(np.array(least, np.float32), np.array(most, np.float32))
    if len(least) != len(most) or (channels.minimum > channels.maximum).any():
        problems.append(
            f"{where}.channels has a min above its max, or {len(least)} of one and {len(most)} of the other"
        )
    elif [float(channels.minimum.min()), float(channels.maximum.max())] != [histogram.minimum, histogram.maximum]:
        problems.append(f"{where}.channels reach from another min to another max than the histogram")
    return TensorRanges(histogram, channels)


def smoothing_from_json(where: str, value: Any, problems: list[str]) -> Smoothing:
    fields = Fields(value, where, problems)
    alpha = fields.take("alpha", lambda v: type(v) in (int, float) and 0 <= v <= 1, "0..1")
    factors = fields.take("factors", are_factors, "finite numbers above zero: a factor divides")
    fields.done()
    return Smoothing(float(alpha or 0), np.array(factors or [], np.float32))


def is_float32s(value: Any, accept: Callable[[Array], bool] = lambda _: True) -> bool:
    """Return whether a JSON value is an array of at least one number, all finite as float32 (a bool is no number)."""
    if not isinstance(value, list) or not value or {*map(type, value)} - {int, float}:
        return False
    if max(map(abs, value)) >= MAX_LIMIT:  # before numpy sees an integer of a thousand digits
        return False
    with np.errstate(over="ignore"):
        numbers = np.array(value, np.float32)
    return bool(np.isfinite(numbers).all()) and accept(numbers)


def are_factors(value: Any) -> bool:
    return is_float32s(value, lambda numbers: bool((numbers > 0).all()))


def is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
