"""Count the operators of a bundle's graphs as ONNX Runtime rewrites them before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from transom.export.bundle_graphs import operator_counts
from transom.runtime.backends.ort import PROVIDERS, SLOW_FUSIONS, session_entries
from transom.runtime.backends.ort_library import FATAL, onnxruntime
from transom.runtime.bundle import Bundle
from transom.runtime.manifest_graphs import GraphFile

DEVICE = "cpu"


def executed_operators(bundle: Bundle, file: GraphFile) -> Mapping[str, int]:
    """How many nodes of each operator are left after ONNX Runtime's own passes, at the level the runtime uses.

    Empty where it does not say: a graph of more than 2 GiB cannot be written as one file.
    """
    library = onnxruntime()
    options = library.SessionOptions()
    options.log_severity_level = FATAL
    for key, setting in session_entries(file, DEVICE).items():
        options.add_session_config_entry(key, setting)
    if file.weights is not None:
        weights = bundle.read(file.weights)
        options.add_external_initializers_from_files_in_memory([file.weights], [weights], [len(weights)])
    with TemporaryDirectory(prefix="transom-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "executed.onnx")
        try:
            library.InferenceSession(
                bundle.read(file.file_for(DEVICE)),
                options,
                providers=[PROVIDERS[DEVICE]],
                disabled_optimizers=SLOW_FUSIONS[DEVICE],
            )
            return operator_counts(ir.load(options.optimized_model_filepath))
        except Exception:  # the library raises bare RuntimeError and its own types alike
            return {}
