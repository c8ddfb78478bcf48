"""The orchestrator's end of a worker: starts it, asks, and keeps it stopped while others compute."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.paths import BENCHMARKS, Paths
from bench.workloads import THREADS

QUIET_S = 0.03  # without CPU time: the threads of the last call have stopped spinning
RESTLESS_S = 0.5  # then it is stopped all the same
TICKS = os.sysconf("SC_CLK_TCK")


class WorkerError(Exception):
    """A worker's failure: what its library raised, or that it ended or took too long."""


class WorkerProcess:
    """A running worker of one variant."""

    def __init__(self, peer: str, variant: str, module: str, python: Path, paths: Paths) -> None:
        self.peer, self.variant = peer, variant
        log = paths.log(peer, variant)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [str(python), "-m", "bench.worker", module, variant, str(paths.root)]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=environment(paths, module),
                start_new_session=True,
            )  # fmt: skip

    def ask(self, timeout: float = 600.0, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises WorkerError."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self.wake()
        try:
            process.stdin.write((json.dumps(request) + "\n").encode())
            process.stdin.flush()
        except (BrokenPipeError, ValueError):  # ValueError: closed by ``end``
            raise WorkerError(self._ended()) from None
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        if not ready:
            self.end()
            raise WorkerError(f"no answer to {request['do']!r} within {timeout:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise WorkerError(self._ended())
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise WorkerError(answer["error"])
        return answer

    def rest(self) -> None:
        """Wait until the worker's threads use no CPU time, then stop the process."""
        end = time.monotonic() + RESTLESS_S
        before = self._cpu_ticks()
        while time.monotonic() < end:
            time.sleep(QUIET_S)
            now = self._cpu_ticks()
            if now == before:
                break
            before = now
        self._signal(signal.SIGSTOP)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End the process, also one that is stopped or does not answer."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _cpu_ticks(self) -> int:
        """Return user and system time so far; 0 where /proc does not say."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0
        return int(fields[11]) + int(fields[12])

    def _ended(self) -> str:
        status = self._process.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"the worker ended {how}; its log says why"


def environment(paths: Paths, module: str, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return a worker's environment: THREADS threads, no network, benchmarks/ importable."""
    threads = str(THREADS)
    found = {name: value for name, value in given.items() if name not in ("VIRTUAL_ENV", "PYTHONHOME")}
    inherited = [found["PYTHONPATH"]] if "PYTHONPATH" in found and module in OWN_ENVIRONMENT else []
    return found | {
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *inherited]),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "BENCH_LIBRARIES": sysconfig.get_path("purelib"),
        "TORCHINDUCTOR_CACHE_DIR": str(paths.root / "peers" / "pytorch" / "inductor"),
    }


OWN_ENVIRONMENT = ("transom", "pytorch", "onnxruntime", "handlaid")  # run by this project's own Python
