"""Read leases: a file that nobody can change while it is read."""

from __future__ import annotations

import io
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from leases import leases
from transom.runtime import leased_file
from transom.runtime.errors import BundleError
from transom.runtime.leased_file import LeasedFile, file_system, take_lease

fcntl = pytest.importorskip("fcntl")
pytestmark = leases
DATA = b"0123456789"
WRITES = "import sys; file = open(sys.argv[1], 'r+b'); file.write(b'x'); print('written')"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "w"
    path.write_bytes(DATA)
    return path


@contextmanager
def leased(path: Path, compare: Callable[[], None] = lambda: None) -> Iterator[LeasedFile]:
    source = io.FileIO(path)
    assert take_lease(source.fileno())
    file = LeasedFile(source, compare)
    try:
        yield file
    finally:
        file.close()


def refused(path: Path) -> bool:
    with io.FileIO(path) as source:
        return not take_lease(source.fileno())


def test_who_writes_waits_and_the_process_that_reads_goes_on(path: Path) -> None:
    with leased(path) as file:
        assert file.held()
        writer = subprocess.Popen([sys.executable, "-c", WRITES, str(path)], stdout=subprocess.PIPE)
        while file.held():
            assert writer.poll() is None
        file.read_into(buffer := memoryview(bytearray(4)), 2)
        assert (bytes(buffer), path.read_bytes(), writer.poll()) == (b"2345", DATA, None)
    assert writer.communicate() == (b"written\n", None)
    assert path.read_bytes() == b"x" + DATA[1:]


def test_no_signal_is_sent(path: Path) -> None:
    with leased(path) as file:
        assert fcntl.fcntl(file.descriptor, fcntl.F_GETOWN) == 0
        assert fcntl.fcntl(file.descriptor, fcntl.F_GETSIG) == signal.SIGURG


def test_no_lease_while_the_file_is_open_for_writing(path: Path) -> None:
    assert not refused(path)
    with path.open("r+b") as file:
        assert refused(path)
        mapped = mmap.mmap(file.fileno(), 0)
    assert refused(path)
    mapped.close()
    assert not refused(path)


def test_a_lease_of_one_reader_is_none_of_another(path: Path) -> None:
    with leased(path) as first:
        with leased(path):
            assert first.held()
        assert first.held()
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        assert not first.held()


def test_a_descriptor_that_a_child_holds_keeps_no_lease(path: Path) -> None:
    with leased(path) as file:
        copied = os.dup(file.descriptor)  # as a fork does
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    os.close(copied)


def test_what_the_comparison_raises_is_raised(path: Path) -> None:
    def compare() -> None:
        raise BundleError("changed")

    with leased(path, compare) as file, pytest.raises(BundleError, match="changed"):
        file.wait()


def test_bytes_beyond_the_end_are_an_error(path: Path) -> None:
    with leased(path) as file, pytest.raises(EOFError):
        file.read_into(memoryview(bytearray(4)), 8)


def test_a_part_is_mapped_from_any_offset(path: Path) -> None:
    data = bytes(range(256)) * 40  # 10240 bytes: more than one page, and not a whole number of them
    path.write_bytes(data)
    with leased(path) as file:
        for offset, size in ((0, 10240), (1, 1), (4095, 2), (4096, 4096), (10239, 1)):
            assert bytes(file.window(offset, size)) == data[offset : offset + size]
        for offset, size in ((0, 10241), (10240, 1), (1 << 20, 1)):
            with pytest.raises(EOFError):
                file.window(offset, size)
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_a_mapping_that_stays_keeps_no_lease(path: Path) -> None:
    with leased(path) as file:
        window = file.window(2, 4)
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    assert bytes(window) == b"2345"


def test_no_lease_on_other_file_systems(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a lease may be granted that does not see other machines."""
    with Path("/proc/self/status").open("rb") as file:
        assert file_system(file.fileno()) == "proc"
    with path.open("rb") as file:
        assert file_system(file.fileno()) in leased_file.FILE_SYSTEMS
    assert file_system(-1) is None
    monkeypatch.setattr(leased_file, "FILE_SYSTEMS", {"nfs4"})
    assert refused(path)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert refused(path)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory")
def test_a_lease_of_a_file_in_memory() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "w")
        path.write_bytes(DATA)
        with leased(path) as file:
            with pytest.raises(BlockingIOError):
                os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            assert not file.held()
