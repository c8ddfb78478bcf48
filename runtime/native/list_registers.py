"""Keep what a list of operators reads and writes while it is checked: registers, tensors, inputs, epilogues."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

from transom.runtime.graph_spec import Graph, Tensor, cache_inputs, token_input
from transom.runtime.native.operator_json import MAX_INTEGER
from transom.runtime.native.operators import (
    ACTIVATIONS,
    DYNAMIC_ZERO_POINT,
    L2,
    LAYER,
    NORMS,
    Epilogue,
    Norm,
    OperatorList,
    Quantized,
)

ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1, "uint8": 1}
FLOATS = ("float32", "float16")

WRITE_INDICES = "write_indices"  # of graphs that write caches: where each row's new tokens go
SMALLEST_SCALE, LARGEST_SCALE = 1e-30, 1e30  # of 8-bit activations; the inverse is a float32 too


@dataclass(frozen=True)
class Register:
    """Rows of ``columns`` that an operator wrote: float32, or uint8 as ``quantized`` says."""

    rows: str
    columns: int
    quantized: Quantized | None = None

    @property
    def dtype(self) -> str:
        return "float32" if self.quantized is None else "uint8"

    @property
    def row_bytes(self) -> int:
        return self.columns * ITEM_BYTES[self.dtype]


@dataclass
class ListState:
    """A list while it is checked: ``registers`` grow with each operator, ``problems`` with each that is wrong."""

    operators: OperatorList
    graph: Graph
    weights_bytes: int
    problems: list[str] = field(default_factory=list)
    registers: dict[str, Register] = field(default_factory=dict)
    where: str = "the list"

    def __post_init__(self) -> None:
        self.uses: Counter[str] = Counter()  # of packed weights
        self.check_inputs()
        self.check_tensors()

    def expect(self, right: bool, problem: str) -> bool:
        """Note a problem of the operator at hand unless ``right``."""
        if not right:
            self.problems.append(f"{self.where} {problem}")
        return right

    def check_inputs(self) -> None:
        operators, known = self.operators, self.graph.inputs_by_name
        self.expect(
            operators.graph == self.graph.name, f"is for the graph {operators.graph!r}, not {self.graph.name!r}"
        )
        ids = known.get(operators.ids)
        self.by_token: tuple[str | int, ...] = ()  # the shape of inputs that have a value for each token
        if self.expect(ids is not None, f"has the ids {operators.ids!r}, which is no input of the graph") and ids:
            images = ids.dtype == "float32" and len(ids.shape) == 4 and all(isinstance(s, int) for s in ids.shape[1:])
            tokens = ids.dtype == "int64" and len(ids.shape) == 2
            self.expect(
                (images or tokens) and ids.shape[0] == "B",
                f"has the ids {operators.ids!r} {shape_of(ids)}, expected int64 (B, S) or float32 (B, 3, 224, 224)",
            )
            self.by_token = ids.shape if tokens else ()
        if operators.mask is not None:
            self.token_input(operators.mask, "the mask")
        if cache_inputs(self.graph):
            self.expect(operators.mask is None, "has a mask and caches, expected one of them")
            indices = known.get(WRITE_INDICES)
            self.expect(
                indices is not None and (indices.dtype, indices.shape) == ("int64", ("B",)),
                f"has caches and the graph no input {WRITE_INDICES} int64 (B)",
            )
            first = token_input(self.graph).name
            self.expect(operators.ids == first, f"has the ids {operators.ids!r}, expected the tokens {first!r}")

    def check_tensors(self) -> None:
        for name, tensor in self.operators.tensors.items():
            self.where = f"tensors[{name[:60]!r}]"
            item = ITEM_BYTES.get(tensor.dtype, 0)
            if not self.expect(
                item > 0 and tensor.dtype != "uint8", f"is {tensor.dtype!r}, expected float32, float16 or int8"
            ):
                continue
            size = item * prod(tensor.shape)
            self.expect(
                0 <= tensor.offset <= self.weights_bytes - size,
                f"has {size} bytes at {tensor.offset}, beyond the {self.weights_bytes} bytes of the weights",
            )
            self.expect(tensor.offset % item == 0, f"lies at {tensor.offset}, expected a multiple of {item}")
        self.where = "the list"

    def token_input(self, name: str, what: str) -> Tensor | None:
        """Return the graph's input that has an integer for each token."""
        found = self.graph.inputs_by_name.get(name)
        good = found is not None and found.dtype == "int64" and bool(self.by_token) and found.shape == self.by_token
        self.expect(good, f"takes {name[:60]!r} as {what}, which is no input int64 (B, S) of the shape of the ids")
        return found if good else None

    def tensor(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None, rank: int = 0) -> Any:
        """Return a tensor of one of ``dtypes`` and of a shape, or of a rank; None where it is not such a one.

        Axes of 1 before a shape do not count.
        """
        found = self.operators.tensors.get(name)
        if not self.expect(found is not None, f"reads the tensor {name[:60]!r}, which the list does not have"):
            return None
        assert found is not None
        good = found.dtype in dtypes and (
            trimmed(found.shape) == trimmed(shape) if shape is not None else len(found.shape) == rank
        )
        expected = f"{' or '.join(dtypes)} {shape if shape is not None else f'of {rank} axes'}"
        self.expect(good, f"reads {name[:60]!r}, {found.dtype} {found.shape}, expected {expected}")
        return found if good else None

    def vector(self, name: str) -> Any:
        """Return a tensor of one axis, but for axes of 1 before it."""
        found = self.operators.tensors.get(name)
        return self.tensor(name, FLOATS, None if found is None else found.shape[-1:])

    def read(self, name: str, rows: str | None = None, dtype: str | None = "float32") -> Register | None:
        """Return a register that was written, with such rows and of such a dtype."""
        found = self.registers.get(name)
        if not self.expect(found is not None, f"reads the register {name[:60]!r}, which nothing wrote before"):
            return None
        assert found is not None
        good = self.expect(rows in (None, found.rows), f"reads {name[:60]!r}, rows of {found.rows}, expected {rows}")
        good &= self.expect(dtype in (None, found.dtype), f"reads {name[:60]!r}, {found.dtype}, expected {dtype}")
        return found if good else None

    def write(self, name: str, register: Register) -> None:
        self.expect(name not in self.registers, f"writes the register {name[:60]!r} once more, expected a new one")
        self.registers.setdefault(name, register)

    def epilogue(self, then: Epilogue, rows: str, columns: int, *, plain: bool = False) -> None:
        """Check what follows an operator of so many columns; ``plain``: nothing but out and quantized may."""
        if not self.expect(0 < columns <= MAX_INTEGER, f"has {columns} columns, expected 1..{MAX_INTEGER}"):
            return
        if plain:
            parts = (then.bias, then.residual, then.norm, then.sum)
            self.expect(not any(parts) and then.activation == ACTIVATIONS[0], "has more than out and quantized")
        found = [self.vector(name) for name in then.bias]
        if found and all(found):
            total = sum(prod(tensor.shape) for tensor in found)
            self.expect(total == columns, f"has {total} elements of bias, expected {columns}")
        self.expect(
            then.activation in ACTIVATIONS,
            f"has the activation {then.activation[:60]!r}, expected one of {', '.join(ACTIVATIONS)}",
        )
        if then.residual is not None:
            residual = self.read(then.residual, rows)
            wrong = residual is not None and residual.columns != columns
            self.expect(
                not wrong, f"adds {then.residual[:60]!r} of {residual and residual.columns} columns to {columns}"
            )
        if then.norm is not None:
            self.norm(then.norm, columns)
        results = [name for name in (then.sum, then.out, then.quantized and then.quantized.to) if name is not None]
        self.expect(bool(results), "writes no register, expected sum, out or quantized")
        for name in (then.sum, then.out):
            if name is not None:
                self.write(name, Register(rows, columns))
        if then.quantized is not None:
            self.quantized(then.quantized, columns)
            self.write(then.quantized.to, Register(rows, columns, then.quantized))

    def norm(self, norm: Norm, columns: int) -> None:
        self.expect(norm.kind in NORMS, f"has the norm {norm.kind[:60]!r}, expected one of {', '.join(NORMS)}")
        self.expect(norm.epsilon >= 0, f"has the epsilon {norm.epsilon}, expected none below 0")
        self.expect(norm.kind != L2 or norm.weight is None, "has a weight of an L2 norm, expected none")
        self.expect(norm.kind == LAYER or norm.bias is None, f"has a bias of {norm.kind[:60]!r}, expected none")
        for name in (norm.weight, norm.bias):
            if name is not None:
                self.tensor(name, FLOATS, (columns,))

    def quantized(self, quantized: Quantized, columns: int) -> None:
        if quantized.scale is None:
            self.expect(
                quantized.zero_point == DYNAMIC_ZERO_POINT,
                f"has the zero point {quantized.zero_point} without a scale, expected {DYNAMIC_ZERO_POINT}",
            )
        else:
            self.expect(
                SMALLEST_SCALE <= quantized.scale <= LARGEST_SCALE,
                f"has the scale {quantized.scale}, expected {SMALLEST_SCALE}..{LARGEST_SCALE}",
            )
            self.expect(0 <= quantized.zero_point <= 255, f"has the zero point {quantized.zero_point}, expected 0..255")
        if quantized.multiplier is not None:
            self.tensor(quantized.multiplier, FLOATS, (columns,))


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the axes of 1 that it begins with."""
    return trimmed(shape[1:]) if len(shape) > 1 and shape[0] == 1 else shape


def shape_of(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape for a message: ``float32 (B, S, 768)``."""
    return f"{tensor.dtype} ({', '.join(map(str, tensor.shape))})"
