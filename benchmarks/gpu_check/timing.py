"""Times on the GPU: sides interleaved round by round, each call between two events, after a write over the L2 cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_check.cases import Case
from gpu_check.sides import Side, Sides
from gpu_check.tables import Roofline

ROUNDS, TURN, WARMUP = 10, 8, 2
TIMED_MS = 200.0  # that a side of one case may take, unless one call a round takes more
TRIED_ROUNDS, TRIED_MS = 3, 30.0  # to choose between splits, and between tile sizes
PRODUCT, COPIED = 8192, 1 << 30  # sizes of what measures the GPU


def measure(sides: Sides, each_of: Sequence[Side], rounds: int = ROUNDS, timed_ms: float = TIMED_MS) -> None:
    """Fill every side's ``times``, in ms."""
    machine = sides.machine
    for side in each_of:
        for _ in range(WARMUP):
            side.run()
    turns = {id(side): TURN for side in each_of}
    for number in range(rounds + 1):  # the first says how long a call takes, and does not count
        for index in np.random.default_rng(number).permutation(len(each_of)).tolist():
            side, marks = each_of[index], []
            for _ in range(turns[id(side)] if number else 1):
                marks.append((machine.mark(), machine.mark()))
                machine.flush()
                marks[-1][0].record()
                side.run()
                marks[-1][1].record()
            machine.wait()
            took = [start.elapsed_time(end) for start, end in marks]
            if number:
                side.times += took
            else:
                turns[id(side)] = max(1, min(TURN, int(timed_ms / rounds / max(took[0], 1e-3))))


def fastest(sides: Sides, tried: Sequence[Side]) -> Side:
    """Return the fastest of sides that compute the same, without its times."""
    if len(tried) > 1:
        measure(sides, tried, TRIED_ROUNDS, TRIED_MS)
    best = min(tried, key=lambda side: float(np.median(side.times or [0.0])))
    best.times = []
    return best


def roofline(sides: Sides) -> Roofline:
    """Measure PyTorch's peaks: the medians of a large product in every precision, and of a large copy."""
    torch, flops = sides.torch, {}
    for precision, dtype in sides.dtypes.items():
        sides.precise(precision)
        one, other = (torch.randn(PRODUCT, PRODUCT, device=sides.device).to(dtype) for _ in range(2))
        result = torch.empty_like(one)
        side = Side(precision, lambda a=one, b=other, c=result: torch.matmul(a, b, out=c), lambda: None)  # type: ignore[misc]
        measure(sides, [side], 3, TIMED_MS)
        flops[precision] = 2 * PRODUCT**3 / float(np.median(side.times)) * 1e3
    source = torch.zeros(COPIED, dtype=torch.uint8, device=sides.device)
    to = torch.empty_like(source)
    side = Side("copy", lambda: to.copy_(source), lambda: None)
    measure(sides, [side], 3, TIMED_MS)
    return Roofline(flops, 2 * COPIED / float(np.median(side.times)) * 1e3)


def try_tiles(sides: Sides, case: Case) -> dict[str, float]:
    """Return the median ms of one prompt by tile sizes, of those that the GPU takes and that compute right."""
    from gpu_check.cases import candidates
    from transom.runtime.errors import TransomError

    tensors = sides.tensors(case)
    expected, tried = sides.expected(case, tensors), []
    for tiles in candidates(case.tiles(sides.sm)):
        try:
            side = sides.ours(case, tensors, tiles, 1)
            side.run()
            if sides.compare(case, side.output(), expected).wrong is None:
                tried.append(side)
        except (TransomError, RuntimeError):  # more shared memory than there is
            continue
    measure(sides, tried, TRIED_ROUNDS, TRIED_MS)
    return {side.about: round(float(np.median(side.times)), 5) for side in tried}
