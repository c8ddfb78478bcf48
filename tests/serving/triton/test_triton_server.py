"""examples/triton_server.py: it listens where it is told to, ends when it is asked to, and leaves nothing behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from paths import KEPT
from serving_engines import example
from time_limits import PATIENCE_S
from transom.export.triton.repository import Options, write_repository
from triton_requests import running


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_repository(tmp_path / "models", [KEPT / "gpt-fp32"], Options(kinds=("stream",), threads=1))
    return tmp_path / "models"


def test_the_server_ends_by_itself_after_streams(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that Triton was not done with would hold it until its time to exit is over, and the status be 1."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    with running(models, log=tmp_path / "log") as triton:
        assert triton.generate_stream("gpt-fp32_stream", {"input_ids": [1, 2, 3], "max_new_tokens": 2})
        triton.process.terminate()
        assert triton.process.wait(PATIENCE_S) == 0
    assert not list((tmp_path / "temporary").glob("transom-triton-*"))


def test_a_repository_that_is_not_there() -> None:
    done = subprocess.run(example("triton_server.py", "nowhere"), capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (1, "triton_server.py: nowhere does not exist\n")
