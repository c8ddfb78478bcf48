"""Lists in a bundle: what exports write, what they record where there is no list, and what proves a list."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from lowered_graphs import kept_graphs, lowered
from operator_backend import OperatorBackend, use_operator_backend
from transom.export import pipeline, verification
from transom.export.native import lists
from transom.export.native.lists import lower_graphs
from transom.export.native.lowering import Lowered
from transom.export.variants import WEIGHTS, make_variants
from transom.runtime import load
from transom.runtime.backends.kernels import KernelChoice
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ParityError
from transom.runtime.native.library import NativeStatus
from transom.runtime.native.operator_list import list_from_json


@pytest.fixture
def numpy_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_operator_backend(monkeypatch)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "status", lambda: NativeStatus(None, "there is no library"))


@pytest.mark.usefixtures("numpy_kernels", "traced_once")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_proves_its_lists(make_checkpoint: Any, tmp_path: Path, precision: str) -> None:
    """Files, manifest, parity and golden values have the list; ``verify`` compares it again."""
    folder = make_checkpoint("BertForSequenceClassification", num_labels=3, num_hidden_layers=1)
    out = tmp_path / "out"
    manifest = pipeline.export(str(folder), out, precision=precision, max_sizes={"B": 2, "S": 9})
    (file,) = manifest.graphs
    assert (file.files["native"], file.weights) == ("model.operators.json", WEIGHTS)
    assert manifest.native["model"]["fused"]["attention"] == 1
    bundle = Bundle(str(out))
    made = list_from_json(json.loads(bundle.read(file.files["native"])), file.graph, (out / WEIGHTS).stat().st_size)
    assert made.ids == "input_ids"
    assert made.mask == "attention_mask"
    cases = [case for case in manifest.parity["cases"] if case.get("native")]
    assert len(cases) == len([case for case in manifest.parity["cases"] if not {"native", "emulated"} & {*case}])
    sides = {name.split("/")[1] for name in load_file(out / "golden.safetensors")}
    assert sides == {"input", "pytorch", "bundle", "native"}
    with load(out) as loaded:
        assert loaded.kernels == {"model": KernelChoice("native", "numpy", "numpy")}
    verified = verification.verify(out)
    assert sum(case.native for case in verified.cases) == len(cases)


@pytest.mark.usefixtures("numpy_kernels", "traced_once")
def test_a_perturbed_list_fails_the_export(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity sees the list, not the graph beside it alone: one element of one bias is another."""
    lower = lists.lower

    def lower_then_perturb(*arguments: Any) -> Lowered:
        made = lower(*arguments)
        name = "encoder.layer.0.attention.output.dense.bias"
        perturbed = made.weights[name].tensor.numpy().copy()
        perturbed[3] += 0.05
        return replace(made, weights={**made.weights, name: replace(made.weights[name], tensor=ir.Tensor(perturbed))})

    monkeypatch.setattr(lists, "lower", lower_then_perturb)
    folder = make_checkpoint("BertForSequenceClassification", num_labels=3, num_hidden_layers=1)
    with pytest.raises(ParityError, match="computed by its list of fused operators, differs from PyTorch"):
        pipeline.export(str(folder), tmp_path / "out", max_sizes={"B": 2, "S": 9})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("numpy_kernels", "traced_once")
def test_greedy_generations_of_a_list(make_checkpoint: Any, tmp_path: Path) -> None:
    """A decoder's caches are written in place by the list, and its tokens are PyTorch's."""
    OperatorBackend.made.clear()
    manifest = pipeline.export(str(make_checkpoint("GPT2LMHeadModel")), tmp_path / "out", max_sizes={"B": 2})
    assert OperatorBackend.made == ["decoder.operators.json"]
    golden = load_file(tmp_path / "out" / "golden.safetensors")
    tokens = [golden[f"generation/{side}/tokens"] for side in ("native", "pytorch")]
    np.testing.assert_array_equal(*tokens)
    assert "refused" not in manifest.native["decoder"]


@pytest.mark.usefixtures("no_kernels", "traced_once")
def test_without_kernels_there_is_no_list(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = make_checkpoint("BertForSequenceClassification", num_labels=3, num_hidden_layers=1)
    manifest = pipeline.export(str(folder), tmp_path / "out", max_sizes={"B": 2, "S": 9})
    assert manifest.native == {"model": {"refused": lists.NO_KERNELS}}
    assert {*manifest.graphs[0].files} == {"default"}
    assert manifest.graphs[0].weights is None


@pytest.mark.usefixtures("numpy_kernels")
def test_what_a_graph_has_no_list_for_is_recorded() -> None:
    model, graph = kept_graphs("seq2seq-fp32")["encoder"]
    made = lower_graphs({"encoder": model}, (graph,))
    assert made.lowered == {}
    assert made.record["encoder"]["refused"].startswith("GRU node ")


@pytest.mark.usefixtures("numpy_kernels")
@pytest.mark.parametrize(("precision", "made_for"), [("bf16", "both"), ("fp32", "tensorrt")])
def test_variants_that_have_no_lists(precision: str, made_for: str) -> None:
    model, graph = kept_graphs("bert-fp32")["model"]
    made = make_variants({"model": model}, (graph,), precision, made_for=made_for, native=True)
    assert "native" not in made.graphs[0].files
    assert made.native == ({"model": {"refused": lists.BF16}} if precision == "bf16" else {})


@pytest.mark.usefixtures("numpy_kernels")
def test_weights_lie_once() -> None:
    """A list adds what the graph keeps inside (below 1,024 bytes), and nothing that the file has already."""
    model, graph = kept_graphs("gpt-fp32")["decoder"]
    expected = lowered(model, graph)
    alone = make_variants({"decoder": model}, (graph,), "fp32", external_above=0)
    both = make_variants({"decoder": model}, (graph,), "fp32", external_above=0, native=True)
    small = [weight for weight in expected.weights.values() if weight.tensor.nbytes < 1024]
    added = sum(-(-weight.tensor.nbytes // 64) * 64 for weight in small)
    assert 0 < both.size(WEIGHTS) - alone.size(WEIGHTS) <= added
    assert both.files["decoder.onnx"] == alone.files["decoder.onnx"]
    again = list_from_json(json.loads(both("decoder.operators.json")), graph, both.size(WEIGHTS))
    assert again.operators == expected.operators.operators
    for name, tensor in again.tensors.items():
        stored = np.frombuffer(both(WEIGHTS), tensor.dtype, int(np.prod(tensor.shape)), tensor.offset)
        np.testing.assert_array_equal(stored, expected.weights[name].tensor.numpy().reshape(-1))
