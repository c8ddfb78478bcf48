"""Attention cases of the GPU check: shapes in the order they are run, FLOPs and bytes, tile sizes, kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transom.export.plugins.kernel_spec import ADDITIVE, BOOLEAN, NO_MASK, TileSizes, Variant, padded_size
from transom.export.plugins.layout import Layout
from transom.export.plugins.tile_sizes import ADDED, PROMPT, STEP, fitted, tile_sizes_for

TOKENS = 16384  # of a batch: as many rows of S as that gives
WIDTH = 2048  # of a model: 32 heads of 64, 16 of 128
SIZES = (64, 128)  # of a head
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
WIDE_LENGTHS = (128, 1024, 8192)  # in FP32 and TF32
CACHES = (1024, 4096, 16384, 32768)
STEP_HEADS, STEP_GROUPS, STEP_ROWS = 32, (1, 4), (1, 8)
BIASED = (256, 1024, 4096)
ELEMENT = {"fp16": 2, "bf16": 2, "fp32": 4, "tf32": 4}  # bytes
PADDED = ((128, (1, 8, 32)), (512, (1, 8, 32)))  # BERT-base: lengths and batches
WINDOWS = (  # name, heads of 32, pixels of a window, batches; Swin's rows are windows, and of a shifted layer images
    ("Swin-T, stage 1", 3, 49, (64, 2048)),
    ("Swin-T, stage 1, shifted", 64 * 3, 49, (1, 32)),
    ("Swin-B/384, stage 1", 4, 144, (64, 512)),
)
WINDOW_SIZE = 32  # of a head
AIMS = {"halves": 0.9, "fp32 and biased": 1.5}  # times the speed of the best backend
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)  # of a cache, tried
LEAST_SPLIT = 128  # keys in one
COLUMNS = {PROMPT: "prompt", ADDED: "added", STEP: "step"}
TUNED_LENGTH = 2048  # of the cases whose tile sizes are tried


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
        model = [self.model] if self.model else []
        what = [*model, self.kind, self.precision, f"head {self.size}", f"B={self.B} S={self.S} T={self.T}"]
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
        return Variant(
            "fp32" if self.precision == "tf32" else self.precision,
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
    def layout(self) -> Layout:
        return Layout(mask="hm" if self.kind == "windows" else "b")

    @property
    def column(self) -> int:
        """Return the column of the table of tile sizes; a split INT8 cache belongs to a step."""
        return {"prompt": PROMPT, "step": STEP}.get(self.kind, ADDED)

    def tiles(self, sm: int) -> TileSizes:
        """Return the table's tile sizes for a compute capability, of windows as an engine's plugin fits them."""
        entry = tile_sizes_for(sm, self.variant)
        return fitted(entry, self.S, self.T) if self.kind == "windows" else entry

    @property
    def splits(self) -> tuple[int, ...]:
        """Return the numbers of splits to try, of at least LEAST_SPLIT keys each; 1 without split-KV."""
        most = self.T // LEAST_SPLIT if self.kind == "step" else 1
        return tuple(each for each in SPLITS if each <= max(1, most))

    @property
    def aim(self) -> float | None:
        """Return the ratio to the best backend to aim at; None for a case that no backend supports."""
        if self.int8:
            return None
        biased = self.kind in ("biased", "windows")
        return AIMS["halves" if self.precision in ("fp16", "bf16") and not biased else "fp32 and biased"]

    def tiny(self) -> Case:
        """Return a case of the same kernel whose sizes Triton's interpreter computes in a second or less.

        70 and 260 keys are multiples of no block; a step of 260 has two splits.
        """
        if self.kind == "windows":
            return replace(self, B=1)
        return replace(self, B=1, T=260) if self.kind == "step" else replace(self, B=1, S=70, T=70)


def cases(only: Sequence[str] = ()) -> list[Case]:
    """Return all cases, the most wanted first, or those whose names contain one of ``only``."""
    return [case for case in all_cases() if not only or any(part in case.name for part in only)]


def all_cases() -> Iterator[Case]:
    yield from prompts("fp16", LENGTHS)
    yield from steps("fp16", 128)
    yield from prompts("bf16", LENGTHS)
    yield from steps("fp16", 128, int8=True)
    yield from added("fp16")
    yield from prompts("fp32", WIDE_LENGTHS)
    yield from prompts("tf32", WIDE_LENGTHS)
    yield from added("fp32")
    yield from steps("fp16", 64)
    yield from steps("bf16", 128)


def prompts(precision: str, lengths: Sequence[int]) -> Iterator[Case]:
    for S in lengths:
        for size in SIZES:
            for causal in (False, True):
                yield Case("prompt", precision, TOKENS // S, S, S, WIDTH // size, size, causal=causal)


def steps(precision: str, size: int, *, int8: bool = False) -> Iterator[Case]:
    """Yield decode steps of one query over caches of 1k to 32k keys."""
    for T in CACHES:
        for groups in STEP_GROUPS:
            for B in STEP_ROWS:
                yield Case("step", precision, B, 1, T, STEP_HEADS, size, groups, int8=int8)


def added(precision: str) -> Iterator[Case]:
    """Yield attentions with padding, with a bias per head, and of Swin's windows."""
    for S, batches in PADDED:
        for B in batches:
            yield Case("masked", precision, B, S, S, 12, 64, model="BERT-base")
    for S in BIASED:
        yield Case("biased", precision, TOKENS // S, S, S, WIDTH // 64, 64)
    for model, heads, pixels, batches in WINDOWS:
        for B in batches:
            yield Case("windows", precision, B, pixels, pixels, heads, WINDOW_SIZE, model=model)


def tuned_cases(measured: Sequence[Case]) -> list[Case]:
    """Return the cases whose tile sizes are tried: prompts in FP16 of one length."""
    return [case for case in measured if (case.kind, case.precision, case.T) == ("prompt", "fp16", TUNED_LENGTH)]


def candidates(entry: TileSizes) -> list[TileSizes]:
    """Return the tile sizes to try for prompts: the table's entry, its numbers halved and doubled, common choices."""
    m, n, warps, stages = entry.m, entry.n, entry.warps, entry.stages
    near = [TileSizes(m, n // 2, warps, stages), TileSizes(m, 2 * n, warps, stages), TileSizes(2 * m, n, 8, stages)]
    near += [TileSizes(m, n, warps, stages + 1), TileSizes(128, 64, 8, 3), TileSizes(128, 128, 8, 2)]
    near += [TileSizes(64, 64, 4, 3), TileSizes(64, 128, 4, 2)]
    found = dict.fromkeys([entry, *near])
    return [each for each in found if 16 <= each.m <= 128 and 16 <= each.n <= 128 and 1 <= each.stages <= 4]


def kernels_of(measured: Sequence[Case], sm: int) -> dict[tuple[Variant, Layout, TileSizes | None], None]:
    """Return every kernel that the cases need on a compute capability, each once; None is the combine kernel."""
    found: dict[tuple[Variant, Layout, TileSizes | None], None] = {}
    for case in measured:
        found[case.variant, case.layout, case.tiles(sm)] = None
        if case.kind == "step":
            found[case.variant, case.layout, None] = None
    for case in tuned_cases(measured):
        found |= {(case.variant, case.layout, tiles): None for tiles in candidates(case.tiles(sm))}
    return found


def key_of(case: Case) -> str:
    """Return the place in the table of tile sizes."""
    return f"{case.precision} {padded_size(case.size)} {COLUMNS[case.column]}"
