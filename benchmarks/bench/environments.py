"""Make an environment for each peer that needs one; one that cannot be made is named with pip's reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.paths import Paths
from bench.registry import Peer

STAMP = "bench.json"  # in an environment: what was asked for, and the reason where it failed
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def python_of(peer: Peer, paths: Paths, earlier: Path | None = None) -> Path:
    """Return the Python that runs a peer's workers. ``earlier`` is that of the earlier installation."""
    if peer.name == "earlier":
        if earlier is None:
            raise ValueError("the peer 'earlier' needs --earlier PATH/bin/python")
        return earlier
    return paths.environment(peer.name) / "bin" / "python" if peer.requirements else Path(sys.executable)


def make_environment(peer: Peer, paths: Paths, pip_arguments: Sequence[str] = ()) -> str | None:
    """Make a peer's environment, unless it is there; return the reason where it cannot be made."""
    folder = paths.environment(peer.name)
    stamp = folder / STAMP
    wanted = {"requirements": list(peer.requirements), "python": sys.version}
    if stamp.exists() and json.loads(stamp.read_text()) == wanted and python_of(peer, paths).exists():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        return reason_of(made.stdout + made.stderr)
    command = [str(python_of(peer, paths)), *PIP, *pip_arguments, *peer.requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        return reason_of(done.stderr + done.stdout)
    stamp.write_text(json.dumps(wanted))
    return None


def reason_of(output: str) -> str:
    """Return pip's first line that says ERROR, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines[-1:] or ["no message"])[0][:300]
