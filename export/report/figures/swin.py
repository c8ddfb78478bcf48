"""Draw attention within windows before and after the shift: Liu et al. (2021, arXiv:2103.14030), figure 2.

One token beside the corner of four windows, in the first two layers of each stage that shifts: what it attends to, and
the borders that it cannot see beyond. Windows are read from the graph: from the order in which it gathers tokens, and
from where the weights of its attention are zero.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from markupsafe import Markup
from numpy.typing import NDArray

from transom.calib.graph_hash import MODULE
from transom.export.bundle_graphs import graph_file, load_external, parse_graph
from transom.export.passes._match import is_standard, is_weight, made_by
from transom.export.reference_models import examples_for
from transom.export.report.figures.attention import ExposedAttention, Weights
from transom.export.report.graphs import DEVICE
from transom.export.report.images import data_uri, image_from_pixels, is_small
from transom.export.report.rendering import render
from transom.export.report.svg import LEVELS, Matrix, squares
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.manifest_graphs import GraphFile

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource

MOST_IMAGES = 4
DENSEST = 0.85  # opacity over the place of the largest weight: the image stays visible below
LAYER = re.compile(r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.self")
UNSEEN = 1e-30  # weights below are those of masked keys

Order = NDArray[np.int64]


@dataclass(frozen=True)
class Map:
    """The attention of one layer over its map of ``rows`` by ``columns`` tokens.

    order    the token at each place of the windows, (W * N,); rows * columns or more where padding is
    weights  mean over heads, (W, N, N)
    """

    rows: int
    columns: int
    order: Order
    weights: Weights

    def attended(self, token: int) -> Matrix:
        """Return the weight of every token of the map for a query, (rows, columns); 0 for what it cannot see."""
        (place,) = np.flatnonzero(self.order == token)
        window, query = divmod(int(place), self.weights.shape[-1])
        keys = self.order.reshape(len(self.weights), -1)[window]
        real, found = keys < self.rows * self.columns, np.zeros(self.rows * self.columns, np.float32)
        found[keys[real]] = self.weights[window, query, real]
        return found.reshape(self.rows, self.columns)

    def borders(self) -> Markup:
        """Draw a line between neighbours of which one cannot see the other."""
        seen = np.zeros((self.rows, self.columns, 2), bool)  # below, and on the right
        places = {int(token): divmod(place, self.weights.shape[-1]) for place, token in enumerate(self.order)}
        path = []
        for row, column in np.ndindex(self.rows, self.columns):
            window, query = places[row * self.columns + column]
            for axis, (below, right) in enumerate(((1, 0), (0, 1))):
                other = (row + below, column + right)
                if other[0] == self.rows or other[1] == self.columns:
                    continue
                neighbour, key = places[other[0] * self.columns + other[1]]
                seen[row, column, axis] = window == neighbour and self.weights[window, query, key] > UNSEEN
                if not seen[row, column, axis]:
                    path.append(f"M{other[1]} {other[0]}" + ("h1" if below else "v1"))
        return Markup(f'<path class="border" d="{"".join(path)}"/>')


def draw_window_attention(bundle: Bundle, images: Sequence[str]) -> Markup:
    """Draw each of ``images``, or a few examples, with the attention of each stage before and after its shift."""
    file = graph_file(bundle, "model")
    if bundle.manifest.preprocess is None:
        return Markup("")
    preprocess = ImagePreprocess.from_json(bundle.manifest.preprocess)
    exposed, orders = ExposedAttention(bundle, file), token_orders(bundle, file)
    sources: Sequence[ImageSource] = images or list(examples_for(bundle.manifest.source.get("checkpoint")).images)
    drawn = []
    for source in sources[: max(MOST_IMAGES, len(images))]:
        pixels = preprocess([source])
        drawn.append(figure_of(pixels, preprocess, exposed, orders, patches_of(bundle)))
    return render("figures/swin", images=drawn)


def patches_of(bundle: Bundle) -> tuple[int, int]:
    """Return the sides of a patch; BundleError where bundle.json does not say."""
    config = bundle.manifest.config
    patch = config.get("patch_size") if isinstance(config, dict) else None
    valid = isinstance(patch, list | tuple) and len(patch) == 2
    if not valid or not all(type(side) is int and side > 0 for side in patch):  # type: ignore[union-attr]
        raise BundleError(f"bundle.json: patch_size is {patch!r}, expected two sides; export the bundle again.")
    return patch[0], patch[1]  # type: ignore[index]


def figure_of(
    pixels: NDArray[np.float32],
    preprocess: ImagePreprocess,
    exposed: ExposedAttention,
    orders: dict[str, Order | None],
    patch: tuple[int, int],
) -> dict[str, Any]:
    """Draw one image as the model sees it, and twice for each stage that shifts."""
    image = image_from_pixels(pixels[0], preprocess)
    layers: dict[tuple[int, int], Map] = {}
    for path, weights in exposed.by_layer({"pixel_values": pixels}).items():
        match = LAYER.fullmatch(path)
        if match is not None:
            stage, block = int(match[1]), int(match[2])
            cell = [side * 2**stage for side in patch]
            rows, columns = -(-image.height // cell[0]), -(-image.width // cell[1])
            layers[stage, block] = map_of(rows, columns, orders.get(path), weights)
    stages = []
    for stage, block in sorted(layers):
        before, after = layers[stage, block], layers.get((stage, block + 1))
        if block == 0 and after is not None and not np.array_equal(before.order, after.order):
            token = beside_a_corner(before)
            panels = [panel(each, token) for each in (before, after)]
            size = {"width": image.width / (patch[1] * 2**stage), "height": image.height / (patch[0] * 2**stage)}
            stages.append(
                {"stage": stage + 1, "rows": before.rows, "columns": before.columns, "panels": panels, **size}
            )
    return {"uri": data_uri(image), "small": is_small(image), "stages": stages}


def map_of(rows: int, columns: int, order: Order | None, weights: Weights) -> Map:
    """Return a layer's map: weights are (W, H, N, N), or (1, W * H, N, N) where windows are heads."""
    N = weights.shape[-1]
    order = np.arange(rows * columns) if order is None else order
    W = len(order) // N
    if len(order) % N or weights.size % (W * N * N) or not set(range(rows * columns)) <= set(order.tolist()):
        raise BundleError(
            f"the graph attends to windows of {N} tokens in an order of {len(order)}; expected all of a map of "
            f"{rows} x {columns}. Export the bundle again."
        )
    return Map(rows, columns, order, weights.reshape(W, -1, N, N).mean(1))


def beside_a_corner(before: Map) -> int:
    """Return the token above and to the left of the corner of windows that is nearest to the map's centre."""
    side = isqrt(before.weights.shape[-1])

    def last_of_window(length: int) -> int:
        return min(side * max(1, round(length / 2 / side)), length) - 1

    return last_of_window(before.rows) * before.columns + last_of_window(before.columns)


def panel(layer: Map, token: int) -> dict[str, Any]:
    """Draw what a token attends to, the borders of windows, and the token itself."""
    shares = layer.attended(token)
    levels = np.round(DENSEST * np.sqrt(shares / (float(shares.max()) or 1.0)) * LEVELS).astype(int)
    tint = [squares(np.argwhere(levels == level).tolist(), "warm", level) for level in range(1, LEVELS + 1)]
    row, column = divmod(token, layer.columns)
    query = Markup(f'<rect class="query" x="{column}" y="{row}" width="1" height="1"/>')
    return {"over": Markup("").join([*tint, layer.borders(), query]), "seen": int((shares > UNSEEN).sum())}


def token_orders(bundle: Bundle, file: GraphFile) -> dict[str, Order | None]:
    """Return in which order each attention's tokens are gathered, by the path of its module; None for their own."""
    name = file.file_for(DEVICE)
    orders: dict[str, Order | None] = {}
    for node in parse_graph(bundle.read(name), name).graph:
        if is_standard(node, "Attention"):
            gather = gathered_by(node)
            indices = None if gather is None else gather.inputs[1]
            if indices is not None and isinstance(indices.const_value, ir.ExternalTensor):
                indices.const_value = load_external(
                    indices.const_value, bundle.read(file.weights) if file.weights else b""
                )
            value = None if indices is None else indices.const_value
            orders[node.metadata_props.get(MODULE, "")] = None if value is None else value.numpy().astype(np.int64)
    return orders


def gathered_by(attention: ir.Node) -> ir.Node | None:
    """Return the node that gathers an attention's tokens into windows, on the way of its queries; None for none."""
    node = attention.inputs[0].producer() if attention.inputs[0] is not None else None
    while node is not None and not is_standard(node, "Gather", "LayerNormalization"):
        others = [value for value in node.inputs[1:] if value is not None and not is_stored(value)]
        if is_standard(node, "Add") and others:  # the residual, which was not cut into windows
            return None
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return node if node is not None and is_standard(node, "Gather") else None


def is_stored(value: ir.Value) -> bool:
    """Return whether a value is a weight, or a weight in half precision that is cast for a CPU."""
    cast = made_by(value, "Cast")
    stored = value if cast is None else cast.inputs[0]
    return stored is not None and is_weight(stored)
