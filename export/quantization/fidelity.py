"""Compare a quantised bundle with FP32 on held-out samples: relative output error, top-1 agreement, perplexity.

A score alone hides damage: a model may be wrong elsewhere and as often. Agreement counts every top-1 choice that
changed, the relative error every change of the outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.calib.samples import Sample
from transom.export.families.base import export_family
from transom.export.families.evaluation import (
    MAX_SAMPLES,
    NEIGHBOUR,
    TOKENS_PER_SAMPLE,
    Floats,
    Outputs,
    drawn,
)
from transom.export.metrics import Accuracy, Rate, Z
from transom.runtime.errors import CalibrationError, ExportError
from transom.runtime.session import LoadedBundle

KEEP_BYTES = 256 << 20  # of FP32's outputs: 1,280 rows of GPT-2's logits, and all outputs of most tasks


@dataclass(frozen=True)
class RelativeError:
    """||ours - theirs|| / ||theirs||, Frobenius norms over all samples together.

    ``differences`` and ``references`` are the squared norms, one of each per sample.
    """

    differences: tuple[float, ...]
    references: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.references)

    @property
    def value(self) -> float:
        difference, reference = sum(self.differences), sum(self.references)
        if reference == 0:
            return 0.0 if difference == 0 else inf
        return sqrt(difference / reference)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval on other samples of this kind: of the ratio of squares, as in ``Rate``; None below two."""
        n, ratio = self.n, self.value**2
        if n < 2 or not np.isfinite(ratio):
            return None
        pairs = zip(self.differences, self.references, strict=True)
        variance = sum((difference - ratio * reference) ** 2 for difference, reference in pairs) / (n - 1)
        half = Z * sqrt(variance / n) / (sum(self.references) / n) if ratio else 0.0
        return sqrt(max(ratio - half, 0.0)), sqrt(ratio + half)

    def to_json(self) -> dict[str, Any]:
        interval = self.interval
        return {"value": self.value, "n": self.n, "interval": interval and list(interval)}


@dataclass(frozen=True)
class Fidelity:
    """The figures of a bundle beside FP32.

    top1        on how many cases both choose the same; None where the task chooses nothing
    embeds      whether that is the nearest other sample, of embeddings, and no answer of the task
    output      the names of the outputs that ``error`` is taken over
    right       where the truth of the samples is known (the words in a text's gaps, the caption beside an image), the
                accuracies (FP32's, the bundle's)
    nats        of decoders that continue texts: negative log-probability per token in nats, (FP32's, the bundle's)
    """

    top1: Accuracy | None
    embeds: bool
    output: str
    error: RelativeError
    nats: tuple[Rate, Rate] | None = None
    right: tuple[Accuracy, Accuracy] | None = None


class Fp32Outputs:
    """Cached FP32 outputs on the held-out set; candidates are scored against them.

    At most ``most`` samples are drawn (of CLIP images and as many texts); of tasks that answer at every token, four
    times as many tokens. The choices of FP32 are kept for all samples; its outputs, for the relative error, in float32
    until KEEP_BYTES are full. ``data`` is the held-out data's name. ``fp32`` is not needed afterwards. Raises
    CalibrationError for no samples, one that does not fit the model, one on which FP32 is not finite, and a model whose
    output is the same for all samples. ``sha256`` is over the samples that were drawn, in hex.
    """

    def __init__(self, fp32: LoadedBundle, samples: Sequence[Sample], data: str, most: int = MAX_SAMPLES) -> None:
        self._data = data
        self._task = fp32.manifest.family, fp32.manifest.task
        family = export_family(fp32.manifest.family, fp32.manifest.task)
        chosen = drawn(samples, most)
        self.sha256 = hashlib.sha256(b"".join(sample.digest() for sample in chosen)).hexdigest()
        self._cases = family.cases(fp32, chosen, TOKENS_PER_SAMPLE * most)
        self._kept: list[Outputs] = []
        self._values: list[Floats | None] = []
        free = KEEP_BYTES
        varies = False
        for outputs in self._cases.run(fp32):
            if not np.isfinite(outputs.values).all():
                raise CalibrationError(
                    f"held-out sample {outputs.sample} gives values in FP32 that are not finite; nothing can be "
                    "compared with them. Leave it out, or check the checkpoint."
                )
            free -= outputs.values.nbytes
            self._kept.append(without_values(outputs))
            self._values.append(outputs.values if free >= 0 or not self._values else None)
            varies = varies or differs(outputs.values, self._values[0])
        if not self._kept:
            raise CalibrationError(
                f"{data} has no held-out sample that this model answers; expected what it reads, texts of two tokens "
                "or more, or images. Give other calibration data."
            )
        if not varies and len(self._kept) > 1:
            raise CalibrationError(
                f"FP32 gives one and the same output for all {len(self._kept)} held-out samples of {data}, so that "
                "nothing a quantised model loses could be seen. Check the checkpoint, or give other calibration data."
            )
        self._nearest = nearest_others(self._kept) if self._cases.top1 == NEIGHBOUR else None

    def compare(self, bundle: LoadedBundle) -> Fidelity:
        """Run ``bundle`` on the same cases. Outputs that are not finite agree with nothing; their error is infinite.

        Raises ExportError for a bundle of another family, task or vocabulary.
        """
        task = bundle.manifest.family, bundle.manifest.task
        if task != self._task:
            raise ExportError(
                f"a bundle of {' for '.join(task)} is compared with one of {' for '.join(self._task)}; expected the "
                "same. Quantise the FP32 bundle that it is compared with."
            )
        found: list[Outputs] = []
        differences, references = [], []
        same: list[int] = []
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is seen here
            for theirs, values, ours in zip(self._kept, self._values, self._cases.run(bundle), strict=True):
                self._check_shapes(theirs, values, ours)
                finite = bool(np.isfinite(ours.values).all())
                if not finite or values is not None:
                    differences.append(squares(ours.values - values) if finite and values is not None else inf)
                    references.append(0.0 if values is None else squares(values))
                same.append(int((theirs.chosen == ours.chosen).all(1).sum()) if finite else 0)
                found.append(without_values(ours))
        counts = [len(outputs.chosen) for outputs in self._kept]
        if self._nearest is not None and len(found) > 2:  # of two, each is the other's nearest
            same = (nearest_others(found) == self._nearest).astype(int).tolist()
            counts = [1] * len(found)
        return Fidelity(
            by_sample(f"same top-1 as FP32, {self._cases.counted}", self._data, self._kept, same, counts),
            self._cases.top1 == NEIGHBOUR,
            self._cases.output,
            RelativeError(tuple(differences), tuple(references)),
            (nats_rate(self._kept, self._data), nats_rate(found, self._data)) if found[0].nats else None,
            self._right(found),
        )

    def compare_itself(self) -> Fidelity:
        """Return what ``compare`` returns of FP32 itself, without running anything: no difference in any case."""
        counts = [len(outputs.chosen) for outputs in self._kept]
        if self._nearest is not None and len(self._kept) > 2:
            counts = [1] * len(self._kept)
        references = tuple(squares(values) for values in self._values if values is not None)
        nats = nats_rate(self._kept, self._data) if self._kept[0].nats else None
        return Fidelity(
            by_sample(f"same top-1 as FP32, {self._cases.counted}", self._data, self._kept, counts, counts),
            self._cases.top1 == NEIGHBOUR,
            self._cases.output,
            RelativeError((0.0,) * len(references), references),
            (nats, nats) if nats is not None else None,
            self._right(self._kept),
        )

    def _right(self, found: Sequence[Outputs]) -> tuple[Accuracy, Accuracy] | None:
        """Return the accuracies of FP32 and of the bundle; None unless the truth of every sample is known."""
        sides = []
        for outputs in (self._kept, found):
            counts = [each.right for each in outputs if each.right is not None]
            if len(counts) < len(outputs):
                return None
            right, cases = zip(*counts, strict=True)
            sides.append(by_sample(f"accuracy of {self._cases.counted}", self._data, outputs, right, cases))
        fp32, bundle = sides
        return None if fp32 is None or bundle is None else (fp32, bundle)

    def _check_shapes(self, theirs: Outputs, values: Floats | None, ours: Outputs) -> None:
        if theirs.chosen.shape != ours.chosen.shape or (values is not None and values.shape != ours.values.shape):
            raise ExportError(
                f"held-out sample {ours.sample} gives other shapes than FP32 does; expected the same model. "
                "Quantise the FP32 bundle that it is compared with."
            )


def by_sample(
    name: str, data: str, outputs: Sequence[Outputs], right: Sequence[int], cases: Sequence[int]
) -> Accuracy | None:
    """Return the accuracy over samples, the runs of a long text together; None without a case."""
    counts: dict[str, tuple[int, int]] = {}
    for each, correct, n in zip(outputs, right, cases, strict=True):
        before = counts.get(each.sample, (0, 0))
        if n:
            counts[each.sample] = before[0] + correct, before[1] + n
    if not counts:
        return None
    return Accuracy(name, data, *zip(*counts.values(), strict=True))


def differs(values: Floats, first: Floats | None) -> bool:
    """Return whether any row of ``values`` (..., V) differs from the first row of ``first``."""
    if first is None or values.shape[-1:] != first.shape[-1:] or not first.size:
        return True
    width = first.shape[-1]
    return bool((values.reshape(-1, width) != first.reshape(-1, width)[0]).any())


def without_values(outputs: Outputs) -> Outputs:
    return replace(outputs, values=np.empty(0, np.float32))


def squares(array: Floats) -> float:
    """Return the sum of all squares, in FP64."""
    return float(np.square(array, dtype=np.float64).sum())


def nearest_others(outputs: Sequence[Outputs]) -> NDArray[np.int64]:
    """Return the index of each vector's nearest other by cosine, (N,); -1 for one that is not finite.

    The lower index where two are as near.
    """
    vectors = np.stack([each.vector for each in outputs if each.vector is not None])
    broken = np.array([not np.isfinite(vector).all() for vector in vectors])
    vectors = np.where(broken[:, None], np.float32(0), vectors)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    cosines = unit @ unit.T
    cosines[:, broken] = -2  # below every cosine
    np.fill_diagonal(cosines, -2)
    return np.where(broken, -1, cosines.argmax(1))


def nats_rate(outputs: Sequence[Outputs], data: str) -> Rate:
    amounts, tokens = zip(*(each.nats for each in outputs if each.nats is not None), strict=True)
    return Rate("nats per token", data, amounts, tokens)
