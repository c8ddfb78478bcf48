"""The parity gate for decoders: caches that are wrong, greedy tokens that differ, golden generations."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from command_line import as_quantized, changed_bundle
from transom.export import pipeline
from transom.export.parity import compare
from transom.export.parity.compare import TOLERANCES
from transom.export.parity.results import CaseResult
from transom.export.verification import verify
from transom.runtime.errors import BundleError, ParityError
from transom.runtime.golden import GENERATION, GOLDEN
from transom.runtime.greedy_check import PAD, GreedyGeneration, GreedyTokens, divergences, require_same_tokens
from transom.runtime.manifest import manifest_sha256
from transom.runtime.selftest import selftest

MakeCheckpoint = Callable[..., Path]
Exported = Callable[..., tuple[Path, Path]]
DECODERS = ("GPT2LMHeadModel", "MarianMTModel")
SHALLOW: dict[str, dict[str, int]] = {  # traced in half the time, where layers are not the subject
    "GPT2LMHeadModel": {"n_layer": 1},
    "MarianMTModel": {"encoder_layers": 1, "decoder_layers": 1},
}


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_every_precision_exports_verifies_and_passes_its_selftest(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, architecture: str, precision: str
) -> None:
    folder = make_checkpoint(architecture)
    manifest = pipeline.export(str(folder), tmp_path / "out", precision=precision, max_sizes={"B": 3})
    parity = manifest.parity
    assert manifest.precision == precision
    assert 0 < parity["worst"]["error"] <= TOLERANCES[precision]
    steps = [case["sizes"]["chunk"] for case in parity["cases"] if "chunk" in case["sizes"]]
    assert max(steps) == 64  # teacher-forced, one by one
    cases = verify(tmp_path / "out").cases
    assert len(cases) == len(parity["cases"])
    ours = [case for case in cases if not case.native]
    assert sum(case.emulated for case in ours) == (len(ours) // 2 if precision == "fp16" else 0)  # a third side
    report = selftest(tmp_path / "out", kernels="onnxruntime")
    assert report.worst.error <= report.tolerance == TOLERANCES[precision]
    (generation,) = (case for case in report.cases if case.name == GENERATION)
    assert generation.against_pytorch[0].shape[2] == 101
    again = max(comparison.error for case in report.cases for comparison in case.against_build)
    assert again <= 1e-6  # the same machine computes the same
    assert selftest(tmp_path / "out").cases  # by lists of operators, where there are kernels


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("bounds", [{"B": 1, "P": 2, "C": 9}, {"C": 1}], ids=str)
def test_tight_bounds_export_and_pass_their_selftest(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, architecture: str, bounds: dict[str, int]
) -> None:
    """One row, fewer logits than tokens in a step, a context in which nothing can be generated."""
    out = tmp_path / "out"
    pipeline.export(str(make_checkpoint(architecture, **SHALLOW[architecture])), out, max_sizes=bounds)
    assert verify(out).cases
    assert selftest(out).cases


@pytest.mark.usefixtures("traced_once")
def test_a_checkpoint_that_draws_several_answers_by_default_exports(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Golden generations are greedy, one of each prompt, whatever the checkpoint's own settings are."""
    folder = make_checkpoint("GPT2LMHeadModel")
    (folder / "generation_config.json").write_text('{"do_sample": true, "num_return_sequences": 3, "top_k": 5}')
    pipeline.export(str(folder), tmp_path / "out", max_sizes={"B": 3})
    assert selftest(tmp_path / "out").cases


def patched(monkeypatch: pytest.MonkeyPatch, change: Callable[[ir.Model], object]) -> list[CaseResult]:
    """``change`` the decoder's graph behind the tracing; gives the list that the parity cases will be in."""
    trace, judge, seen = pipeline.onnx_from_module, compare.require_parity, []

    def trace_then_change(module: Any, graph: Any, axes: Any) -> ir.Model:
        model = trace(module, graph, axes)
        if graph.name == "decoder":
            change(model)
        return model

    def note(cases: list[CaseResult], *rest: Any) -> None:
        seen.extend(cases)
        judge(cases, *rest)

    monkeypatch.setattr(pipeline, "onnx_from_module", trace_then_change)
    monkeypatch.setattr(compare, "require_parity", note)
    return seen


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("architecture", "weight"),
    [
        ("GPT2LMHeadModel", "h.1.attn.c_attn.bias"),
        ("GPT2LMHeadModel", "wpe.weight"),
        ("MarianMTModel", "model.decoder.layers.1.encoder_attn.out_proj.bias"),
        ("MarianMTModel", "model.final_logits_bias"),
    ],
)
def test_one_perturbed_weight_fails_the_export(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, weight: str
) -> None:
    def perturb(model: ir.Model) -> None:
        value = model.graph.initializers[weight]
        assert value.const_value is not None
        changed = value.const_value.numpy().copy()
        changed.reshape(-1)[7] += 0.05  # weights have deviation 0.2
        value.const_value = ir.Tensor(changed)

    folder = make_checkpoint(architecture)
    patched(monkeypatch, perturb)
    with pytest.raises(ParityError, match=r"differs from PyTorch at B=\d+ prompt=\d+ chunk=\d+ .*logits\["):
        pipeline.export(str(folder), tmp_path / "out", max_sizes={"B": 3})
    assert list(tmp_path.iterdir()) == []


def node_behind(model: ir.Model, output: str) -> ir.Node:
    (node,) = (node for node in model.graph if any(value.name == output for value in node.outputs))
    return node


def write_early(model: ir.Model) -> None:
    """One cache gets its new tokens one position too early; at position 0, where a prompt begins, none is earlier."""
    node = node_behind(model, "value_cache.1.written")
    indices = node.inputs[2]
    assert indices is not None
    one, zero = (ir.tensor(np.array([value], np.int64)) for value in (1, 0))
    constants = [ir.node("Constant", [], attributes={"value": value}) for value in (one, zero)]
    earlier = ir.node("Sub", [indices, constants[0].outputs[0]])
    clipped = ir.node("Max", [earlier.outputs[0], constants[1].outputs[0]])
    node.replace_input_with(2, clipped.outputs[0])
    model.graph.insert_before(node, [*constants, earlier, clipped])


def keep_stale(model: ir.Model) -> None:
    """Attention reads what is new, but the buffer is given back as it came."""
    node = node_behind(model, "key_cache.0.written")
    written, cache = node.outputs[0], node.inputs[0]
    place = list(model.graph.outputs).index(written)
    written.name = "read.by.attention"
    stale = ir.node("Identity", [cache])
    stale.outputs[0].name, stale.outputs[0].shape, stale.outputs[0].dtype = (
        "key_cache.0.written", written.shape, written.dtype,
    )  # fmt: skip
    model.graph.outputs[place] = stale.outputs[0]
    model.graph.append(stale)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("change", [write_early, keep_stale])
@pytest.mark.parametrize("architecture", DECODERS)
def test_a_cache_that_is_written_wrongly_fails_in_later_steps_alone(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, change: Any
) -> None:
    folder = make_checkpoint(architecture)
    cases = patched(monkeypatch, change)
    with pytest.raises(ParityError, match=r"prompt=\d+ chunk=[1-9]\d* tokens=\d+: logits\["):
        pipeline.export(str(folder), tmp_path / "out", max_sizes={"B": 3})
    tolerance = TOLERANCES["fp32"]
    first = [case.worst.error for case in cases if case.shape.get("chunk", 0) == 0]
    later = [case.worst.error for case in cases if case.shape.get("chunk", 0) > 0]
    assert max(first) <= tolerance < 1e-3 < max(later)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ greedy, by pencil


def rows(*tokens: list[int]) -> NDArray[np.int64]:
    return np.array(tokens, np.int64)


def chose(tokens: NDArray[np.int64]) -> GreedyGeneration:
    """A generation of which nothing is known but its tokens."""
    chosen = GreedyTokens(tokens, np.zeros(tokens.shape, np.float32))
    return GreedyGeneration(chosen, np.zeros((*tokens.shape, 10), np.float32))


def test_the_first_step_that_differs_is_what_counts() -> None:
    theirs = rows([5, 6, 7, PAD], [1, 2, 3, 4])
    margins = np.array([[9, 8, 7, 0], [3, 0.25, 2, 1]], np.float32)
    assert divergences(theirs, GreedyTokens(theirs, margins)) == []
    (found,) = divergences(rows([5, 6, 7, PAD], [1, 9, 9, PAD]), GreedyTokens(theirs, margins))
    assert (found.row, found.step, found.ours, found.theirs, found.margin) == (1, 1, 9, 2, 0.25)
    assert str(found) == "greedy token 1 of row 1 is 9, PyTorch's is 2 (its margin 2.50e-01)"


@pytest.mark.parametrize(("tolerance", "passes"), [(0.2, True), (0.125, True), (0.1, False), (0.0, False)])
def test_a_margin_below_both_sides_tolerance_explains_another_token(tolerance: float, passes: bool) -> None:
    """A margin of 0.25 is gone where each side may be off by 0.125 of a logit."""
    theirs, ours = rows([1, 2, 3]), rows([1, 9, 9])
    margins = np.array([[3, 0.25, 2]], np.float32)
    if passes:
        assert [found.step for found in require_same_tokens(chose(ours), GreedyTokens(theirs, margins), tolerance)] == [
            1
        ]
    else:
        with pytest.raises(ParityError, match=r"greedy token 1 of row 0 is 9, PyTorch's is 2 .*only a margin below"):
            require_same_tokens(chose(ours), GreedyTokens(theirs, margins), tolerance)


def test_a_row_that_ends_early_differs_where_it_ends() -> None:
    theirs, margins = rows([1, 2, 3]), np.full((1, 3), 5, np.float32)
    with pytest.raises(ParityError, match=f"token 2 of row 0 is {PAD}, PyTorch's is 3"):
        require_same_tokens(chose(rows([1, 2, PAD])), GreedyTokens(theirs, margins), 0.1)


def test_going_on_where_pytorch_ended_differs_by_the_ends_margin() -> None:
    """PyTorch chose the end with a margin of 5: the token chosen instead is reported, at the step where it ended."""
    theirs, margins = rows([1, 2, PAD]), np.array([[5, 5, 0]], np.float32)
    with pytest.raises(ParityError, match="token 2 of row 0 is 7"):
        require_same_tokens(chose(rows([1, 2, 7])), GreedyTokens(theirs, margins), 0.1)


def test_a_margin_that_is_no_number_excuses_nothing() -> None:
    with pytest.raises(ParityError, match="token 1 of row 0 is 3"):
        require_same_tokens(chose(rows([1, 3])), GreedyTokens(rows([1, 2]), np.full((1, 2), np.nan, np.float32)), 0.1)


def test_one_wrong_row_is_not_excused_by_another() -> None:
    theirs, ours = rows([1, 2], [3, 4]), rows([9, 2], [3, 8])
    margins = np.array([[0.01, 5], [5, 5]], np.float32)
    with pytest.raises(ParityError, match="token 1 of row 1 is 8"):
        require_same_tokens(chose(ours), GreedyTokens(theirs, margins), 0.1)


@pytest.mark.parametrize(
    ("lost", "ours", "passes"),
    [
        (0.2, 2, True),  # token 2 won 0.2 and token 1 lost 0.2: a margin of 0.4 is explained
        (0.1, 2, False),  # 0.2 of 0.4 is explained, however wide the tolerance is
        (0.2, 0, False),  # token 0 is none of the largest: nothing explains it
    ],
)
def test_a_margin_is_explained_by_what_the_logits_differ_there(lost: float, ours: int, passes: bool) -> None:
    """An error that is allowed and did not happen excuses no token."""
    theirs = GreedyTokens(
        rows([1]), np.array([[0.4]], np.float32), rows([1, 2])[None], np.array([[[3.0, 2.6]]], np.float32)
    )
    found = GreedyGeneration(chose(rows([ours])).chosen, np.array([[[0.0, 3.0 - lost, 2.6 + lost]]], np.float32))
    if passes:
        assert [each.step for each in require_same_tokens(found, theirs, 5.0)] == [0]
    else:
        with pytest.raises(ParityError, match="greedy token 0 of row 0 is"):
            require_same_tokens(found, theirs, 5.0)


@pytest.mark.usefixtures("traced_once")
def test_other_greedy_tokens_fail_the_export(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits agree, yet one side chooses otherwise: only the comparison of whole generations sees it."""
    folder, greedy, calls = make_checkpoint("GPT2LMHeadModel"), compare.greedy, []

    def other(*arguments: Any) -> Any:
        found = greedy(*arguments)
        calls.append(found)
        if len(calls) == 2:  # ours; PyTorch's was first
            found.chosen.tokens[0, 3] = (found.chosen.tokens[0, 3] + 1) % 101
        return found

    monkeypatch.setattr(compare, "greedy", other)
    with pytest.raises(ParityError, match=r"greedy token 3 of row 0 is \d+, PyTorch's is \d+ \(its margin"):
        pipeline.export(str(folder), tmp_path / "out", max_sizes={"B": 3})
    assert list(tmp_path.iterdir()) == []
    calls.clear()
    monkeypatch.setattr(compare, "require_same_tokens", lambda ours, theirs, tolerance: [
        *divergences(ours.chosen.tokens, replace(theirs, margins=theirs.margins * 0))
    ])  # fmt: skip
    manifest = pipeline.export(str(folder), tmp_path / "near", max_sizes={"B": 3})
    (near_tie,) = manifest.parity["greedy_near_ties"]
    assert (near_tie["row"], near_tie["step"], near_tie["margin"]) == (0, 3, 0.0)


# ---------------------------------------------------------------------------------- golden generations


def with_golden(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change golden.safetensors, every hash made right again."""
    tensors = load_file(bundle / GOLDEN)
    change(tensors)
    data = save(tensors)
    (bundle / GOLDEN).write_bytes(data)
    words = json.loads((bundle / "bundle.json").read_text())
    words["files"][GOLDEN] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    words["manifest_sha256"] = manifest_sha256(words)
    (bundle / "bundle.json").write_text(json.dumps(words))
    return bundle


def key(side: str, name: str) -> str:
    return f"{GENERATION}/{side}/{name}"


def other_token(tensors: dict[str, Any]) -> None:
    tokens = tensors[key("pytorch", "tokens")].copy()
    tokens[0, 5] = (tokens[0, 5] + 1) % 101
    tensors[key("pytorch", "tokens")] = tokens


def other_logits(tensors: dict[str, Any]) -> None:
    tensors[key("pytorch", "logits")] = tensors[key("pytorch", "logits")] + np.float32(0.05)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (other_token, ParityError, r"greedy token 5 of row 0 is \d+, PyTorch's is \d+"),
        (other_logits, ParityError, "differs from PyTorch: logits"),
        (lambda t: t.pop(key("pytorch", "margins")), BundleError, "case 'generation' is not complete"),
        (lambda t: t.pop(key("input", "prompts")), BundleError, "case 'generation' is not complete"),
        (lambda t: t.pop(key("bundle", "logits")), BundleError, "case 'generation' is not complete"),
        (lambda t: t.update({key("input", "lengths"): np.array([1.5, 2])}), BundleError, "'generation' is not comp"),
        (lambda t: t.update({key("input", "lengths"): np.array([0, 2])}), BundleError, "'generation' is not comp"),
        (lambda t: t.update({key("input", "lengths"): np.array([9])}), BundleError, "'generation' is not comp"),
        (lambda t: t.update({key("input", "prompts"): np.zeros(3, np.int64)}), BundleError, "'generation' is not"),
        (lambda t: t.update({key("pytorch", "tokens"): np.zeros((2, 0), np.int64)}), BundleError, "is not complete"),
        (lambda t: t.update({key("pytorch", "tokens"): np.zeros((9, 4), np.int64)}), BundleError, "is not complete"),
        (lambda t: t.update({key("pytorch", "margins"): np.zeros((1, 1), np.float32)}), BundleError, "is not comp"),
        (lambda t: t.update({key("pytorch", "logits"): np.zeros(3, np.float32)}), BundleError, "is not complete"),
        (lambda t: t.pop(key("pytorch", "top_logits")), BundleError, "is not complete"),
        (lambda t: t.update({key("pytorch", "top_ids"): t[key("pytorch", "top_ids")] + 90}), BundleError, "not comp"),
        (lambda t: t.update({key("pytorch", "top_ids"): t[key("pytorch", "top_ids")][:, 1:]}), BundleError, "not comp"),
    ],
)
@pytest.mark.parametrize("architecture", DECODERS)
def test_the_selftest_fails_on_another_golden_generation(
    exported: Exported, tmp_path: Path, architecture: str, change: Any, error: type[Exception], message: str
) -> None:
    bundle = Path(shutil.copytree(exported(architecture)[1], tmp_path / "bundle"))
    with pytest.raises(error, match=message):
        selftest(with_golden(bundle, change), threads=1, kernels="onnxruntime")


def other_build(tensors: dict[str, Any], margin: float = 9.0) -> None:
    """Another token in the build's own generation, and how sure the build was of it."""
    tokens, margins = (tensors[key("bundle", name)].copy() for name in ("tokens", "margins"))
    tokens[0, 5] = (tokens[0, 5] + 1) % 101
    margins[0, 5] = margin
    tensors |= {key("bundle", "tokens"): tokens, key("bundle", "margins"): margins}


def other_built_logits(tensors: dict[str, Any]) -> None:
    tensors[key("bundle", "logits")] = tensors[key("bundle", "logits")] * np.float32(1.25)


def quantized_gpt(exported: Exported, folder: Path) -> Path:
    return changed_bundle(exported("GPT2LMHeadModel")[1], folder, lambda words: as_quantized(words, "dynamic"))


def test_a_quantised_bundle_says_again_what_it_said_when_it_was_built(exported: Exported, tmp_path: Path) -> None:
    """PyTorch said something else, and was sure of it."""

    def another(tensors: dict[str, Any]) -> None:
        tokens = tensors[key("pytorch", "tokens")].copy()
        tokens[0, -1] = (tokens[0, -1] + 1) % 101  # the last one, behind which no logits stand
        tensors[key("pytorch", "tokens")] = tokens
        other_logits(tensors)

    report = selftest(with_golden(quantized_gpt(exported, tmp_path), another), threads=1, kernels="onnxruntime")
    assert report.side == "bundle"
    assert report.worst.error <= 1e-6
    assert report.worst_against("pytorch").error > 1e-3


def test_another_token_where_the_build_was_undecided(exported: Exported, tmp_path: Path) -> None:
    bundle = with_golden(quantized_gpt(exported, tmp_path), lambda tensors: other_build(tensors, margin=0.0))
    (tie,) = (tie for case in selftest(bundle, threads=1, kernels="onnxruntime").cases for tie in case.near_ties)
    assert re.fullmatch(r"greedy token 5 of row 0 is \d+, the build's is \d+ \(its margin 0\.00e\+00\)", tie)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (other_build, ParityError, r"token 5 of row 0 is \d+, the build's is \d+ .* cache is not what the build's is"),
        (other_built_logits, ParityError, r"differs from what it gave when it was built: logits\["),
        (lambda t: t.pop(key("bundle", "tokens")), BundleError, "case 'generation' is not complete"),
        (lambda t: t.pop(key("bundle", "margins")), BundleError, "case 'generation' is not complete"),
        (lambda t: t.update({key("bundle", "tokens"): np.zeros((1, 1), np.int64)}), BundleError, "is not complete"),
    ],
)
def test_the_selftest_of_a_quantised_bundle_fails(
    exported: Exported, tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        selftest(with_golden(quantized_gpt(exported, tmp_path), change), threads=1, kernels="onnxruntime")
