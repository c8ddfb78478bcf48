"""The picture of Swin: attention within windows, before and after their shift, of the bundle's own graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from command_line import changed_bundle
from conftest import Once, export_to, save_checkpoint
from report_pages import Page
from swin_cases import SWIN, write_pixels
from transom.export.bundle_graphs import graph_file
from transom.export.quantization.options import QuantizeOptions
from transom.export.report.figures.attention import ExposedAttention
from transom.export.report.figures.swin import (
    Map,
    beside_a_corner,
    draw_window_attention,
    map_of,
    panel,
    token_orders,
)
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError

SIZES = {**SWIN, "image_size": 16, "depths": [2, 1], "num_heads": [3, 3]}  # 8 x 8 tokens, 4 windows; then one


@pytest.fixture(scope="module", params=["Swin", "Swinv2"])
def bundle(request: pytest.FixtureRequest, once: Once) -> Path:
    more: dict[str, Any] = {"pretrained_window_sizes": [0, 0]} if request.param == "Swinv2" else {}

    def make(folder: Path) -> None:
        kind = (f"{request.param}Config", {**SIZES, **more})
        export_to(folder, save_checkpoint(folder / "checkpoint", f"{request.param}Model", kind=kind))

    return once(f"figure-{request.param}", make) / "bundle"


def maps(bundle: Path, pixels: np.ndarray[Any, Any]) -> dict[str, Map]:
    opened = Bundle(bundle)
    file = graph_file(opened, "model")
    orders = token_orders(opened, file)
    weights = ExposedAttention(opened, file).by_layer({"pixel_values": pixels})
    sides = {"encoder.layers.0": 8, "encoder.layers.1": 4}
    return {path: map_of(sides[path[:16]], sides[path[:16]], orders[path], found) for path, found in weights.items()}


def test_weights_are_those_of_transformers(bundle: Path) -> None:
    """Of the last layer of each stage, which is what transformers gives of either version: shifted, then whole."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    model = "SwinModel" if Bundle(bundle).manifest.family == "swin" else "Swinv2Model"
    theirs = getattr(transformers, model).from_pretrained(bundle.parent / "checkpoint", attn_implementation="eager")
    with torch.no_grad():
        attentions = theirs.eval()(pixel_values=torch.from_numpy(pixels), output_attentions=True).attentions
    found = maps(bundle, pixels)
    shifted, whole = (found[f"encoder.layers.{path}.attention.self"] for path in ("0.blocks.1", "1.blocks.0"))
    for ours, expected in ((shifted, attentions[0]), (whole, attentions[1])):
        np.testing.assert_allclose(ours.weights, expected.mean(1).numpy(), atol=1e-5)
    assert found["encoder.layers.0.blocks.0.attention.self"].order[:5].tolist() == [0, 1, 2, 3, 8]
    assert shifted.order[:5].tolist() == [18, 19, 20, 21, 26]
    assert whole.order.tolist() == list(range(16))


def test_a_token_sees_across_the_border_after_the_shift(bundle: Path) -> None:
    pixels = np.ones((1, 3, 16, 16), np.float32)
    found = maps(bundle, pixels)
    before, after = (found[f"encoder.layers.0.blocks.{block}.attention.self"] for block in (0, 1))
    token = beside_a_corner(before)
    assert token == 3 * 8 + 3
    for layer, rows in ((before, slice(0, 4)), (after, slice(2, 6))):
        seen = layer.attended(token)
        assert seen.sum() == pytest.approx(1, abs=1e-4)
        inside = np.zeros((8, 8), bool)
        inside[rows, rows] = True
        assert (seen[inside] > 0).all()
        assert not seen[~inside].any()
        assert panel(layer, token)["seen"] == 16
    assert panel(after, 63)["seen"] == 4  # the shift put 2 x 2 tokens into one window with the opposite corners


def test_borders_lie_where_neighbours_do_not_see_each_other() -> None:
    """Two windows of 2 x 2 tokens side by side, unshifted; then shifted by a column, with masks between strangers."""
    uniform = np.full((2, 4, 4), 0.25, np.float32)
    beside = Map(2, 4, np.array([0, 1, 4, 5, 2, 3, 6, 7]), uniform)
    assert beside.borders() == '<path class="border" d="M2 0v1M2 1v1"/>'
    masked = uniform.copy()
    masked[1] = np.kron(np.ones((2, 2)), np.eye(2)) / 2
    shifted = Map(2, 4, np.array([1, 2, 5, 6, 3, 0, 7, 4]), masked)
    assert shifted.borders() == '<path class="border" d="M1 0v1M3 0v1M1 1v1M3 1v1"/>'


def test_the_page_has_two_panels_for_each_stage_that_shifts(bundle: Path) -> None:
    page = Page(str(draw_window_attention(Bundle(bundle), ())))
    text = "".join(page.text)
    assert text.count("Stage 1, before the shift: 16 of 64") == text.count("Stage 1, after the shift: 16 of 64") >= 1
    assert "Stage 2" not in text


def test_windows_that_do_not_cover_the_map_are_refused() -> None:
    weights = np.full((4, 3, 4, 4), 0.25, np.float32)
    assert map_of(4, 4, None, weights).weights.shape == (4, 4, 4)
    for rows, order in ((5, None), (4, np.zeros(16, np.int64))):
        with pytest.raises(BundleError, match="expected all of a map"):
            map_of(rows, 4, order, weights)


def test_a_bundle_without_patches_cannot_be_drawn(bundle: Path, tmp_path: Path) -> None:
    changed = changed_bundle(bundle, tmp_path, lambda fields: fields["config"].update(patch_size=[2, 0]))
    with pytest.raises(BundleError, match=r"patch_size is \[2, 0\], expected two sides"):
        draw_window_attention(Bundle(changed), ())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4"])
def test_windows_are_found_in_every_precision(precision: str, bundle: Path, tmp_path: Path) -> None:
    """Weights in half precision are cast for a CPU, integers are dequantised there; neither is a residual."""
    options: dict[str, Any] = {}
    if precision == "int4":
        data = write_pixels(tmp_path, (16, 16))
        options["quantize"] = QuantizeOptions(calibration_data=(str(data),), gate=False)
    export_to(tmp_path, bundle.parent / "checkpoint", precision=precision, **options)
    orders = [
        token_orders(opened, graph_file(opened, "model")) for opened in map(Bundle, (bundle, tmp_path / "bundle"))
    ]
    for path, order in orders[0].items():
        np.testing.assert_array_equal(orders[1][path], order)  # type: ignore[arg-type]
    assert orders[0]["encoder.layers.0.blocks.1.attention.self"] is not None
