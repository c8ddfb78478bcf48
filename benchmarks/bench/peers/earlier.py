"""An earlier installation of this project, run by its own Python (``--earlier``); its bundles are its own exports."""

from __future__ import annotations

from bench.paths import Paths
from bench.peers import transom
from bench.peers.transom import versions
from bench.session import Arrays, Calls
from bench.workloads import Workload

__all__ = ["open_session", "prepare", "versions"]
PEER = "earlier"


def prepare(variant: str, model: str, paths: Paths) -> str:
    return transom.prepare(variant, model, paths, PEER)


def open_session(variant: str, workload: Workload, inputs: Arrays, paths: Paths) -> Calls:
    return transom.open_session(variant, workload, inputs, paths, PEER)
