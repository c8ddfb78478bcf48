"""An engine built for narrower sizes than the bundle's bounds what calls may have."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from command_line import document, transom
from emulated_gpu import (
    Put,
)
from transom.export.engine.shapes import Shapes
from transom.runtime import load
from transom.runtime.errors import InputError, ShapeError
from transom.runtime.selftest import selftest


def test_an_engine_of_narrower_sizes_is_obeyed(put: Put, bert_bundle: Path) -> None:
    """Rows go in batches that the engine takes; what it does not take names its bounds and the build for more."""
    folder = put(bert_bundle, shapes=Shapes(max={"B": 2, "S": 9}))
    texts = ["the first", "of the year", "was the last one", "a"]
    with load(folder, device="tensorrt") as ours, load(bert_bundle) as theirs:
        assert (ours.max_size("B"), ours.max_size("S")) == (2, 9)
        np.testing.assert_allclose(ours.embed(texts), theirs.embed(texts), atol=1e-5)
        with pytest.raises(
            ShapeError,
            match=r"axis S allows 1\.\.9 in the engine for rtx-sm89\. Run `transom build .*-sm89 --max S=10`",
        ):
            ours.run({"input_ids": np.ones((1, 10), np.int64), "attention_mask": np.ones((1, 10), np.int64)})
        with pytest.raises(
            InputError, match=r"Pass truncate=True, or run `transom build BUNDLE --target rtx-sm89 --max S="
        ):
            ours.tokenizer().encode(["the first of the year was the last one that we had"], truncate=False)
    told = document(transom("selftest", folder, "--device", "tensorrt", "--json"))
    assert all("S=1" in case["name"] or "S=7" in case["name"] for case in told["cases"])
    assert any("axis S allows 1..9 in the engine for rtx-sm89" in line for line in told["left_out"])
    tight = put(bert_bundle, shapes=Shapes(min={"B": 2, "S": 8}, max={"B": 2, "S": 9}))
    with pytest.raises(ShapeError, match=r"the engine of .* takes none of its golden values: "):
        selftest(tight, device="tensorrt")
    timed = document(transom("bench", folder, "--device", "tensorrt", "--runs", "1", "--json"))["timings"]
    assert timed[0]["sizes"] == {"B": 1, "S": 9}


def test_a_shorter_cache_is_a_shorter_context(put: Put, gpt_bundle: Path) -> None:
    folder = put(gpt_bundle, shapes=Shapes(max={"B": 1, "C": 100}))
    with load(folder, device="tensorrt") as ours, load(gpt_bundle) as theirs:
        assert ours.context == 100
        assert ours.generate("It is", max_new_tokens=8) == theirs.generate("It is", max_new_tokens=8)
        with pytest.raises(
            InputError, match=r"the context holds 100\. .*transom build BUNDLE --target rtx-sm89 --max C="
        ):
            ours.generate("It is", max_new_tokens=120)
        with pytest.raises(InputError, match=r"this bundle allows 1\. Run `transom build .* --max B=2`"):
            ours.generate("It is", num_beams=2, max_new_tokens=2)
    report = selftest(folder, device="tensorrt")
    assert report.worst.error < 2e-5
    (said,) = report.left_out
    with pytest.raises(ShapeError, match=r"none of its golden values: of its prompts 0 fit into 24 tokens"):
        selftest(put(gpt_bundle, shapes=Shapes(max={"C": 24})), device="tensorrt")
    assert re.match(r"generation: 1 of \d+ rows and \d+ of \d+ steps fit into the engine", said)


def test_an_engine_without_recorded_bounds_goes_by_its_profiles(put: Put, bert_bundle: Path) -> None:
    """As version 0.1.0 wrote them: what bundle.json does not say, the engine does."""
    with load(put(bert_bundle), device="tensorrt") as bert:
        assert bert.axes == bert.manifest.axes
        backend = bert.backend("model")
        longer = {t.name: np.ones((1, 600), np.int64) for t in backend.graph.inputs}
        with pytest.raises(ShapeError, match=r"takes \(1, 1\) to .* Run `transom build BUNDLE --target rtx-sm89` with"):
            backend.run(longer, {})
