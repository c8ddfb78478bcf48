"""Plans in model repositories of Triton Inference Server: what stands in them, versions, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from command_line import error_line, transom
from transom.export.engine.targets import find_targets
from transom.export.triton.plans import config_of, require_servable, write_repository
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError
from transom.runtime.graph_spec import Axis, Graph, Tensor

TENSORRT = find_targets(["tensorrt"])
BERT = """name: "minilm_en"
platform: "tensorrt_plan"
max_batch_size: 16
input [
  { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] },
  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] },
  { name: "token_type_ids" data_type: TYPE_INT64 dims: [ -1 ] }
]
output [
  { name: "pooler_output" data_type: TYPE_FP32 dims: [ 160 ] },
  { name: "last_hidden_state" data_type: TYPE_FP32 dims: [ -1, 160 ] },
  { name: "sentence_embedding" data_type: TYPE_FP32 dims: [ 160 ] }
]
dynamic_batching { }
"""


def test_a_repository_and_its_versions(bert_bundle: Path, tmp_path: Path) -> None:
    """The second build is version 2 beside version 1; a configuration that someone changed is left alone."""
    manifest = Bundle(bert_bundle).manifest
    (folder,) = write_repository(tmp_path / "models", "minilm (en)", manifest, {"model": b"first"})
    assert folder == tmp_path / "models/minilm_en"
    assert (folder / "config.pbtxt").read_text() == BERT
    write_repository(tmp_path / "models", "minilm (en)", manifest, {"model": b"second"})
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.plan")}
    assert found == {"1/model.plan": b"first", "2/model.plan": b"second"}
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "config.pbtxt"]
    (folder / "config.pbtxt").write_text("name: 'mine'")
    with pytest.raises(ExportError, match=r"config\.pbtxt describes another model, or was changed by hand"):
        require_servable(tmp_path / "models", "minilm (en)", manifest, TENSORRT)
    assert (folder / "config.pbtxt").read_text() == "name: 'mine'"


def test_two_graphs_are_two_models(clip_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle(clip_bundle).manifest
    folders = write_repository(tmp_path, "clip", manifest, {"image": b"i", "text": b"t"})
    assert [folder.name for folder in folders] == ["clip_image", "clip_text"]
    assert (tmp_path / "clip_text/1/model.plan").read_bytes() == b"t"
    config = (tmp_path / "clip_image/config.pbtxt").read_text()
    assert '{ name: "pixel_values" data_type: TYPE_FP32 dims: [ 3, 8, 8 ] }' in config


def test_tensors_without_rows_are_not_batched() -> None:
    graph = Graph("g", (Tensor("x", "float16", ("B", 4)),), (Tensor("y", "bool", ("B",)), Tensor("z", "int32", (3,))))
    config = config_of("g", graph, {"B": Axis(1, 1, 8)})
    assert "max_batch_size: 0\n" in config
    assert "dynamic_batching" not in config
    assert '{ name: "x" data_type: TYPE_FP16 dims: [ -1, 4 ] }' in config
    batched = config_of("g", replace(graph, outputs=graph.outputs[:1]), {"B": Axis(1, 1, 8)})
    assert "max_batch_size: 8\n" in batched
    assert '{ name: "y" data_type: TYPE_BOOL dims: [ 1 ] reshape { shape: [ ] } }' in batched


def test_what_a_server_does_not_take_is_refused(bert_bundle: Path, gpt_bundle: Path, tmp_path: Path) -> None:
    bert, gpt = (Bundle(folder).manifest for folder in (bert_bundle, gpt_bundle))
    with pytest.raises(ExportError, match=r"--target is 'rtx-sm86'\. Give --target tensorrt"):
        require_servable(tmp_path, "bert", bert, find_targets(["tensorrt", "rtx-sm86"]))
    with pytest.raises(ExportError, match="the graph 'decoder' updates its cache in place"):
        require_servable(tmp_path, "gpt", gpt, TENSORRT)
    with pytest.raises(ExportError, match="the bundle is called 'мини', of which nothing can be a model's name"):
        require_servable(tmp_path, "мини", bert, TENSORRT)
    require_servable(tmp_path / "new" / "folder", "bert", bert, TENSORRT)
    assert not (tmp_path / "new").exists()  # nothing is written before the engines are built
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"cannot write into .*file: .*file is no folder that can be written"):
        require_servable(tmp_path / "file", "bert", bert, TENSORRT)
    with pytest.raises(ExportError, match=r"cannot write into .*file: .* engines that were built are in the bundle"):
        write_repository(tmp_path / "file", "x", bert, {"model": b""})


def test_the_command_says_so_before_it_builds(bert_bundle: Path, tmp_path: Path) -> None:
    said = error_line(transom("build", bert_bundle, "--target", "rtx-sm86", "--repository", tmp_path / "models"))
    assert "ExportError: --repository is for plans of full TensorRT" in said
    assert not (tmp_path / "models").exists()
