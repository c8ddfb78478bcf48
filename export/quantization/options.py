"""What a user may say about quantisation, and what it means where nothing is said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transom.calib.scales import BLOCKS, METHODS
from transom.export.passes.qdq_static import OPTIONAL_SITES
from transom.export.quantization.quantizer import ACTIVATIONS, DYNAMIC, NONE, STATIC, QuantizationConfig
from transom.export.reference_models import REFERENCE_MODELS
from transom.runtime.errors import ExportError
from transom.runtime.feeds import is_decoder
from transom.runtime.graph_spec import Graph

WEIGHT_BITS, BLOCK_SIZE = 8, 32  # where nothing is said


@dataclass(frozen=True)
class QuantizeOptions:
    """``activations``, ``weight_bits`` and ``block_size`` are None where nothing was said: see ``config``.

    ``ranges`` is a table that was made before, in place of data.
    """

    calibration_data: tuple[str, ...] = ()
    method: str = "mse"
    smooth: bool = True
    activations: str | None = None
    weight_bits: int | None = None
    block_size: int | None = None
    extras: tuple[str, ...] = ()
    ranges: Path | None = None
    gate: bool = True

    def data_for(self, source: str) -> tuple[str, ...]:
        """What to calibrate on. Raises ExportError where a model that is not ours comes without data."""
        if self.calibration_data:
            return self.calibration_data
        if source in REFERENCE_MODELS:
            return (REFERENCE_MODELS[source].calibration_set,)
        if self.ranges is not None:
            raise ExportError(
                f"quantising {source} by {self.ranges} needs inputs for its accuracy gate, and none were given. "
                "Name with --calibration-data what the ranges were taken on: a quarter of it was left out then."
            )
        raise ExportError(
            f"quantising {source} needs inputs like those it will see, and none were given. Name some with "
            "--calibration-data: a .txt or .jsonl of texts, a folder of images, a .npz of raw inputs; some hundred "
            "samples do."
        )

    def check(self, precision: str) -> None:
        """Raises ExportError for values and combinations that mean nothing, whatever the model."""
        for what, value, known in (
            ("--method", self.method, METHODS),
            ("--activations", self.activations or STATIC, ACTIVATIONS),
            ("--weight-bits", self.weight_bits or WEIGHT_BITS, (8, 7)),
            ("--block-size", self.block_size or BLOCK_SIZE, BLOCKS),
            *(("--also", extra, OPTIONAL_SITES) for extra in self.extras),
        ):
            if value not in known:
                raise ExportError(f"{what} is {value!r}; expected one of {', '.join(map(str, known))}.")
        if precision == "int4" and (self.activations not in (None, NONE) or self.weight_bits or self.extras):
            raise ExportError(
                "--precision int4 is of weights alone; leave out --activations, --weight-bits and --also, or "
                "choose --precision int8."
            )
        weights_alone = precision == "int4" or self.activations == NONE
        if weights_alone and self.weight_bits:
            raise ExportError(
                f"--weight-bits is {self.weight_bits}, and --activations none stores weights in blocks of 8 bits, "
                "whose products never saturate; leave it out, or choose --activations static or dynamic."
            )
        if self.block_size and not weights_alone:
            raise ExportError(
                f"--block-size is {self.block_size}, and weights in blocks are for weights alone; leave it out, or "
                "choose --activations none or --precision int4."
            )

    def config(self, precision: str, graphs: tuple[Graph, ...]) -> QuantizationConfig:
        """For "int8": static for encoders, dynamic for decoders, whose steps have few rows. For "int4": weights only.

        Raises ExportError as ``check`` does, and where --also has nothing to work on.
        """
        self.check(precision)
        if precision == "int4":
            return QuantizationConfig(
                {graph.name: NONE for graph in graphs}, self.method, 4, self.block_size or BLOCK_SIZE
            )
        modes = {graph.name: self.activations or (DYNAMIC if is_decoder(graph) else STATIC) for graph in graphs}
        if self.extras and STATIC not in modes.values():
            raise ExportError("--also needs ranges fixed beforehand; choose --activations static, or leave it out.")
        bits, block_size = self.weight_bits or WEIGHT_BITS, self.block_size or BLOCK_SIZE
        return QuantizationConfig(modes, self.method, bits, block_size, self.extras)


PLAIN = QuantizeOptions()  # nothing was said
