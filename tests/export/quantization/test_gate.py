"""The accuracy gate: criteria and limits, figures by pencil, and bundles that pass and fail for a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, log, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from transom.export.families.base import export_family
from transom.export.metrics import Accuracy, Rate
from transom.export.quantization.fidelity import Fidelity, RelativeError
from transom.export.quantization.gate import Gate, gate_result, per_token
from transom.export.quantization.gate_result import GateResult, drop_interval, growth_interval, pooled
from transom.export.reference_models import REFERENCE_MODELS
from transom.export.scores import bits_per_byte
from transom.runtime import load
from transom.runtime.errors import ExportError

ERROR = RelativeError((1.0, 3.0), (400.0, 1200.0))  # 0.05
TOP1 = Accuracy.of_each("same top-1 as FP32, images", "scans", [True] * 538 + [False] * 2)
ALIKE = Fidelity(TOP1, False, "logits", ERROR)


def evaluated(family: str, activations: str, agreement: Fidelity, scores: Any) -> GateResult:
    return gate_result(export_family(family).gate, activations, agreement, scores)


def accuracy(correct: int, n: int = 1000) -> Accuracy:
    return Accuracy.of_each("zero-shot accuracy", "scans", [True] * correct + [False] * (n - correct))


def nats(*amounts: float) -> Rate:
    return Rate("nats per token", "chapters", amounts, (100,) * len(amounts))


@pytest.mark.parametrize(
    ("family", "correct", "holds"),
    [  # of 1,000: BERT, CLIP and the Transformer may lose ten, ViT thirteen; one more is one too many
        ("bert", 980, True),
        ("bert", 979, False),
        ("clip", 980, True),
        ("clip", 979, False),
        ("transformer", 980, True),
        ("transformer", 979, False),
        ("vit", 977, True),
        ("vit", 976, False),
        ("vit", 999, True),
    ],
)
def test_points_of_a_score(family: str, correct: int, holds: bool) -> None:
    found = evaluated(family, "static", ALIKE, (accuracy(990), accuracy(correct)))
    assert found.holds == holds
    assert (found.measure, found.n) == ("zero-shot accuracy", 1000)
    assert found.found == pytest.approx((990 - correct) / 1000)


@pytest.mark.parametrize(
    ("activations", "more", "holds"),
    [  # ln 1.03 = 0.02956, ln 1.05 = 0.04879
        ("dynamic", 0.0295, True),
        ("dynamic", 0.0297, False),
        ("weight-only", 0.0297, False),
        ("static", 0.0487, True),
        ("static", 0.0489, False),
        ("static", -1.0, True),
    ],
)
def test_growth_of_perplexity_is_per_token(activations: str, more: float, holds: bool) -> None:
    """200 tokens of 3 nats each, and ``more`` of them."""
    scores = nats(300, 300), nats(100 * (3 + more), 100 * (3 + more))
    found = evaluated("gpt", activations, ALIKE, scores)
    assert (found.measure, found.n, found.holds) == ("perplexity", 200, holds)
    assert found.found == pytest.approx(np.exp(more) - 1)


def test_bits_per_byte_become_nats_per_token() -> None:
    """8 bits for 4 bytes and 2 tokens, 16 for 4 and 6: 24 bits a token's 8th, so a perplexity of 2 ** 3."""
    found = per_token(Rate("bits per byte", "chapters", (8.0, 16.0), (4, 4)), (2, 6))
    assert isinstance(found, Rate)
    assert (found.units, found.value) == ((2, 6), pytest.approx(3 * log(2)))
    assert per_token(accuracy(1), ()) == accuracy(1)


def test_without_a_score_agreement_decides() -> None:
    """2 of 540 changed are 0.37 points; 6 are 1.11, too many for BERT and few enough for ViT."""
    assert evaluated("bert", "static", ALIKE, None).found == pytest.approx(2 / 540)
    assert evaluated("bert", "static", ALIKE, None).holds
    six = replace(ALIKE, top1=Accuracy.of_each(TOP1.name, "scans", [True] * 534 + [False] * 6))
    assert not evaluated("bert", "static", six, None).holds
    assert evaluated("vit", "static", six, None).holds
    assert evaluated("vit", "static", six, None).n == 540


@pytest.mark.parametrize("agreement", [replace(ALIKE, embeds=True), replace(ALIKE, top1=None)])
def test_embeddings_and_regressions_by_their_error(agreement: Fidelity) -> None:
    found = evaluated("bert", "static", agreement, None)
    assert (found.measure, found.found, found.n, found.holds) == ("relative error of logits", 0.05, 2, True)
    wrong = replace(agreement, error=RelativeError((1.1,), (100.0,)))
    assert not evaluated("bert", "static", wrong, None).holds  # 0.105


@pytest.mark.parametrize(("family", "scores"), [("vit", None), ("gpt", (nats(3, 3), nats(nan, 3)))])
def test_what_is_not_finite_fails_every_gate(family: str, scores: Any) -> None:
    broken = replace(ALIKE, error=RelativeError((inf,), (1.0,)))
    found = evaluated(family, "static", broken, scores)
    assert (found.found, found.interval, found.holds) == (inf, None, False)
    assert not evaluated("gpt", "static", ALIKE, (nats(3, 3), nats(inf, 3))).holds
    assert found.summary()


def test_the_interval_of_a_drop_pairs_the_answers() -> None:
    """Of 100, 8 lost and 2 won: 6 / 102 with sqrt(11 - 36 / 102) / 102 is 0.0588 -+ 0.0627 (Agresti and Min).

    Of the same fractions with 50 lost and 44 won it is far wider; without any change it is not a point.
    """

    def score(right: int, then: int) -> Accuracy:
        return Accuracy.of_each("accuracy", "scans", [True] * right + [False] * then + [True] * (100 - right - then))

    before = score(98, 2)
    after = Accuracy.of_each("accuracy", "scans", [False] * 8 + [True] * 92)
    assert drop_interval(before, after) == pytest.approx((-0.0039, 0.1215), abs=5e-5)
    low, high = drop_interval(score(50, 44), Accuracy.of_each("accuracy", "scans", [False] * 50 + [True] * 50))
    assert high - low > 0.3
    assert drop_interval(before, before) == pytest.approx((-0.0192, 0.0192), abs=5e-5)  # 1.96 / 102


def test_the_interval_of_a_drop_keeps_the_gaps_of_a_text_together() -> None:
    """Ten texts of ten gaps: one that loses all ten says less than ten that lose one each."""
    whole = Accuracy("accuracy", "texts", (10,) * 10, (10,) * 10)
    one = drop_interval(whole, replace(whole, right=(0, *(10,) * 9)))
    each = drop_interval(whole, replace(whole, right=(9,) * 10))
    assert one[1] - one[0] > 4 * (each[1] - each[0])
    assert sum(one) == pytest.approx(sum(each))


def test_the_interval_of_growth_pairs_the_blocks() -> None:
    """Blocks differ tenfold and each gets the same 1 nat of 100 tokens more: 1 % and nothing beside."""
    low, high = growth_interval(nats(100, 1000), nats(101, 1001)) or (nan, nan)
    assert low == pytest.approx(high) == pytest.approx(np.exp(0.01) - 1)
    assert growth_interval(nats(100), nats(101)) is None


def test_words_of_each_kind() -> None:
    rest = "agrees with FP32 in 538 of 540 images (95 %: 98.7 to 99.9 %); relative error of logits 0.05"
    scored = evaluated("clip", "static", ALIKE, (accuracy(537, 540), accuracy(535, 540)))
    assert scored.summary() == (f"zero-shot accuracy 0.9944 -> 0.9907, -0.37 points of 1.0 allowed, n = 540; {rest}")
    written = evaluated("gpt", "dynamic", ALIKE, (nats(300, 300), nats(301, 301)))
    assert written.summary() == f"perplexity 20.09 -> 20.29, +1.01 % of 3.0 % allowed, n = 200 tokens; {rest}"
    changed = evaluated("bert", "static", ALIKE, None)
    assert changed.summary() == f"0.37 points of answers changed of 1.0 allowed, n = 540; {rest}"
    embedded = evaluated("bert", "static", Fidelity(None, True, "sentence_embedding", ERROR), None)
    assert embedded.summary() == "relative error of sentence_embedding 0.05 of 0.1 allowed, n = 2"


def test_json_is_what_a_bundle_records() -> None:
    found = evaluated("clip", "static", ALIKE, (accuracy(990), accuracy(985)))
    words = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert words["measure"] == "zero-shot accuracy"
    assert (words["allowed"], words["found"], words["n"], words["holds"]) == (0.01, 0.005, 1000, True)
    assert words["interval"] == pytest.approx(list(found.interval or ()))
    assert words["score"]["fp32"]["correct"] == 990
    assert words["score"]["int8"]["interval"] == pytest.approx(list(accuracy(985).interval))
    assert (words["agreement"]["n"], words["agreement"]["correct"]) == (540, 538)
    error = words["relative_error"]
    assert (error["output"], error["value"], error["n"]) == ("logits", 0.05, 2)
    assert error["interval"] == pytest.approx([0.05, 0.05])
    written = evaluated("gpt", "static", ALIKE, (nats(300, 300), nats(301, 301))).to_json()
    assert written["score"]["fp32"]["perplexity"] == pytest.approx(np.exp(3))


def once(lost: int, n: int = 540) -> GateResult:
    return evaluated("clip", "static", ALIKE, (accuracy(n, n), accuracy(n - lost, n)))


def test_repetitions_on_other_inputs_add_up() -> None:
    """One over the line and one within: 5 + 7 lost of 1,080 are 1.11 points, 4 + 6 are 0.93."""
    found = pooled([once(5), once(7)], same_inputs=False)
    assert (found.n, found.inputs, found.found, found.holds) == (1080, 1080, pytest.approx(12 / 1080), False)
    assert found.repetitions == 2
    assert found.agreement is not None
    assert (found.agreement.n, found.agreement.correct) == (1080, 1076)
    assert found.relative_error == pytest.approx(0.05)
    assert not once(6).holds
    assert pooled([once(4), once(6)], same_inputs=False).holds
    assert pooled([once(5)], same_inputs=False) == once(5)
    grown = [evaluated("gpt", "static", ALIKE, (nats(300), nats(after))) for after in (303, 309)]
    assert pooled(grown, same_inputs=False).found == pytest.approx(np.exp(0.06) - 1)
    assert pooled(grown, same_inputs=False).interval is not None
    with pytest.raises(ExportError, match="no gate results"):
        pooled([], same_inputs=False)
    with pytest.raises(ExportError, match="different gates"):
        pooled([once(1), grown[0]], same_inputs=False)


def test_repetitions_on_the_same_inputs_are_averaged() -> None:
    """Two calibrations, 540 inputs: still 540, not 1,080; 5 and 7 lost are 6."""
    found = pooled([once(5), once(7)], same_inputs=True)
    assert (found.n, found.inputs, found.found) == (540, 540, pytest.approx(6 / 540))
    assert (found.error.n, found.relative_error) == (2, pytest.approx(0.05))
    nothing, both = once(0).interval, found.interval
    assert nothing is not None
    assert both is not None
    assert both[1] - both[0] > 2 * (nothing[1] - nothing[0])
    grown = [evaluated("gpt", "static", ALIKE, (nats(300, 300), nats(300, more))) for more in (303, 309)]
    assert pooled(grown, same_inputs=True).n == 200
    assert pooled(grown, same_inputs=True).found == pytest.approx(np.exp(0.03) - 1)


def test_what_ships_has_to_hold_and_the_repetitions_too() -> None:
    """5 of 540 are allowed; the repetitions may not make up for what ships, nor the other way round."""
    good = replace(once(5), repeated=pooled([once(5), once(5)], same_inputs=True))
    assert good.holds
    assert good.summary().endswith("; over 2 calibrations -0.93 points, n = 540")
    assert good.to_json()["repeated"]["calibrations"] == 2
    assert once(5).to_json()["repeated"] is None
    shipped = replace(once(7), repeated=pooled([once(7), once(0)], same_inputs=True))
    assert not shipped.holds
    assert shipped.broken.found == pytest.approx(7 / 540)
    others = replace(once(0), repeated=pooled([once(0), once(14)], same_inputs=True))
    assert not others.holds
    assert others.broken.found == pytest.approx(7 / 540)


def test_how_many_repetitions_are_wanted() -> None:
    """1,000 cases of 100 inputs: 540 scans twice; 2,000 tokens of 20 texts five times."""
    assert [once(0, n).wanted for n in (540, 999, 1000, 5000)] == [2, 2, 1, 1]
    top1 = Accuracy("same", "texts", (100,) * 20, (100,) * 20)
    few = evaluated("bert", "static", replace(ALIKE, top1=top1), None)
    assert (few.n, few.inputs, few.wanted) == (2000, 20, 5)


def test_a_reference_model_against_itself_and_damaged(vit_bundle: Path) -> None:
    """Without its patches ViT tells all scans alike: nine points in ten are lost."""
    with load(vit_bundle, threads=1) as vit:
        gate = Gate.of_reference(REFERENCE_MODELS["vit"], vit)
        same = gate.evaluate(vit, "static")
        assert (same.n, same.found, same.relative_error, same.holds) == (540, 0.0, 0.0, True)
        assert same.agreement is not None
        assert same.agreement.correct == 540
        vit._backends = [Blind(vit.backend("model"))]
        blind = gate.evaluate(vit, "static")
    assert blind.found > 0.8
    assert not blind.holds
    with pytest.raises(ExportError, match="expected one of static, dynamic, weight-only"):
        gate.evaluate(vit, "int8")


class Blind:
    """Sees black images."""

    device = "cpu"

    def __init__(self, inner: Any) -> None:
        self.graph, self._inner = inner.graph, inner

    def run(self, feeds: Any, shapes: Any) -> Any:
        return self._inner.run({"pixel_values": np.zeros_like(feeds["pixel_values"])}, shapes)


def test_perplexity_with_a_score_and_without(gpt_bundle: Path) -> None:
    """Of the same text both are the perplexity per token that ``score`` gives."""
    text = (REFERENCE_MODELS["gpt"].held_out()[0].text or "")[:300]
    samples = [replace(REFERENCE_MODELS["gpt"].held_out()[0], text=text)]
    with load(gpt_bundle, threads=1) as gpt:
        bare = Gate(gpt, samples, "a paragraph").evaluate(gpt, "dynamic")
        assert isinstance(bare.score_fp32, Rate)
        assert np.exp(bare.score_fp32.value) == pytest.approx(gpt.score(text), rel=1e-6)
        assert (bare.measure, bare.found, bare.allowed, bare.holds) == ("perplexity", 0.0, 0.03, True)
        tokens = len(gpt.log_probabilities(text))
        rate = bits_per_byte(gpt.log_probabilities, text.removeprefix("\n"))
        scored = per_token(rate, [tokens])
    assert scored.value == pytest.approx(bare.score_fp32.value, rel=1e-6)


def test_a_reference_model_of_another_task_has_no_gate() -> None:
    other: Any = SimpleNamespace(manifest=SimpleNamespace(family="vit", task="feature-extraction"))
    with pytest.raises(ExportError, match="vit is scored as image-classification; this bundle is for feature-extr"):
        Gate.of_reference(REFERENCE_MODELS["vit"], other)
