"""The watch over FP16 in the runs that measure a graph for TensorRT, and what happens where it has its doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import export_to, save_checkpoint
from tiny_graphs import graph_of, normal, run
from transom.export.parity.cases import LARGE, give_back
from transom.export.parity.fp16_watch import Fp16DoubtError, WatchedBackend
from transom.export.passes.fake_half import fake_half
from transom.export.passes.fp16_watch import WATCHED_SCORES, WATCHED_SUM, add_fp16_watch
from transom.export.passes.half_precision import convert_precision
from transom.export.quantization import quantize as stage
from transom.export.quantization.options import QuantizeOptions
from transom.runtime.backends.base import Array
from transom.runtime.bundle import Bundle
from transom.runtime.graph_spec import Graph, Tensor


def watched(text: str, **weights: Any) -> Any:
    """A graph in FP16 as a CPU emulates it, with the watch."""
    model = graph_of(text, weights)
    convert_precision(model, "fp16")
    fake_half(model)
    add_fp16_watch(model)
    return model


def test_a_value_beyond_fp16_is_seen_though_the_output_does_not_show_it() -> None:
    """3 * 20,000 is 60,000, 4 * 20,000 is beyond 65,504; its hyperbolic tangent is 1 either way."""
    model = watched("g (float[N] x) => (float[N] y) { a = Mul(x, w)  y = Tanh(a) }", w=20000.0)
    fits, beyond = (run(model, x=[value]) for value in (3.0, 4.0))
    assert fits["y"] == beyond["y"] == 1
    assert fits[WATCHED_SUM] == pytest.approx(3 + 60000 + 1, rel=1e-3)
    assert np.isinf(beyond[WATCHED_SUM])
    assert fits[WATCHED_SCORES] == 0, "there is no attention"


def test_scores_inside_attention_are_bounded() -> None:
    """Of queries and keys of 64 numbers no product is larger than both lengths together; a bound, so never below."""
    text = (
        "g (float[1,2,5,64] q, float[1,2,7,64] k, float[1,2,7,64] v) => (float[1,2,5,64] y) { y = Attention(q, k, v) }"
    )
    q, k, v = normal(1, 2, 5, 64), normal(1, 2, 7, 64, seed=1), normal(1, 2, 7, 64, seed=2)
    bound = float(run(watched(text), q=q, k=k, v=v)[WATCHED_SCORES])
    longest = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    assert bound == pytest.approx(longest, rel=1e-2)
    assert bound >= np.abs(q @ k.transpose(0, 1, 3, 2)).max()


class Answers:
    """A backend that answers with numbers given beforehand."""

    device = "cpu"
    graph = Graph(
        "g", (), (Tensor("y", "float32", ()), *(Tensor(n, "float32", ()) for n in (WATCHED_SUM, WATCHED_SCORES)))
    )

    def __init__(self, total: float, scores: float) -> None:
        self._found = {"y": 0.5, WATCHED_SUM: total, WATCHED_SCORES: scores}

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        return {name: np.array(self._found[name], np.float32) for name in shapes}


@pytest.mark.parametrize(
    ("total", "scores", "holds"),
    [
        (1e9, 65503.0, True),
        (np.inf, 0.0, False),
        (np.nan, 0.0, False),
        (1.0, 65504.0, False),
        (1.0, np.nan, False),
    ],
)
def test_any_doubt_stops_the_run(total: float, scores: float, holds: bool) -> None:
    backend = WatchedBackend(Answers(total, scores))
    assert [tensor.name for tensor in backend.graph.outputs] == ["y"]
    if holds:
        assert backend.run({}, {"y": ()}) == {"y": np.float32(0.5)}
    else:
        with pytest.raises(Fp16DoubtError, match=r"a value of the graph 'g' may be beyond 65504"):
            backend.run({}, {"y": ()})


def test_watched_values_are_added_up_one_by_one_behind_all_others() -> None:
    """ONNX Runtime then reduces each value as soon as it is there; of one sum of all it would keep them to the end."""
    model = watched("g (float[N] x) => (float[N] y) { a = Mul(x, w)  b = Tanh(a)  y = Tanh(b) }", w=2.0)
    names = [str(node.outputs[0].name) for node in model.graph]
    reduced = [name for name in names if name.startswith(f"{WATCHED_SUM}.") and ".total." not in name]
    totals = list(model.graph)[-(len(reduced) - 1) :]
    assert len(totals) > 1
    assert [value.name for value in totals[0].inputs if value is not None] == reduced[:2]
    for before, total, value in zip(totals[:-1], totals[1:], reduced[2:], strict=True):
        assert [each.name for each in total.inputs if each is not None] == [before.outputs[0].name, value]
    assert names[-1] == WATCHED_SUM


def test_a_watched_graph_gives_memory_back() -> None:
    given: list[str] = []

    class Holds(Answers):
        def give_back(self) -> None:
            given.append("arena")

    give_back(WatchedBackend(Holds(1.0, 1.0)), LARGE)
    WatchedBackend(Answers(1.0, 1.0)).give_back()
    assert given == ["arena"]


@pytest.fixture
def texts(tmp_path: Path) -> QuantizeOptions:
    path = tmp_path / "texts.txt"
    path.write_text(
        "\n".join(f"{who} made {what}" for who in ("she", "who", "a city") for what in ("it", "oil", "water"))
    )
    return QuantizeOptions((str(path),), smooth=False, gate=False)


def elsewhere(folder: Path) -> Any:
    quantization = Bundle(folder / "bundle").manifest.quantization
    assert quantization is not None
    return {name: kind for name, kind in quantization["elsewhere"].items() if name != "native"}


def test_what_fp16_cannot_hold_stays_in_fp32(tmp_path: Path, texts: QuantizeOptions) -> None:
    """Hidden values of the feed-forward layer made 100,000 times as large, and as small again behind it."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "BertModel", num_hidden_layers=1, hidden_act="relu")
    weights = load_file(checkpoint / "model.safetensors")
    for name, factor in (
        ("intermediate.dense.weight", 1e5),
        ("intermediate.dense.bias", 1e5),
        ("output.dense.weight", 1e-5),
    ):
        key = f"encoder.layer.0.{name}"
        weights[key] = weights[key] * np.float32(factor)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    export_to(tmp_path, checkpoint, max_sizes={"B": 2}, precision="int8", quantize=texts)
    assert elsewhere(tmp_path) == {"cpu": "fp32", "default": "fp32"}


@pytest.mark.usefixtures("traced_once")
def test_a_doubt_in_a_parity_run_has_ranges_measured(
    tmp_path: Path, texts: QuantizeOptions, shallow_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A doubt that only the longest case raises: all is made again, by ranges, which show that FP16 holds them."""
    ran: list[tuple[int, ...]] = []
    run_watched = WatchedBackend.run

    def doubts(self: WatchedBackend, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> Any:
        ran.append(feeds["input_ids"].shape)
        if ran[-1] == (1, 16):
            raise Fp16DoubtError("here")
        return run_watched(self, feeds, shapes)

    measured: list[bool] = []
    fits = stage.fits_fp16
    monkeypatch.setattr(stage, "fits_fp16", lambda job, table: measured.append(fits(job, table)) or measured[-1])
    monkeypatch.setattr(WatchedBackend, "run", doubts)
    export_to(tmp_path, shallow_bert, max_sizes={"B": 2, "S": 16}, precision="int8", quantize=texts)
    assert (1, 16) in ran
    assert measured == [True]
    assert elsewhere(tmp_path) == {"cpu": "fp32", "default": "fp16"}
