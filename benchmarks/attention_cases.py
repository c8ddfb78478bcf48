"""Attention cases for the GPU benchmark: shapes, FLOPs and bytes, and the tile sizes that are tried for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transom.export.plugins.flash_attention import ADDITIVE, BOOLEAN, NO_MASK
from transom.export.plugins.kernel_spec import TileSizes, Variant, padded_size
from transom.export.plugins.tile_sizes import ADDED, PROMPT, STEP, fitted

TOKENS = 16384  # of a batch: as many rows of S as that gives
WIDTH = 2048  # of a model: 32 heads of 64, 16 of 128
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
CACHES = (1024, 4096, 16384, 32768)
STEP_HEADS, STEP_GROUPS, STEP_ROWS = 32, (1, 4), (1, 8)
BIASED = (256, 1024, 4096)
PRECISIONS = ("fp16", "bf16", "fp32", "tf32")
ELEMENT = {"fp16": 2, "bf16": 2, "fp32": 4, "tf32": 4}  # bytes
MODELS = (  # name, kind, causal, heads of 64, pairs of S and T, batches
    ("BERT-base", "masked", False, 12, ((128, 128), (512, 512)), (1, 8, 32)),
    ("ViT-B/16", "prompt", False, 12, ((197, 197),), (1, 8, 32)),
    ("CLIP-B/32 image", "prompt", False, 12, ((50, 50),), (1, 8, 32)),
    ("CLIP-B/32 text", "prompt", True, 8, ((77, 77),), (1, 8, 32)),
    ("GPT-2", "prompt", True, 12, ((128, 128), (1024, 1024)), (1, 8)),
    ("GPT-2", "step", False, 12, ((1, 1024),), (1, 8)),
)
WINDOWS = (  # name, heads of 32, pixels of a window, batches; Swin's rows are windows, and of a shifted layer images
    ("Swin-T, stage 1", 3, 49, (64, 512, 2048)),
    ("Swin-T, stage 1, shifted", 64 * 3, 49, (1, 8, 32)),
    ("Swin-T, stage 3", 12, 49, (4, 32, 128)),
    ("Swin-B/384, stage 1", 4, 144, (64, 512)),
)
WINDOW_SIZE = 32  # of a head
AIMS = {"halves": 0.9, "fp32 and biased": 1.5}  # times the speed of the best backend
MOST_SPLITS, LEAST_SPLIT = 128, 128  # splits of a cache, and keys in one
COLUMNS = {PROMPT: "prompt", ADDED: "added", STEP: "step"}


@dataclass(frozen=True)
class Case:
    """One attention case, of ``kind``, in a precision, of B rows of S queries and T keys.

    "prompt" and "step" have no mask; "masked" has a boolean one, (B, 1, 1, T); "biased" a bias, (H, S, T); "windows"
    the same as an additive mask, (1, H, S, T), and tiles for windows, as an engine's plugin has them of Swin.
    ``model`` names the model whose shape it is, if any.
    """

    kind: str
    precision: str
    B: int
    S: int
    T: int
    heads: int
    size: int
    groups: int = 1
    causal: bool = False
    int8: bool = False
    model: str = ""

    @property
    def name(self) -> str:
        what = [
            *([self.model] if self.model else []),
            self.kind,
            self.precision,
            f"head {self.size}",
            f"B={self.B} S={self.S} T={self.T}",
        ]
        flags = {"causal": self.causal, "int8 cache": self.int8, f"{self.groups} heads share keys": self.groups > 1}
        return " ".join([*what, *(flag for flag, given in flags.items() if given)])

    @property
    def flops(self) -> int:
        """Return the FLOPs: two products of each query with each visible key, a multiplication and an addition each."""
        seen = self.S * self.T - (self.S * (self.S - 1) // 2 if self.causal else 0)
        return 4 * self.B * self.heads * self.size * seen

    @property
    def bytes(self) -> int:
        """Return the bytes of all tensors, each read or written once."""
        element, shared = ELEMENT[self.precision], self.heads // self.groups
        mask = self.B * self.T if self.kind == "masked" else 0
        queries = 2 * self.B * self.heads * self.S * self.size * element  # and the output
        keys = 2 * self.B * shared * self.T * (self.size + 4 if self.int8 else self.size * element)
        bias = self.heads * self.S * self.T * element if self.kind in ("biased", "windows") else 0
        return queries + keys + bias + mask

    @property
    def variant(self) -> Variant:
        dtype = "fp32" if self.precision == "tf32" else self.precision
        return Variant(
            dtype,
            self.size,
            self.heads,
            self.groups,
            causal=self.causal,
            mask={"masked": BOOLEAN, "windows": ADDITIVE}.get(self.kind, NO_MASK),
            bias=self.kind == "biased",
            int8=self.int8,
            split=self.kind == "step",
            precision="tf32" if self.precision == "tf32" else "ieee",
        )

    @property
    def column(self) -> int:
        """Return the column of the table of tile sizes; a split INT8 cache belongs to a step."""
        return {"prompt": PROMPT, "masked": ADDED, "biased": ADDED, "windows": ADDED, "step": STEP}[self.kind]

    def tiles(self, entry: TileSizes) -> TileSizes:
        """Return the tile sizes that an engine's plugin makes of the table's."""
        return fitted(entry, self.S, self.T) if self.kind == "windows" else entry

    @property
    def aim(self) -> float | None:
        """Return the ratio to the best backend to aim at; None for a case that no backend supports."""
        if self.int8:
            return None
        biased = self.kind in ("biased", "windows")
        return AIMS["halves" if self.precision in ("fp16", "bf16") and not biased else "fp32 and biased"]


def cases(*, quick: bool, only: Sequence[str] = ()) -> list[Case]:
    """Return all cases, or those whose names contain one of ``only``."""
    found = list(quick_cases() if quick else all_cases())
    return [case for case in found if not only or any(part in case.name for part in only)]


def model_cases() -> Iterator[Case]:
    """Yield the attentions of published models, in every precision."""
    for precision in PRECISIONS:
        for model, kind, causal, heads, shapes, batches in MODELS:
            for S, T in shapes:
                for B in batches:
                    yield Case(kind, precision, B, S, T, heads, 64, causal=causal, model=model)
        for model, heads, pixels, batches in WINDOWS:
            for B in batches:
                yield Case("windows", precision, B, pixels, pixels, heads, WINDOW_SIZE, model=model)


def all_cases() -> Iterator[Case]:
    yield from model_cases()
    for precision in PRECISIONS:
        for size in (64, 128):
            for causal in (False, True):
                for S in LENGTHS:
                    yield Case("prompt", precision, TOKENS // S, S, S, WIDTH // size, size, causal=causal)
            for S in BIASED:
                yield Case("biased", precision, TOKENS // S, S, S, WIDTH // size, size)
    for B in STEP_ROWS:
        for groups in STEP_GROUPS:
            for T in CACHES:
                for precision, int8 in (("fp16", False), ("fp16", True), ("bf16", False)):
                    yield Case("step", precision, B, 1, T, STEP_HEADS, 128, groups, int8=int8)


def quick_cases() -> Iterator[Case]:
    for size in (64, 128):
        yield Case("prompt", "fp16", 16, 1024, 1024, WIDTH // size, size, causal=True)
    yield Case("prompt", "tf32", 16, 1024, 1024, 32, 64)
    yield Case("prompt", "fp32", 16, 1024, 1024, 32, 64)
    yield Case("biased", "fp16", 16, 1024, 1024, 32, 64)
    yield Case("windows", "fp16", 512, 49, 49, 3, WINDOW_SIZE, model="Swin-T, stage 1")
    for int8 in (False, True):
        yield Case("step", "fp16", 8, 1, 4096, STEP_HEADS, 128, 4, int8=int8)


def candidates(entry: TileSizes, *, step: bool, quick: bool) -> list[TileSizes]:
    """Return the table's entry, then each of its numbers halved and doubled, and common choices, each once."""
    m, n, warps, stages = entry.m, entry.n, entry.warps, entry.stages
    near = [TileSizes(m, n // 2, warps, stages), TileSizes(m, 2 * n, warps, stages)]
    near += [TileSizes(m, n, 12 - warps if warps in (4, 8) else 4, stages)]
    if not quick:
        near += [TileSizes(m, n, warps, each) for each in (stages - 1, stages + 1)]
        near += [TileSizes(m, 2 * n, 4, 2), TileSizes(m, 2 * n, 4, 3)]
        if not step:  # a step has few queries
            near += [
                TileSizes(m // 2, n, warps, stages),
                TileSizes(2 * m, n, warps, stages),
                TileSizes(m // 2, n, 4, stages),
            ]
            near += [TileSizes(128, 64, 8, 3), TileSizes(128, 128, 8, 2), TileSizes(64, 64, 4, 3)]
    found = [entry, *near]
    return [
        each
        for each in dict.fromkeys(found)
        if 16 <= each.m <= 128 and 16 <= each.n <= 128 and 1 <= each.stages <= 4 and each.warps in (1, 2, 4, 8)
    ]


def splits_of(case: Case) -> list[int]:
    """Return the numbers of splits to try: powers of two, of at least LEAST_SPLIT keys each."""
    most = min(MOST_SPLITS, max(1, case.T // LEAST_SPLIT))
    return [1 << power for power in range(most.bit_length())]


def key_of(case: Case) -> tuple[str, int, int]:
    return case.precision, padded_size(case.size), case.column


def tuned_on(measured: Sequence[Case], *, quick: bool) -> list[list[Case]]:
    """Return per precision, head size and column the cases nearest to a length of 2048, with and without causality."""
    groups: dict[tuple[str, int, int], list[Case]] = {}
    for case in measured:
        if not case.model:
            groups.setdefault(key_of(case), []).append(case)
    found = []
    for group in groups.values():
        kinds: dict[tuple[bool, bool, int], list[Case]] = {}
        for case in group:
            kinds.setdefault((case.causal, case.int8, case.groups), []).append(case)
        nearest = [min(kind, key=lambda case: abs(math.log2(case.T / 2048))) for kind in kinds.values()]
        found.append(nearest[:1] if quick else nearest)
    return found
