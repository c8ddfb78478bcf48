"""Where preparation and measurements lie, below one folder (``BENCH_DIR`` of the Makefile, build/bench)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
REPO = BENCHMARKS.parent


@dataclass(frozen=True)
class Paths:
    """Folders below ``root``; a peer's files go below ``peer(name)``."""

    root: Path

    def environment(self, peer: str) -> Path:
        return self.root / "environments" / peer

    def checkpoint(self, model: str) -> Path:
        return self.root / "models" / model / "checkpoint"

    def calibration(self, model: str) -> Path:
        """Return the file of real inputs for quantisers, one array per input."""
        return self.root / "models" / model / "calibration.npz"

    def inputs(self, workload: str) -> Path:
        return self.root / "inputs" / f"{workload}.npz"

    def reference(self, workload: str) -> Path:
        """Return the file of PyTorch's outputs in FP32."""
        return self.root / "reference" / f"{workload}.npz"

    def peer(self, name: str) -> Path:
        return self.root / "peers" / name

    def stamp(self, peer: str, variant: str, model: str) -> Path:
        """Return the record of one preparation: its key, and the reason where it failed."""
        return self.root / "prepared" / f"{peer}-{variant}-{model}.json"

    def bundle(self, peer: str, model: str, precision: str) -> Path:
        return self.peer(peer) / f"{model}-{precision}"

    def log(self, peer: str, variant: str) -> Path:
        return self.root / "logs" / f"{peer}-{variant}.log"

    def partial(self) -> Path:
        """Return the file of what an unfinished run has measured."""
        return self.root / "measured.json"
