"""The user's options for quantisation, and the configuration that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transom.calib.scales import BLOCKS, METHODS
from transom.export.passes.qdq_static import OPTIONAL_SITES
from transom.export.reference_models import REFERENCE_MODELS
from transom.runtime.errors import ExportError
from transom.runtime.graph_spec import Graph, is_decoder
from transom.runtime.manifest_graphs import BOTH, CPU_ALONE, TENSORRT_ALONE

STATIC, DYNAMIC, NONE = "static", "dynamic", "none"  # how activations are quantised; "none": weights alone
ACTIVATIONS = (STATIC, DYNAMIC, NONE)
METHOD, WEIGHT_BITS, BLOCK_SIZE = "mse", 8, 32  # by default


@dataclass(frozen=True)
class QuantizationConfig:
    """The choices by which the graphs of a model are quantised.

    activations     one of ACTIVATIONS by graph
    method          how clip ranges are chosen, one of calib.scales.METHODS
    weight_bits     8, 7 (of 8, for CPUs whose products saturate) or 4, the last with activations "none" alone
    block_size      how many weights along K share a scale where activations are "none"
    optional_sites  further activations to quantise, some of OPTIONAL_SITES
    made_for        what the graphs are for, one of MADE_FOR: each variant that ships is made and measured
    """

    activations: Mapping[str, str]
    method: str = METHOD
    weight_bits: int = WEIGHT_BITS
    block_size: int = BLOCK_SIZE
    optional_sites: tuple[str, ...] = ()
    made_for: str = BOTH

    @property
    def for_cpu(self) -> bool:
        """Return whether a graph for the CPU ships; one of weights alone is for every device."""
        return self.made_for != TENSORRT_ALONE or self.weights_only

    @property
    def for_tensorrt(self) -> bool:
        """Return whether a graph for TensorRT ships, which has no kernel of weights in blocks."""
        return self.made_for != CPU_ALONE and not self.weights_only

    @property
    def weights_only(self) -> bool:
        return set(self.activations.values()) == {NONE}


@dataclass(frozen=True)
class QuantizeOptions:
    """The options as given: ``activations``, ``weight_bits`` and ``block_size`` are None by default, see ``config``.

    ``optional_sites`` is --also, ``ranges`` a table of ranges that stands in for calibration. ``rank`` measures each
    layer's sensitivity and the error curve also where the gate holds without; ``resume`` goes on where an export of the
    same inputs was interrupted.
    """

    calibration_data: tuple[str, ...] = ()
    method: str = METHOD
    smooth: bool = True
    activations: str | None = None
    weight_bits: int | None = None
    block_size: int | None = None
    optional_sites: tuple[str, ...] = ()
    ranges: Path | None = None
    gate: bool = True
    rank: bool = False
    resume: bool = True

    def data_for(self, source: str) -> tuple[str, ...]:
        """Return the names or files of calibration data. Raises ExportError where none is given and none is known."""
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
        """Raise ExportError for values and combinations that are invalid for every model."""
        for what, value, known in (
            ("--method", self.method, METHODS),
            ("--activations", self.activations or STATIC, ACTIVATIONS),
            ("--weight-bits", self.weight_bits or WEIGHT_BITS, (8, 7)),
            ("--block-size", self.block_size or BLOCK_SIZE, BLOCKS),
            *(("--also", site, OPTIONAL_SITES) for site in self.optional_sites),
        ):
            if value not in known:
                raise ExportError(f"{what} is {value!r}; expected one of {', '.join(map(str, known))}.")
        if precision == "int4" and (self.activations not in (None, NONE) or self.weight_bits or self.optional_sites):
            raise ExportError(
                "--precision int4 is of weights alone; leave out --activations, --weight-bits and --also, or "
                "choose --precision int8."
            )
        weights_only = precision == "int4" or self.activations == NONE
        if weights_only and self.weight_bits:
            raise ExportError(
                f"--weight-bits is {self.weight_bits}, and --activations none stores weights in blocks of 8 bits, "
                "whose products never saturate; leave it out, or choose --activations static or dynamic."
            )
        if self.block_size and not weights_only:
            raise ExportError(
                f"--block-size is {self.block_size}, and weights in blocks are for weights alone; leave it out, or "
                "choose --activations none or --precision int4."
            )

    def config(self, precision: str, graphs: tuple[Graph, ...]) -> QuantizationConfig:
        """Return the configuration for ``graphs``.

        For "int8", by default, static activations in encoders and dynamic ones in decoders, whose steps have few rows;
        for "int4" weights alone. Raises ExportError as ``check`` does, and where --also has nothing to work on.
        """
        self.check(precision)
        if precision == "int4":
            return QuantizationConfig(
                {graph.name: NONE for graph in graphs}, self.method, 4, self.block_size or BLOCK_SIZE
            )
        modes = {graph.name: self.activations or (DYNAMIC if is_decoder(graph) else STATIC) for graph in graphs}
        if self.optional_sites and STATIC not in modes.values():
            raise ExportError("--also needs ranges fixed beforehand; choose --activations static, or leave it out.")
        bits, block_size = self.weight_bits or WEIGHT_BITS, self.block_size or BLOCK_SIZE
        return QuantizationConfig(modes, self.method, bits, block_size, self.optional_sites)


DEFAULTS = QuantizeOptions()
