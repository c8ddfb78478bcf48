"""One variant of one peer in a process of its own: reads requests as lines of JSON, answers each with one line.

    python -m bench.worker PEER VARIANT BENCH_DIR

Requests: {"do": "versions"}, {"do": "prepare", "model": ...}, {"do": "open", "workload": ...},
{"do": "outputs", "file": ...} (writes an .npz), {"do": "time", "seconds": ...}, {"do": "close"}. An answer has "ok";
where that is false, "error" is the exception's text. What libraries print goes to the log, not to the answers.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from bench.paths import Paths
from bench.session import Session, block
from bench.workloads import WORKLOADS

PR_SET_PDEATHSIG = 1  # of Linux: a worker goes with the process that started it


class Worker:
    """The state between requests: at most one open session."""

    def __init__(self, peer: Any, variant: str, paths: Paths) -> None:
        self._peer, self._variant, self._paths = peer, variant, paths
        self._session: Session | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request. Raises whatever the peer's library raises."""
        do = request["do"]
        if do == "versions":
            return {"versions": self._peer.versions()}
        if do == "prepare":
            return {"note": self._peer.prepare(self._variant, request["model"], self._paths)}
        if do == "open":
            self._close()
            workload = WORKLOADS[request["workload"]]
            self._session = self._peer.open_session(
                self._variant, workload, arrays(self._paths.inputs(workload.name)), self._paths
            )
            return {}
        if do == "close":
            self._close()
            return {}
        if self._session is None:
            raise RuntimeError(f"{do!r} came before 'open'")
        if do == "outputs":
            import numpy as np

            np.savez(request["file"], **self._session.outputs())
            return {}
        if do == "time":
            return {"seconds": block(self._session, float(request["seconds"]))}
        raise RuntimeError(f"the request is {do!r}; expected versions, prepare, open, outputs, time or close")

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None
        gc.collect()


def arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of an .npz, without pickle."""
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answer every line until the end of the requests."""
    for line in requests:
        try:
            answer = {"ok": True, **worker.answer(json.loads(line))}
        except Exception as error:
            traceback.print_exc()
            words = " ".join(str(error).split()) or "no message"
            answer = {"ok": False, "error": f"{type(error).__name__}: {words}"[:400]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def end_with_parent() -> None:
    """Have the kernel end this process with its parent, which may have stopped it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the orchestrator's to handle
    peer, variant, root = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module = importlib.import_module(f"bench.peers.{peer}")
    serve(Worker(module, variant, Paths(Path(root))), sys.stdin, answers)


if __name__ == "__main__":
    main()
