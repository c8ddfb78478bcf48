"""Let the threads of ONNX Runtime's sessions sleep between operators, where CPU time counts and latency does not.

By default they spin, ready for the next operator: that is the shortest latency, and several times the CPU time on a
machine that others use as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SPIN = ContextVar("spin", default=True)


@contextmanager
def threads_sleep() -> Iterator[None]:
    """Have the threads of every CPU session that is opened inside sleep, not spin."""
    token = _SPIN.set(False)
    try:
        yield
    finally:
        _SPIN.reset(token)


def thread_entries() -> dict[str, str]:
    """Return the session configuration of threads, as ONNX Runtime names its keys; empty for its default."""
    return {} if _SPIN.get() else {"session.intra_op.allow_spinning": "0"}
