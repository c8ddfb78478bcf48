"""What the bundle's files take, and how much of each is weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from transom.export.report.drawing.markup import numeric, section, table, words
from transom.export.report.drawing.numbers import bytes_text
from transom.runtime.bundle import Bundle
from transom.runtime.selftest import GOLDEN

MOST_ROWS = 50


@dataclass(frozen=True)
class Weights:
    """``parameters`` floating-point numbers in ``bytes`` bytes of a file."""

    parameters: int
    bytes: int


def weights_of(bundle: Bundle, models: Mapping[str, ir.Model]) -> dict[str, Weights]:
    """The weights in each file; what several graphs read from one file is counted once."""
    found: dict[str, Weights] = {}
    for file in bundle.manifest.graphs:
        for name in file.files.values():
            inside = [w for w in tensors(models[name]) if not isinstance(w, ir.ExternalTensor)]
            found[name] = Weights(sum(w.size for w in inside), sum(w.nbytes for w in inside))
        if file.weights is not None:
            outside = {
                (w.offset, w.length): w
                for name, model in models.items()
                for w in tensors(model)
                if isinstance(w, ir.ExternalTensor)
            }
            found[file.weights] = Weights(
                sum(w.size for w in outside.values()), sum(w.nbytes for w in outside.values())
            )
    return found


def tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    """The floating-point weights of a graph."""
    values = (weight.const_value for weight in model.graph.initializers.values())
    return [value for value in values if value is not None and value.dtype.is_floating_point()]


def running_bytes(bundle: Bundle) -> int:
    """Bytes of everything that running needs: all but the golden values."""
    return sum(file.size for name, file in bundle.manifest.files.items() if name != GOLDEN)


def sizes_section(bundle: Bundle, weights: Mapping[str, Weights]) -> str:
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
    parameters = sum(each.parameters for each in weights.values())
    total = sum(file.size for file in files.values())
    return section(
        "Size",
        f"<p>{bytes_text(running_bytes(bundle))} to run it, of {bytes_text(total)} in {len(files)} files; "
        f'{parameters:,} weights. <span class="soft">The dark part of a bar is weights. Golden values '
        "are what <code>transom selftest</code> compares with.</span></p>",
        table(("file", "to scale", "size", "weights"), rows, {1: "bar", **numeric(2, 3)}),
    )
