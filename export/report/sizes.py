"""What the bundle's files take, and how much of each is weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from transom.export.report.drawing.markup import numeric, section, table, words
from transom.export.report.drawing.numbers import bytes_text
from transom.export.report.graphs import DEVICE
from transom.runtime.bundle import Bundle
from transom.runtime.golden import GOLDEN

MOST_ROWS = 50
INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)


@dataclass(frozen=True)
class Weights:
    """``parameters`` numbers in ``bytes`` bytes of a file."""

    parameters: int
    bytes: int


def weights_of(bundle: Bundle, models: Mapping[str, ir.Model]) -> dict[str, Weights]:
    """The weights in each file; what several graphs read from one file is counted once."""
    found: dict[str, Weights] = {}
    for file in bundle.manifest.graphs:
        for name in file.files.values():
            found[name] = summed(each for each in tensors(models[name]) if each[0] is None)
        if file.weights is not None:
            found[file.weights] = summed(
                {each for model in models.values() for each in tensors(model) if each[0] is not None}
            )
    return found


def parameters_of(bundle: Bundle, models: Mapping[str, ir.Model]) -> int:
    """The numbers of one variant, which the same in another variant do not add to."""
    used = [models[file.file_for(DEVICE)] for file in bundle.manifest.graphs]
    inside = [each for model in used for each in tensors(model) if each[0] is None]
    outside = {each for model in used for each in tensors(model) if each[0] is not None}
    return summed([*inside, *outside]).parameters


Counted = tuple[int | None, int, int]  # where it lies outside the graph's file; numbers; bytes


def summed(weights: Iterable[Counted]) -> Weights:
    found = list(weights)
    return Weights(sum(numbers for _, numbers, _ in found), sum(size for _, _, size in found))


def tensors(model: ir.Model) -> list[Counted]:
    """The weights of a graph: floating-point numbers, and matrices of integers of 8 bits or fewer."""
    packed = {  # two weights of 4 bits share a byte
        blocks.name
        for node in model.graph
        if node.op_type == "MatMulNBits" and "bits" in node.attributes and node.attributes["bits"].value == 4
        for blocks in node.inputs[1:2]
        if blocks is not None
    }
    values = {name: weight.const_value for name, weight in model.graph.initializers.items()}
    return [
        (
            value.offset if isinstance(value, ir.ExternalTensor) else None,
            value.size * (1 + (name in packed)),
            value.nbytes,
        )
        for name, value in values.items()
        if value is not None and (value.dtype.is_floating_point() or (value.dtype in INTEGERS and len(value.shape) > 1))
    ]


def running_bytes(bundle: Bundle) -> int:
    """Bytes of everything that running needs: all but the golden values."""
    return sum(file.size for name, file in bundle.manifest.files.items() if name != GOLDEN)


def sizes_section(bundle: Bundle, weights: Mapping[str, Weights], parameters: int) -> str:
    """One bar per file, the weights in it darker."""
    files = bundle.manifest.files
    largest = max((file.size for file in files.values()), default=0) or 1
    rows = []
    for name, file in sorted(files.items(), key=lambda item: -item[1].size)[:MOST_ROWS]:
        inside = weights.get(name)
        share = min(inside.bytes / file.size, 1.0) if inside and file.size else 0.0
        note = "for checks" if name == GOLDEN else f"{share:.0%}" if share else "–"
        drawn = f'<i style="width:{100 * file.size / largest:.2f}%"><b style="width:{100 * share:.2f}%"></b></i>'
        rows.append([words(name, 80), drawn, bytes_text(file.size), note])
    total = sum(file.size for file in files.values())
    return section(
        "Size",
        f"<p>{bytes_text(running_bytes(bundle))} to run it, of {bytes_text(total)} in {len(files)} files; "
        f'{parameters:,} weights. <span class="soft">The dark part of a bar is weights. Golden values '
        "are what <code>transom selftest</code> compares with.</span></p>",
        table(("file", "to scale", "size", "weights"), rows, {1: "bar", **numeric(2, 3)}),
    )
