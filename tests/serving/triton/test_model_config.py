"""Every config.pbtxt that ``transom repository`` writes, read by Triton's own ``ModelConfig``.

Nothing else reads those of --kind onnx: the server of nvidia-pytriton has no such backend.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from model_config import read_config
from paths import FP32, KEPT
from transom.export.triton.config import CONFIG
from transom.export.triton.models import KINDS
from transom.export.triton.repository import Options, write_repository

BUNDLES = [*FP32, *sorted(KEPT.glob("*-int8"))]


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_tritons_own_message_reads_what_ours_does(bundle: Path, tmp_path: Path) -> None:
    written = write_repository(tmp_path, [bundle], Options(kinds=KINDS, threads=1, queue_delay_us=100))
    assert len(written) >= 3
    for each in written:
        text = (each.folder / CONFIG).read_text()
        fields = read_config(text)
        parameters = {key: {"string_value": value} for key, value in fields.pop("parameters").items()}
        theirs = text_format.Parse(text, ModelConfig())
        assert theirs == json_format.ParseDict(fields | {"parameters": parameters}, ModelConfig())
        assert (theirs.name, theirs.max_batch_size) == (each.folder.name, each.model.config.max_batch_size)
        assert [tensor.name for tensor in theirs.input] == [tensor.name for tensor in each.model.config.inputs]
        assert len(theirs.output) == len(each.model.config.outputs) > 0


def test_tritons_own_message_refuses_what_ours_does() -> None:
    for text in ("nam: 'x'", "name: x", 'max_batch_size: "8"', "input [ { data_type: TYPE_FLOAT } ]"):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(text, ModelConfig())
