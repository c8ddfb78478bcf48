"""What a user may say about quantisation, and what it means where nothing is said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transom.calib.scales import BLOCKS, METHODS
from transom.export.passes.extras import EXTRAS
from transom.export.quantization.quantizer import ACTIVATIONS, DYNAMIC, NONE, STATIC, Recipe
from transom.runtime.errors import ExportError
from transom.runtime.inputs import is_decoder
from transom.runtime.spec import Graph

REFERENCE_DATA = {  # the reference models' own training inputs, names of transom.calib.named
    "vit": "digits",
    "clip": "digit-captions",
    "minilm": "wordnet",
    "bert": "austen",
    "gpt": "austen",
    "transformer": "dates",
}


@dataclass(frozen=True)
class QuantizeOptions:
    """``activations`` None: by graph, see ``recipe``. ``ranges`` is a table that was made before, in place of data."""

    calibration_data: tuple[str, ...] = ()
    method: str = "mse"
    smooth: bool = True
    activations: str | None = None
    weight_bits: int = 8
    block_size: int = 32
    extras: tuple[str, ...] = ()
    ranges: Path | None = None
    gate: bool = True

    def data_for(self, source: str) -> tuple[str, ...]:
        """What to calibrate on. Raises ExportError where a model that is not ours comes without data."""
        if self.calibration_data:
            return self.calibration_data
        if source in REFERENCE_DATA:
            return (REFERENCE_DATA[source],)
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
            ("--weight-bits", self.weight_bits, (8, 7)),
            ("--block-size", self.block_size, BLOCKS),
            *(("--also", extra, EXTRAS) for extra in self.extras),
        ):
            if value not in known:
                raise ExportError(f"{what} is {value!r}; expected one of {', '.join(map(str, known))}.")
        if precision == "int4" and (self.activations not in (None, NONE) or self.weight_bits != 8 or self.extras):
            raise ExportError(
                "--precision int4 is of weights alone; leave out --activations, --weight-bits and --also, or "
                "choose --precision int8."
            )

    def recipe(self, precision: str, graphs: tuple[Graph, ...]) -> Recipe:
        """For "int8": static for encoders, dynamic for decoders, whose steps have few rows. For "int4": weights only.

        Raises ExportError as ``check`` does, and where --also has nothing to work on.
        """
        self.check(precision)
        if precision == "int4":
            return Recipe({graph.name: NONE for graph in graphs}, self.method, 4, self.block_size)
        modes = {graph.name: self.activations or (DYNAMIC if is_decoder(graph) else STATIC) for graph in graphs}
        if self.extras and STATIC not in modes.values():
            raise ExportError("--also needs ranges fixed beforehand; choose --activations static, or leave it out.")
        return Recipe(modes, self.method, self.weight_bits, self.block_size, self.extras)


PLAIN = QuantizeOptions()  # nothing was said
