"""The tests of a family whose decoder's state is recurrent: a family's file of tests subclasses ``RecurrentFamily``."""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from command_line import changed_bundle, document, error_line, transom
from conftest import Once, export_to
from recurrent_models import END, VOCABULARY
from rtx import counted, needs_rtx
from transom.export.checkpoint import load_checkpoint
from transom.export.parity.backends import open_pytorch
from transom.export.quantization.options import QuantizeOptions
from transom.export.verification import verify
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, InputError
from transom.runtime.greedy_check import forced_logits
from transom.runtime.selftest import selftest

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
WORST = 1e-5  # max|ours - theirs| / max|theirs|, of two FP32 implementations
BEAMS, NEW = 3, 5
TARGETS = ("rtx-sm86", "rtx-sm89", "rtx-sm120")


class RecurrentFamily(ABC):
    """What every family with a recurrent decoder has to show.

    task        that it is exported for
    linears     linear layers of both graphs, all of which become integers
    others      operators with weights that stay as they are
    steps       teacher-forced steps of the longest parity case: at most 64, and less than max_target_positions
    loops       recurrences over a source, each in a loop of an engine of the encoder
    products    integer products of the engines of encoder and decoder: a layer that is split has one for each part
    kernels     of the engines of encoder and decoder, by precision
    """

    task: ClassVar[str]
    linears: ClassVar[int]
    others: ClassVar[dict[str, int]]
    steps: ClassVar[int] = 64
    loops: ClassVar[int]
    products: ClassVar[tuple[int, int]]
    kernels: ClassVar[dict[str, tuple[int, int]]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test in every precision where it names one as an argument."""
        if "precision" in metafunc.fixturenames:
            metafunc.parametrize("precision", PRECISIONS)

    @abstractmethod
    def checkpoint(self, folder: Path) -> Path:
        """Write a random checkpoint."""

    @abstractmethod
    def calibration_data(self, folder: Path) -> Path:
        """Write samples of the family's kind; at least 8 are asked for."""

    @abstractmethod
    def inputs(self, folder: Path) -> list[Any]:
        """Return three inputs of different kinds or lengths, as a user gives them: texts, or images' paths."""

    @abstractmethod
    def prompts(self, count: int) -> list[Any]:
        """Return inputs that get token ids for an answer: ids, or pixels."""

    def bundle(self, once: Once, precision: str = "fp32") -> Path:
        """Export once per run, of at most 3 rows a call."""

        def make(folder: Path) -> None:
            options: dict[str, Any] = {}
            if precision.startswith("int"):
                data = self.calibration_data(folder)
                options["quantize"] = QuantizeOptions(calibration_data=(str(data),), gate=False)
            export_to(
                folder, self.checkpoint(folder / "checkpoint"), max_sizes={"B": 3}, precision=precision, **options
            )

        return once(f"{type(self).__name__}-{precision}", make) / "bundle"

    # ---- the tests

    def test_every_precision_exports_verifies_and_passes_its_selftest(self, precision: str, once: Once) -> None:
        folder = self.bundle(once, precision)
        manifest = Bundle(folder).manifest
        chunks = [case["sizes"]["chunk"] for case in manifest.parity["cases"] if "chunk" in case["sizes"]]
        assert max(chunks) == self.steps  # token by token
        assert len(verify(folder, accuracy=False).cases) == len(manifest.parity["cases"])
        report = selftest(folder)
        assert report.worst.error <= report.tolerance
        assert "generation" in {case.name for case in report.cases}

    def test_the_state_is_in_the_manifest(self, once: Once) -> None:
        manifest = Bundle(self.bundle(once)).manifest
        decoder = next(file.graph for file in manifest.graphs if file.graph.name == "decoder")
        replaced = {tensor.aliases: tensor.shape for tensor in decoder.outputs if tensor.aliases}
        assert replaced
        for tensor in decoder.inputs:
            if tensor.name in replaced:
                assert tensor.state
                assert tensor.shape == replaced[tensor.name]
                assert tensor.shape[0] == "B"
        axis = manifest.axes["T"]
        assert (axis.min, axis.opt, axis.max) == (1, 1, 1)
        assert manifest.task == self.task
        assert manifest.operators["decoder"]  # what a step costs, node by node

    def test_every_linear_layer_becomes_integers_and_the_others_are_named(self, once: Once) -> None:
        folder = self.bundle(once, "int8")
        manifest = Bundle(folder).manifest
        assert manifest.quantization is not None
        layers = manifest.quantization["layers"]
        assert (len(layers), [layer["name"] for layer in layers if layer["kept"]]) == (self.linears, [])
        counts = Counter[str]()
        for operators in manifest.operators.values():
            counts.update({name: count for name, count in operators.items() if name in self.others})
        assert counts == self.others
        words = ", ".join(f"{count} {name}" for name, count in self.others.items())
        assert re.search(
            rf"not quantised +{words}: no linear layers, nor convolutions that gain", transom("inspect", folder).stdout
        )

    def test_a_row_does_not_depend_on_its_neighbours(self, once: Once) -> None:
        prompts, rng = self.prompts(3), np.random.default_rng(2)
        chunks = [rng.integers(0, len(VOCABULARY), (3, 1)) for _ in range(4)]
        with load(self.bundle(once)) as bundle:
            whole = np.concatenate(list(forced_logits(bundle, prompts, chunks)), axis=1)
            for row in range(3):
                parts = [chunk[row : row + 1] for chunk in chunks]
                alone = np.concatenate(list(forced_logits(bundle, prompts[row : row + 1], parts)), axis=1)
                assert np.abs(alone - whole[row : row + 1]).max() <= WORST * np.abs(whole).max()

    def test_beams_are_the_best_of_what_every_prefix_gives_from_the_start(self, once: Once) -> None:
        """A search over prefixes, each of which is fed to a new decoder: no state is carried, none changes its row."""
        folder = self.bundle(once)
        prompts = self.prompts(2)
        with load(folder) as bundle, open_pytorch(Bundle(folder), self.reloaded(folder)) as theirs:
            answers = bundle.generate(
                prompts, num_beams=BEAMS, max_new_tokens=NEW, suppress_tokens=[END], length_penalty=1.0, do_sample=False
            )
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer == beam_search(theirs, prompt)

    def reloaded(self, folder: Path) -> Any:
        source = Bundle(folder).manifest.source["checkpoint"]
        return load_checkpoint(source, task=None, max_sizes={"B": 3}, image_size=None, ignore_unused=False)

    def test_a_list_a_single_one_a_stream_and_the_command_line_agree(self, once: Once, tmp_path: Path) -> None:
        folder, inputs = self.bundle(once), self.inputs(tmp_path)
        with load(folder) as bundle:
            answers = bundle.generate(inputs, max_new_tokens=7)
            assert [bundle.generate(given, max_new_tokens=7) for given in inputs] == answers
            assert ["".join(bundle.stream(given, max_new_tokens=7)) for given in inputs] == answers
            drawn = [bundle.generate(inputs[0], max_new_tokens=7, do_sample=True, seed=5) for _ in range(2)]
            assert drawn[0] == drawn[1]
            several = bundle.generate(inputs[0], max_new_tokens=7, do_sample=True, seed=5, num_return_sequences=3)
            assert len(several) == 3
        printed = document(transom("run", folder, *inputs, "--max-new-tokens", "7", "--json"))
        assert [result["text"] for result in printed["results"]] == answers
        assert transom("run", folder, inputs[0], "--max-new-tokens", "7").stdout == answers[0] + "\n"

    def test_it_is_measured_by_prefill_and_decode(self, once: Once) -> None:
        folder = self.bundle(once)
        found = document(transom("bench", folder, "--runs", "1", "--warmup", "0", "--new-tokens", "3", "--json"))
        images = ["encoder"] * (self.task == "image-to-text")
        assert [timing["name"] for timing in found["timings"]] == [*images, "prefill", "decode"]
        assert transom("bench", folder, "--runs", "1", "--warmup", "0").exit_code == 0
        assert "context holds 80" in error_line(transom("bench", folder, "--new-tokens", "80"))

    def test_more_tokens_than_the_model_may_write(self, once: Once) -> None:
        with load(self.bundle(once)) as bundle, pytest.raises(InputError, match="the context holds 80") as raised:
            bundle.generate(self.prompts(1), max_new_tokens=80)
        assert "Ask for max_new_tokens=79 at most, or export a model with a longer context" in str(raised.value)

    @pytest.mark.parametrize(
        ("name", "fields", "words"),
        [
            ("logits", {"shape": ["B", len(VOCABULARY)]}, "gives logits (B, T, vocabulary) first"),
            ("decoder_input_ids", {"below": None}, "takes bounded tokens (B, T) first, T at most 1"),
            ("decoder_input_ids", {"shape": ["B", "B"]}, "T at most 1"),
            ("hidden_state.0", {"shape": ["B", 12]}, "is no input of its shape"),
            ("hidden_state.0", {"dtype": "float16"}, "two graphs have other shapes or dtypes of 'hidden_state.0'"),
            ("hidden_state.0.next", {"writes": None}, "writes 'None', expected the input of its name"),
            ("hidden_state.0.next", {"writes": "cross_key"}, "writes 'cross_key', expected the input of its name"),
        ],
    )
    def test_a_manifest_that_no_step_graph_has(
        self, once: Once, tmp_path: Path, name: str, fields: dict[str, Any], words: str
    ) -> None:
        def change(manifest: dict[str, Any]) -> None:
            graph = next(graph for graph in manifest["graphs"] if graph["name"] == "decoder")
            tensor = next(each for each in (*graph["inputs"], *graph["outputs"]) if each["name"] == name)
            tensor.update(fields)
            for field in [field for field, value in fields.items() if value is None]:
                del tensor[field]

        copy = changed_bundle(self.bundle(once), tmp_path, change)
        with pytest.raises(BundleError) as raised:
            Bundle(copy)
        assert words in str(raised.value)

    def test_a_step_graph_of_several_tokens(self, once: Once, tmp_path: Path) -> None:
        copy = changed_bundle(self.bundle(once), tmp_path, lambda manifest: manifest["axes"]["T"].update(max=3))
        with pytest.raises(BundleError, match="T at most 1"):
            Bundle(copy)

    def test_a_bundle_that_does_not_say_how_long_an_output_may_be(self, once: Once, tmp_path: Path) -> None:
        copy = changed_bundle(self.bundle(once), tmp_path, lambda manifest: manifest.update(options={}))
        with pytest.raises(BundleError, match=r"options\.max_target_positions is None, expected a positive integer"):
            load(copy)

    def test_a_step_of_its_own_replaces_the_state_that_is_fed(self, once: Once) -> None:
        """``run`` of the decoder: the state comes back under its own name, and two tokens at once are refused."""
        with load(self.bundle(once)) as bundle:
            graph = bundle.backend("decoder").graph
            state = [tensor.aliases for tensor in graph.outputs if tensor.aliases]
            sizes = {"B": 2, "T": 1, "S": 4}
            feeds: dict[str, Any] = {}
            for tensor in graph.inputs:
                shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
                feeds[tensor.name] = np.ones(shape, tensor.dtype)
            before = {name: feeds[name].copy() for name in state}
            found = bundle.run(feeds)
            assert found["logits"].shape == (2, 1, len(VOCABULARY))
            for name in state:
                assert found[name] is feeds[name]
                assert np.abs(feeds[name] - before[name]).max() > 0
            with pytest.raises(InputError, match=r"axis T allows 1\.\.1\. Give one at a time"):
                bundle.run({**feeds, "decoder_input_ids": np.ones((2, 2), np.int64)})
            missing = {name: array for name, array in feeds.items() if name != state[0]}
            with pytest.raises(InputError, match=f"input {state[0]!r} is missing"):
                bundle.run(missing)

    def test_inspect_and_json(self, once: Once) -> None:
        folder = self.bundle(once)
        assert "replaces hidden_state.*" in transom("inspect", folder).stdout
        assert json.loads(transom("inspect", folder, "--json").stdout)["family"]

    @needs_rtx
    def test_engines_of_every_precision(
        self, precision: str, once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every integer product multiplies integers, a step over the source is two kernels, on three GPUs alike."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        folder = Path(shutil.copytree(self.bundle(once, precision), tmp_path / "bundle"))
        if precision == "int4":
            assert "holds MatMulNBits" in error_line(transom("build", folder, "--target", "rtx-sm86"))
            return
        targets = TARGETS if precision in ("fp16", "int8") else TARGETS[:1]
        options = [word for target in targets for word in ("--target", target)]
        built = document(transom("build", folder, *options, "--json"))["engines"]
        assert [(engine["target"], engine["graph"]) for engine in built] == [*product(targets, ("encoder", "decoder"))]
        counts = {}
        for engine in built:
            (profile,) = engine["profiles"]
            number, name = (0, "all") if engine["graph"] == "encoder" else (1, "decode")
            products = self.products[number] if precision == "int8" else 0
            loops = profile.get("loops", [])
            assert (profile["profile"], profile["int8"]["products"], profile["int8"]["of"]) == (
                name,
                products,
                products,
            )
            assert [2 <= loop["kernels"] / loop["steps"] < 3 for loop in loops] == [True] * (self.loops * (1 - number))
            counts[engine["target"], engine["graph"]] = profile["kernels"]
        kernels = dict(zip(("encoder", "decoder"), map(counted, self.kernels[precision]), strict=True))
        assert counts == {(target, graph): kernels[graph] for target in targets for graph in kernels}
        fused = ("a loop of" if self.loops == 1 else f"{self.loops} loops of") if self.loops else "kernels"
        assert fused in transom("inspect", folder).stdout
        assert selftest(folder).worst.error <= selftest(folder).tolerance  # the bundle is sound as before


def beam_search(bundle: Any, prompt: Any) -> list[int]:
    """Return the most probable of NEW tokens that BEAMS beams find, END left out."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(NEW):
        candidates = []
        for score, tokens in beams:
            logits = list(forced_logits(bundle, [prompt], [np.array([[token]]) for token in tokens]))[-1][0, -1]
            shifted = logits.astype(np.float64) - logits.max()
            chances = shifted - np.log(np.exp(shifted).sum())  # as transformers: the suppressed token keeps its share
            candidates += [
                (score + float(chances[token]), [*tokens, token]) for token in range(len(chances)) if token != END
            ]
        beams = sorted(candidates, key=lambda beam: -beam[0])[:BEAMS]
    return beams[0][1]
