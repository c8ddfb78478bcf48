"""The tests of a family of one encoder graph: a family's file of tests subclasses ``EncoderFamily``.

    class TestElectra(EncoderFamily):
        family = "electra"
        config = ("ElectraConfig", {**BERT, "embedding_size": 96})
        heads: ClassVar = {"ElectraModel": ("last_hidden_state",), "ElectraForMaskedLM": ("logits",)}
        linears = 19

Every test runs on random checkpoints that transformers writes. docs/adding_a_model.md says what else a family shows.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from command_line import document, transom
from conftest import Once, export_to, save_checkpoint
from row_independence import check_encoders
from rtx import needs_rtx
from transom.export.bundle_graphs import canonical_graphs
from transom.export.checkpoint import load_checkpoint
from transom.export.engine.build import build
from transom.export.engine.targets import find_targets
from transom.export.families.base import export_family
from transom.export.parity.inputs import parity_inputs
from transom.export.quantization.options import QuantizeOptions
from transom.export.report.report import write_report
from transom.export.verification import verify
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.selftest import selftest
from transom.runtime.tasks import family_tasks

WORST = 1e-5  # max|ours - theirs| / max|theirs|, of two FP32 implementations
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
TEXTS = 12  # calibration samples; at least 8 are asked for


class EncoderFamily:
    """What every family of one encoder graph has to show.

    family      its name in runtime/families.py
    config      transformers' config class, and sizes that no kernel could like: a prime width, three layers
    heads       architecture -> its outputs, named as transformers names them; the first is exported in each precision
    linears     linear layers of the first architecture, all of which become integers
    convolutions  of it that gain by integers: all of them become such
    layers      of attention
    wordpiece   whether the checkpoint gets a WordPiece vocabulary
    labels      config of an architecture that classifies
    same_as     our output's name -> transformers', where they differ
    """

    family: ClassVar[str]
    config: ClassVar[tuple[str, dict[str, Any]]]
    heads: ClassVar[Mapping[str, tuple[str, ...]]]
    linears: ClassVar[int]
    convolutions: ClassVar[int] = 0
    layers: ClassVar[int] = 3
    wordpiece: ClassVar[bool] = True
    labels: ClassVar[Mapping[str, dict[str, Any]]] = {}
    same_as: ClassVar[Mapping[str, str]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test for every architecture, or in every precision, that it names as an argument."""
        if "architecture" in metafunc.fixturenames:
            metafunc.parametrize("architecture", self.heads)
        if "precision" in metafunc.fixturenames:
            metafunc.parametrize("precision", PRECISIONS)

    def checkpoint(self, folder: Path, architecture: str, **config: Any) -> Path:
        """Write a random checkpoint of ``architecture``."""
        options = {**self.labels.get(architecture, {}), **config}
        return save_checkpoint(folder, architecture, kind=self.config, wordpiece=self.wordpiece, **options)

    def bundle(self, once: Once, architecture: str, precision: str = "fp32") -> Path:
        """Export ``architecture`` once per run, of at most 3 rows a call."""

        def make(folder: Path) -> None:
            source = self.checkpoint(folder / "checkpoint", architecture)
            options: dict[str, Any] = {}
            if precision == "int8":
                data = self.calibration_data(folder)
                options["quantize"] = QuantizeOptions(calibration_data=(str(data),), gate=False)
            export_to(folder, source, max_sizes={"B": 3}, precision=precision, **options)

        return once(f"{type(self).__name__}-{architecture}-{precision}", make) / "bundle"

    def calibration_data(self, folder: Path) -> Path:
        """Write texts for families that read texts; others override this."""
        path = folder / "texts.txt"
        words = ("the people of paris", "a long day", "call him now", "more water", "what is it")
        path.write_text("\n".join(f"{words[row % 5]} {'and ' * row}the city" for row in range(TEXTS)) + "\n")
        return path

    def load_theirs(self, architecture: str, folder: Path) -> Any:
        """Return transformers' model of a checkpoint; families that transformers does not define override this."""
        import transformers

        return getattr(transformers, architecture).from_pretrained(folder).eval()

    def call_theirs(self, model: Any, feeds: Mapping[str, torch.Tensor]) -> Any:
        """Call transformers' model; families whose model takes more override this."""
        return model(**feeds)

    # ---- the tests

    def test_the_definition_equals_transformers(self, architecture: str, tmp_path: Path) -> None:
        folder = self.checkpoint(tmp_path, architecture)
        theirs = self.load_theirs(architecture, folder)
        loaded = load_checkpoint(str(folder), task=None, max_sizes={}, image_size=None, ignore_unused=False)
        (graph,) = loaded.graphs
        inputs = parity_inputs(loaded.graphs, loaded.open_tokenizer(), loaded.preprocess)[graph.name]
        longest = {name: axis.max for name, axis in loaded.axes.items()}
        for sizes in ({"B": 1, "S": 1}, {"B": 3, "S": longest.get("S", 1)}, {"B": 2, "S": 13}):
            feeds = {name: torch.from_numpy(array) for name, array in inputs.feeds(sizes).items()}
            with torch.no_grad():
                found = loaded.module(*(feeds[tensor.name] for tensor in graph.inputs))
                expected = self.call_theirs(theirs, feeds)
            ours = dict(zip((tensor.name for tensor in graph.outputs), found, strict=True))
            real = feeds["attention_mask"].bool() if "attention_mask" in feeds else None
            for name in self.heads[architecture]:
                reference = expected[self.same_as.get(name, name)]
                assert ours[name].shape == reference.shape
                by_token = real is not None and reference.shape[:2] == real.shape
                error, scale = (ours[name] - reference).abs(), float(reference.abs().max())
                worst = float((error[real] if by_token else error).max())  # padding may be anything
                assert worst <= WORST * scale, f"{name} at {sizes}: {worst / scale:.1e}"

    def test_the_graph_is_canonical(self, architecture: str, once: Once) -> None:
        """Attention once per layer, as one operator; GELU and LayerNormalization as themselves; standard operators."""
        (model,) = canonical_graphs(Bundle(self.bundle(once, architecture))).values()
        counts = Counter(node.op_type for node in model.graph.all_nodes())
        assert counts["Attention"] == self.layers
        assert counts["Gelu"] >= self.layers
        assert counts["LayerNormalization"] >= 2 * self.layers
        assert {node.domain for node in model.graph.all_nodes()} == {""}
        assert counts["Erf"] == counts["Softmax"] == 0

    def test_every_architecture_exports_and_passes_its_selftest(self, architecture: str, once: Once) -> None:
        report = selftest(self.bundle(once, architecture))  # the export itself compares it with PyTorch
        assert report.worst.error <= report.tolerance

    def test_every_precision_exports_and_is_verified(self, precision: str, once: Once) -> None:
        folder = self.bundle(once, next(iter(self.heads)), precision)
        verify(folder, accuracy=False)
        report = selftest(folder)
        assert report.worst.error <= report.tolerance
        assert Bundle(folder).manifest.precision == precision

    def test_every_linear_layer_is_of_integers(self, once: Once) -> None:
        """Recorded as quantised, and an integer product where ONNX Runtime executes the graph."""
        manifest = Bundle(self.bundle(once, next(iter(self.heads)), "int8")).manifest
        assert manifest.quantization is not None
        layers = manifest.quantization["layers"]
        assert len(layers) == self.linears + self.convolutions
        assert sum(layer.get("operator") == "Conv" for layer in layers) == self.convolutions
        assert not any(layer["kept"] for layer in layers)

    def test_a_row_does_not_depend_on_its_neighbours(self, once: Once) -> None:
        with load(self.bundle(once, next(iter(self.heads))), threads=2) as bundle:
            check_encoders(bundle, lambda output: 0.0)

    def test_every_task_can_be_run(
        self, architecture: str, once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The example that `inspect` shows is what `run` takes."""
        from PIL import Image

        monkeypatch.chdir(tmp_path)
        Image.fromarray(np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3)).save("photo.png")
        bundle = self.bundle(once, architecture)
        task = family_tasks(self.family).tasks[Bundle(bundle).manifest.task]
        inputs = shlex.split(task.example)
        results = document(transom("run", bundle, *inputs, "--json"))["results"]
        assert len(results) == (1 if task.pair else len(inputs))
        assert transom("run", bundle, *inputs).stdout.strip()

    def test_the_report_has_its_figure(self, once: Once, tmp_path: Path) -> None:
        page = tmp_path / "page.html"
        write_report(self.bundle(once, next(iter(self.heads))), (), page, ())
        text = page.read_text("utf-8")
        assert export_family(self.family).title in text
        assert re.search(r"<svg|<figure", text)

    @needs_rtx
    def test_attention_fuses_in_an_engine(self, once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In FP16 for SM86, built without a GPU; an attention that did not fuse would be an EngineError."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        folder = Path(shutil.copytree(self.bundle(once, next(iter(self.heads)), "fp16"), tmp_path / "bundle"))
        (engine,) = build(Bundle(folder), find_targets(["rtx-sm86"]), allow_unfused=False, tell=lambda line: None)
        assert all((fusion.attention, fusion.attentions) == (self.layers, self.layers) for fusion in engine.fusions)
