"""Options of quantisation: what they stand for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from transom.export.quantization.options import DEFAULTS, QuantizeOptions
from transom.export.quantization.quantizer import QuantizationConfig
from transom.runtime.errors import ExportError
from transom.runtime.graph_spec import Graph, Tensor

ENCODER = Graph("model", (Tensor("x", "float32", ("B", "S", 64)),), (Tensor("y", "float32", ("B", "S", 48)),))
DECODER = Graph(
    "decoder",
    (Tensor("input_ids", "int64", ("B", "S")), Tensor("cache", "float32", ("B", "C"), state=True)),
    (Tensor("cache_out", "float32", ("B", "C"), state=True, aliases="cache"),),
)


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("int8", {"method": "best"}, "--method is 'best'; expected one of minmax, percentile, entropy, mse."),
        ("int8", {"activations": "half"}, "--activations is 'half'; expected one of static, dynamic, none."),
        ("int8", {"weight_bits": 6}, "--weight-bits is 6; expected one of 8, 7."),
        ("int8", {"weight_bits": 4}, "--weight-bits is 4; expected one of 8, 7."),
        ("int4", {"block_size": 48}, "--block-size is 48; expected one of 32, 64, 128, 256."),
        ("int4", {"block_size": 16}, "--block-size is 16; expected one of 32, 64, 128, 256."),
        ("int8", {"optional_sites": ("softmax",)}, "--also is 'softmax'; expected one of attention, residual."),
        ("int4", {"activations": "static"}, "--precision int4 is of weights alone; leave out --activations"),
        ("int4", {"activations": "dynamic"}, "--precision int4 is of weights alone"),
        ("int4", {"weight_bits": 7}, "--precision int4 is of weights alone"),
        ("int4", {"weight_bits": 8}, "--precision int4 is of weights alone"),
        ("int8", {"weight_bits": 7, "activations": "none"}, "--weight-bits is 7, and --activations none stores"),
        ("int8", {"weight_bits": 8, "activations": "none"}, "--weight-bits is 8, and --activations none stores"),
        ("int8", {"block_size": 32}, "--block-size is 32, and weights in blocks are for weights alone; leave it out"),
        ("int8", {"block_size": 64, "activations": "dynamic"}, "--block-size is 64, and weights in blocks"),
        ("int4", {"optional_sites": ("attention",)}, "--precision int4 is of weights alone"),
        ("int8", {"optional_sites": ("attention",), "activations": "dynamic"}, "--also needs ranges fixed beforehand"),
        ("int8", {"optional_sites": ("residual",), "activations": "none"}, "--also needs ranges fixed beforehand"),
    ],
)
def test_options_that_mean_nothing_are_refused(precision: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as raised:
        QuantizeOptions(**options).config(precision, (ENCODER,))
    assert str(raised.value).startswith(message)


def test_what_is_meant_where_nothing_is_said() -> None:
    assert DEFAULTS.config("int8", (ENCODER, DECODER)) == QuantizationConfig(
        {"model": "static", "decoder": "dynamic"}, "mse", 8, 32
    )
    assert DEFAULTS.config("int4", (ENCODER, DECODER)) == QuantizationConfig(
        {"model": "none", "decoder": "none"}, "mse", 4, 32
    )
    assert QuantizeOptions(activations="dynamic").config("int8", (ENCODER,)).activations == {"model": "dynamic"}
    assert DEFAULTS.data_for("vit") == ("digits",)
    assert QuantizeOptions(("reviews.txt",)).data_for("vit") == ("reviews.txt",)
    with pytest.raises(ExportError, match=r"quantising some/model needs inputs like .*--calibration-data"):
        DEFAULTS.data_for("some/model")
