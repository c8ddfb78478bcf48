"""Sides of a comparison of graphs, each a process of its own that computes only when it is asked.

Sessions of one process disturb each other: the threads of the one that has just run still spin while the next begins.
Here a side is asked, answers, and is left alone until its threads sleep; then it is the next one's turn.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.backends.ort import SLOW_FUSIONS, OrtBackend
from transom.runtime.decoder import Decoder

QUIET_S = 0.05  # after which the threads of a session that has answered sleep

Answer = Callable[..., Any]


class Side:
    """A process of ``kind`` ("decoder" or "encoder"), which is opened with ``settings``."""

    def __init__(self, kind: str, **settings: Any) -> None:
        command = [sys.executable, __file__, kind, json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> Any:
        """Return the answer to a request, once the side's threads sleep. Raises RuntimeError where it has ended."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with status {process.wait()}")
        time.sleep(QUIET_S)
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        self._process.communicate()


def opened(path: Path, threads: int, profile: Path | None = None) -> Any:
    """Open a graph as the runtime does."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    for key, setting in integer_sums().entries.items():
        options.add_session_config_entry(key, setting)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(
        path, options, ["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS["cpu"]
    )


def decoder(path: str, threads: int, cpu_time: bool, limit: int) -> Answer:
    """Open a pickled (GraphFile, files, encoder outputs); answer with seconds of prefill, of steps, and tokens."""
    graph, files, encoder_outputs = pickle.loads(Path(path).read_bytes())  # written by the other end
    backend, clock = OrtBackend(graph, files.__getitem__, "cpu", threads), clock_of(cpu_time)

    def generated(prompt: list[list[int]], new: int) -> tuple[float, list[float], list[int]]:
        state = Decoder(backend, 1, limit, encoder_outputs, most_logits=1)
        started = clock()
        logits = state.prefill(np.array(prompt))
        prefill, steps, tokens = clock() - started, [], []
        for _ in range(new):
            token = logits.argmax(-1)
            tokens.append(int(token[0]))
            started = clock()
            logits = state.decode_step(token)
            steps.append(clock() - started)
        return prefill, steps, tokens

    return generated


def encoder(path: str, feeds: str, threads: int, cpu_time: bool) -> Answer:
    """Open a graph and its inputs; answer with the seconds of a second run, whose outputs are saved where asked."""
    session, clock = opened(Path(path), threads), clock_of(cpu_time)
    inputs = dict(np.load(feeds))

    def run(save: str | None = None) -> float:
        session.run(None, inputs)  # wakes the threads
        started = clock()
        outputs = session.run(None, inputs)
        taken = clock() - started
        if save is not None:
            np.savez(save, *outputs)
        return taken

    return run


def clock_of(cpu_time: bool) -> Callable[[], float]:
    """Return the clock of this thread's processor time, or of wall time."""
    return time.thread_time if cpu_time else time.perf_counter


def main() -> None:
    kind, settings = sys.argv[1:]
    answer = {"decoder": decoder, "encoder": encoder}[kind](**json.loads(settings))
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
