"""The models that bundles of every family give: names, kinds, tensors, batches."""

from __future__ import annotations

from typing import Any

import pytest

from model_config import read_config
from paths import FP32, KEPT
from transom.export.triton.models import KINDS, Model, Models, Options, models_of
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, InputError
from transom.runtime.serving.ports import Port
from transom.runtime.serving.tasks import task_operation
from transom.runtime.serving.tensors import by_rows, graph_operation

BUNDLES = [path.name for path in FP32]
# Others: states that are half precision on a GPU and not on a CPU, and ONNX files of the CPU's own
OTHERS = ["bert-int8", "clip-int4", "flamingo-fp16", "gpt-bf16", "gpt-fp16", "seq2seq-int8", "transformer-int8"]
TRITON = {"bytes": "TYPE_STRING", "int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}
TRITON |= {"uint16": "TYPE_UINT16"}  # bits of bfloat16
ONNX_GRAPHS = {  # of others the only graph
    "clip": ("image", "text"),
    "gpt": (),
    **dict.fromkeys(("seq2seq", "show_attend_tell", "transformer", "flamingo"), ("encoder",)),
}


def found_for(name: str, **options: Any) -> dict[str, Model]:
    """Return the models of a kept bundle, called "m", by name."""
    models = models_of(Models(Bundle(KEPT / name), "m", Options(**options), "0" * 64, {"1/bundle/x": "x"}))
    return {model.name: model for model in models}


def tensor(port: Port, *, ragged: bool = False, output: bool = False) -> dict[str, Any]:
    """What config.pbtxt says of a port; an output has no ``optional``."""
    shape = [-1 if size is None else size for size in port.shape]
    found: dict[str, Any] = {"name": port.name, "data_type": TRITON[port.dtype], "dims": shape or [1]}
    found |= {} if shape else {"reshape": {"shape": []}}
    found |= {"allow_ragged_batch": True} if ragged and -1 in shape and not output else {}
    return found | ({"optional": True} if port.optional and not output else {})


@pytest.mark.parametrize("name", [*BUNDLES, *OTHERS])
def test_the_models_of_every_family(name: str) -> None:
    """The tensors are those of the operations of the bundle as it is loaded here, whose sessions know all dtypes."""
    models = found_for(name, kinds=KINDS)
    configs = {key: read_config(model.config.text()) for key, model in models.items()}
    with load(KEPT / name, threads=1) as bundle:
        rows = bundle.max_size("B")
        expected = {"m": "task"}
        operation = task_operation(bundle)
        assert configs["m"]["input"] == [tensor(port, ragged=True) for port in operation.inputs]
        assert configs["m"]["output"] == [tensor(port, output=True) for port in operation.outputs]
        assert (configs["m"]["max_batch_size"], configs["m"]["dynamic_batching"]) == (rows, {})
        assert models["m"].parameters == tuple(operation.parameters)
        if operation.stream is not None:
            expected["m_stream"] = "stream"
            streamed = configs["m_stream"]
            assert streamed["model_transaction_policy"] == {"decoupled": True}
            assert (streamed["max_batch_size"], "dynamic_batching" in streamed) == (1, False)
            assert [port["name"] for port in streamed["input"]] == [port.name for port in operation.inputs]
            assert streamed["output"] == configs["m"]["output"]
        for file in bundle.manifest.graphs:
            of_graph = f"m_{file.graph.name}"
            expected[of_graph] = "tensors"
            graph, raw = bundle.backend(file.graph.name).graph, graph_operation(bundle, file.graph.name)
            assert configs[of_graph]["input"] == [tensor(port) for port in raw.inputs]
            assert configs[of_graph]["output"] == [tensor(port, output=True) for port in raw.outputs]
            assert configs[of_graph]["max_batch_size"] == (rows if by_rows(graph) else 0)
            assert ("dynamic_batching" in configs[of_graph]) == by_rows(graph)
            assert configs[of_graph]["parameters"]["graph"] == file.graph.name
        for graph_name in ONNX_GRAPHS.get(bundle.manifest.family, ("model",)):
            of_file = f"m_{graph_name}_onnx"
            expected[of_file] = "onnx"
            config, raw_config = configs[of_file], configs[f"m_{graph_name}"]
            assert (config["backend"], "parameters" in config) == ("onnxruntime", False)
            inputs = [{key: value for key, value in each.items() if key != "optional"} for each in raw_config["input"]]
            assert (config["input"], config["output"]) == (inputs, raw_config["output"])
    assert {key: model.kind for key, model in models.items()} == expected


def test_a_decoder_whose_state_has_other_first_axes_is_not_batched() -> None:
    config = read_config(found_for("flamingo-fp32", kinds=["tensors"])["m_decoder"].config.text())
    assert config["max_batch_size"] == 0
    shapes = {each["name"]: each["dims"] for each in config["input"]}
    assert (shapes["write_indices"], shapes["image_key.0"]) == ([-1], [-1, 4, -1, 5, 8])


def test_what_the_server_reads_of_a_model() -> None:
    options = {"kinds": ["task", "stream"], "threads": 3, "instances": 2, "device": "cuda", "streams": 7}
    models = found_for("gpt-fp32", **options)
    shared = {"bundle": "bundle", "device": "cuda", "threads": "3", "instances": "2"}
    for name, kind, own in (("m", "task", {}), ("m_stream", "stream", {"streams": "7"})):
        config = read_config(models[name].config.text())
        version = config["parameters"].pop("runtime_version", None)
        assert version is None or version[0].isdigit()
        assert config["parameters"] == {**shared, "kind": kind, "bundle_sha256": "0" * 64, **own}
        assert config["instance_group"] == [{"count": 2, "kind": "KIND_MODEL"}]
        assert config["backend"] == "python"
    assert models["m"].files == models["m_stream"].files == {"1/bundle/x": "x"}


@pytest.mark.parametrize(("cores", "device", "count"), [(1, "cpu", 1), (3, "cpu", 3), (64, "cpu", 4), (64, "cuda", 1)])
def test_a_model_is_loaded_once_a_core(cores: int, device: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a number is given; a few times at most, since each has the weights, and once on a GPU."""
    monkeypatch.setattr("transom.export.triton.models.usable_cores", lambda: cores)
    config = read_config(found_for("bert-fp32", kinds=["task"], device=device)["m"].config.text())
    assert (config["instance_group"][0]["count"], config["parameters"]["instances"]) == (count, str(count))


def test_batches_and_how_long_they_wait() -> None:
    models = found_for("bert-fp32", kinds=KINDS, max_batch=64, queue_delay_us=150)
    configs = {name: read_config(model.config.text()) for name, model in models.items()}
    # The runtime cuts what is more than its graph takes; Triton's own ONNX Runtime would not
    assert {name: config["max_batch_size"] for name, config in configs.items()} == {
        "m": 64,
        "m_model": 64,
        "m_model_onnx": 2,
    }
    assert all(config["dynamic_batching"] == {"max_queue_delay_microseconds": 150} for config in configs.values())


def test_the_onnx_file_of_a_device_and_its_weights() -> None:
    on_cpu, on_gpu = (found_for("bert-int8", kinds=["onnx"], device=device, threads=2) for device in ("cpu", "cuda"))
    assert on_cpu["m_model_onnx"].files == {"1/model.onnx": "model.cpu.onnx", "1/model.weights": "model.weights"}
    assert on_gpu["m_model_onnx"].files == {"1/model.onnx": "model.onnx", "1/model.weights": "model.weights"}
    cpu, gpu = (read_config(models["m_model_onnx"].config.text()) for models in (on_cpu, on_gpu))
    assert (cpu["instance_group"][0]["kind"], gpu["instance_group"][0]["kind"]) == ("KIND_CPU", "KIND_GPU")
    assert cpu["parameters"] == {"intra_op_thread_count": "2"}
    anywhere = read_config(found_for("vit-fp32", kinds=["onnx"], device="auto")["m_model_onnx"].config.text())
    assert "instance_group" not in anywhere


def test_the_dtype_of_a_state_is_that_of_the_device() -> None:
    """An encoder's keys of half precision on the GPU are FP32 in the CPU's own file."""
    dtypes = {}
    for device in ("cpu", "cuda"):
        config = read_config(found_for("seq2seq-fp16", kinds=["tensors"], device=device)["m_encoder"].config.text())
        dtypes[device] = {each["data_type"] for each in config["output"]}
    assert dtypes == {"cpu": {"TYPE_FP32"}, "cuda": {"TYPE_FP16"}}
    with pytest.raises(ExportError, match="has a state that differs between the CPU and GPUs, and --device is auto"):
        found_for("seq2seq-fp16", kinds=["tensors"], device="auto")
    assert list(found_for("seq2seq-fp16", device="auto")) == ["m", "m_stream"]


def test_the_kinds_that_nobody_asked_for() -> None:
    assert list(found_for("bert-fp32")) == ["m"]
    assert list(found_for("gpt-fp32")) == ["m", "m_stream"]
    assert list(found_for("bert-fp32", kinds=["onnx", "task", "stream"])) == ["m", "m_model_onnx"]


def test_a_bundle_without_a_task_has_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(bundle: object) -> object:
        raise InputError("this bundle has no tokenizer.")

    monkeypatch.setattr("transom.export.triton.models.task_operation", refused)
    assert list(found_for("bert-fp32")) == ["m_model"]
    with pytest.raises(ExportError, match=r"no model of --kind task \(task: this bundle has no tokenizer\)\. Give an"):
        found_for("bert-fp32", kinds=["task"])


def test_a_kind_that_a_bundle_has_not() -> None:
    with pytest.raises(ExportError, match=r"gives no model of --kind onnx \(onnx: its graphs have a state\)"):
        found_for("gpt-fp32", kinds=["onnx"])
    with pytest.raises(ExportError, match=r"of --kind stream \(stream: answers of text-classification come at once\)"):
        found_for("bert-fp32", kinds=["stream"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mini lm", "'mini lm'"),
        ("мини", "'мини'"),
        (".hidden", "'.hidden'"),
        ("a/b", "'a/b'"),
        ("-x", "'-x'"),
        ("", ""),
    ],
)
def test_a_name_that_no_url_allows(name: str, said: str) -> None:
    bundle = Bundle(KEPT / "bert-fp32")
    with pytest.raises(ExportError, match=f"would be called {said}.*and a URL has to hold that") as refused:
        models_of(Models(bundle, name, Options(), "0" * 64, {}))
    assert "Give --name" in str(refused.value)


@pytest.mark.parametrize("name", ["minilm-int8", "a.b_c", "_x", "7", "A"])
def test_a_name_that_is_one(name: str) -> None:
    (model,) = models_of(Models(Bundle(KEPT / "bert-fp32"), name, Options(), "0" * 64, {}))
    assert model.name == name


def test_options_that_do_not_exist() -> None:
    with pytest.raises(ExportError, match="--kind is 'tasks'; expected one or several of task, stream, tensors, onnx"):
        Options(kinds=["tasks"])
    with pytest.raises(ExportError, match="--device is 'gpu'; expected one of cpu, cuda, tensorrt, auto"):
        Options(device="gpu")
