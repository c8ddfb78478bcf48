"""A finished FP32 bundle as what it was made from: its graphs with their weights; and ranges put into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from transom.calib.data import open_calibration_data
from transom.calib.run_samples import check_reach
from transom.calib.table import RANGES, RangeTable
from transom.export.bundle_writer import add_to_bundle
from transom.export.families.base import export_family
from transom.export.quantization.calibrate import calibrate
from transom.export.quantization.options import QuantizeOptions
from transom.export.quantization.quantize import held_out_of
from transom.export.reference_models import scored_model
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, CalibrationError, one_line


def calibrate_bundle(
    bundle: Bundle, options: QuantizeOptions, *, force: bool, tell: Callable[[str], None]
) -> RangeTable:
    """Ranges of an FP32 bundle's graphs, written into it as RANGES, and returned.

    Of data that is not a reference model's own a quarter is left for the gate, as an export leaves it. Raises
    CalibrationError for a bundle that is not in FP32, one that has ranges already (unless ``force``), and data that
    cannot be used.
    """
    manifest = bundle.manifest
    if manifest.precision != "fp32":
        already = "is quantised already" if manifest.quantization is not None else f"is in {manifest.precision}"
        raise CalibrationError(
            f"{bundle.folder} {already}; ranges are taken of FP32. Export the checkpoint with --precision fp32 and "
            "calibrate that bundle."
        )
    if RANGES in manifest.files and not force:
        raise CalibrationError(f"{bundle.folder} has a {RANGES}; give --force to replace it.")
    source = str(manifest.source.get("checkpoint"))
    config = options.config("int8", tuple(file.graph for file in manifest.graphs))
    data = open_calibration_data(options.data_for(source))
    check_reach(
        manifest.family,
        export_family(manifest.family).samples,
        data,
        tokenizer=manifest.tokenizer is not None,
        preprocess=manifest.preprocess is not None,
    )
    kept, _ = held_out_of(data, scored=scored_model(source, manifest.task) is not None)
    table = calibrate(bundle, canonical_graphs(bundle), config, kept, smooth=options.smooth, tell=tell)
    add_to_bundle(bundle.folder, {RANGES: table.to_bytes()})
    return table


def canonical_graphs(bundle: Bundle) -> dict[str, ir.Model]:
    """The graphs of a bundle in FP32 by name, their weights in memory."""
    return stored_graphs(bundle, "default")


def stored_graphs(bundle: Bundle, variant: str) -> dict[str, ir.Model]:
    """The graphs of a bundle by name, their weights in memory. BundleError for a file that is no ONNX model."""
    models: dict[str, ir.Model] = {}
    for file in bundle.manifest.graphs:
        name = file.file_for(variant)
        try:
            model = ir.from_proto(onnx.load_from_string(bundle.read(name)))
            outside = bundle.read(file.weights) if file.weights else b""
            for weight in model.graph.initializers.values():
                if isinstance(weight.const_value, ir.ExternalTensor):
                    weight.const_value = inside(weight.const_value, outside)
        except BundleError:
            raise
        except Exception as error:  # protobuf and onnx-ir raise what they like
            raise BundleError(f"{name} is no ONNX model ({one_line(error)}); export the bundle again.") from None
        models[file.graph.name] = model
    return models


def inside(tensor: ir.ExternalTensor, outside: bytes) -> ir.TensorProtocol:
    """An external weight from the bytes of the bundle's weights; the path it names is not followed."""
    start, length = tensor.offset or 0, tensor.length or 0
    if start < 0 or start + length > len(outside):
        raise BundleError(f"the weight {tensor.name} lies beyond the end of the weights; export the bundle again.")
    array = np.frombuffer(outside, tensor.dtype.numpy(), tensor.size, start)
    return ir.Tensor(array.reshape(tensor.shape.numpy()), name=tensor.name)


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator, those of subgraphs too, the most frequent first.

    An operator that is not ONNX's own carries its domain: ``com.microsoft::FusedMatMul``.
    """
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes())
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))
