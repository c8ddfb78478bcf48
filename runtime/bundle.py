"""Read the folder of a bundle, trusting nothing in it.

docs/bundle_format.md is the specification. The order of checks: bundle.json is a regular file of sane
size, parses, has a format version we know, has every field well-formed, names only files inside the
folder; then its own hash; then each file's size. The SHA-256 of a file is compared before the file is used: of what
is parsed, before that; of weights, which pass to the library as they are read, before the library has a whole model.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transom.runtime.errors import BundleError
from transom.runtime.json_reader import parse_json
from transom.runtime.leased_file import LeasedFile, is_leased, mapped, take_lease
from transom.runtime.manifest import FORMAT, FORMAT_VERSION, MANIFEST, File, manifest_from_json
from transom.runtime.text.tokenizer import TextTokenizer, export_again
from transom.runtime.text.tokenizer_spec import TokenizerSpec

MAX_MANIFEST_BYTES = 16 << 20  # labels of a 100,000-way classifier are 3 MB
PIECE = 1 << 20  # bytes; smaller ones cost a system call more often, larger ones leave the processor's cache
WINDOW = 16 << 20  # bytes of a leased file that are mapped at once: at 1 MB/s read before the lease can end
THREADS = 4  # that hash files at once: hashlib releases the interpreter's lock
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer opens at once; regular files do not care


class Bundle:
    """A bundle's folder, its manifest checked and every file's size compared.

    With ``verify`` every file's SHA-256 is compared too; without, each is when it is read, and the caller calls
    ``verify`` for the rest. Raises BundleError when anything is missing, changed, or outside the folder.
    """

    def __init__(self, folder: Path | str, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self._verified: set[str] = set()
        with readable(self.folder):
            self.manifest = manifest_from_json(read_manifest(self.folder))
            for name, file in self.manifest.files.items():
                check_size(self.folder, name, file)
        if verify:
            self.verify(self.manifest.files)

    def verify(self, names: Iterable[str]) -> None:
        """Compare the SHA-256 of files that were not compared yet, several at once; BundleError names the first."""
        left = [name for name in self.manifest.files if name in {*names} - self._verified]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="transom-verify") as pool:
            for _ in pool.map(self._verify, left):
                pass

    def _verify(self, name: str) -> None:
        for _ in self.pieces(name):
            pass

    def size(self, name: str) -> int:
        """Return the size in bytes that bundle.json says."""
        return self._listed(name).size

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, hashed as they were read, so that they are the ones that were checked."""
        file = self._listed(name)
        with readable(self.folder), opened(self.folder, name) as source:
            data = source.readall() if os.fstat(source.fileno()).st_size == file.size else b""
        if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
            raise changed(self.folder, name)
        self._verified.add(name)
        return data

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a file in order, each piece valid until the next; BundleError at the end for others."""
        with readable(self.folder), opened(self.folder, name) as source:
            yield from self._pieces(name, source)

    def leased(self, name: str) -> LeasedFile | None:
        """Open a file that nothing can change until it is closed, and hash it meanwhile; None where that cannot be."""
        with readable(self.folder):
            source = opened(self.folder, name)
        if not take_lease(source.fileno()):
            source.close()
            return None
        return LeasedFile(source, lambda: self._compare(name, source))

    def _compare(self, name: str, source: io.FileIO) -> None:
        """Hash a leased file, in few long calls: between them another thread that runs Python may hold the lock."""
        file = self._listed(name)
        digest, done = hashlib.sha256(), 0
        with readable(self.folder):
            same = os.fstat(source.fileno()).st_size == file.size
            while same and done < file.size and is_leased(source.fileno()):
                size = min(WINDOW, file.size - done)
                digest.update(mapped(source.fileno(), done, size))
                done += size
            if same and done == file.size and digest.hexdigest() == file.sha256:
                self._verified.add(name)
                return
            for _ in self._pieces(name, source):  # a lease that did not last, or another file
                pass

    def _pieces(self, name: str, source: io.FileIO) -> Iterator[memoryview]:
        file = self._listed(name)
        digest, left = hashlib.sha256(), file.size
        buffer = memoryview(bytearray(min(PIECE, file.size + 1)))
        while left >= 0 and (count := source.readinto(buffer[: left + 1])):
            left -= count
            digest.update(buffer[:count])
            if left >= 0:
                yield buffer[:count]
        if left or digest.hexdigest() != file.sha256:
            raise changed(self.folder, name)
        self._verified.add(name)

    def _listed(self, name: str) -> File:
        file = self.manifest.files.get(name)
        if file is None:
            raise BundleError(f"{self.folder / MANIFEST} does not list {name!r} under files; export the bundle again.")
        return file

    def reader(self) -> BundleReader:
        """Return what opens graphs: each file is read once, weights that several graphs share too."""
        return BundleReader(self)

    def open_tokenizer(
        self, spec: TokenizerSpec, max_tokens: int, wider: Callable[[int], str] = export_again
    ) -> TextTokenizer:
        """Open the tokenizer that ``spec`` describes, with the limits of ``TextTokenizer``."""
        return TextTokenizer(self.read(spec.file), spec, max_tokens, wider)


class BundleReader:
    """Reads a bundle's files for graphs that are opened one after the other.

    Weights that several graphs share are read once: they stay under their lease, or in memory, until the last has them.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._uses = Counter(file.weights for file in bundle.manifest.graphs)
        self._held: dict[str, bytes] = {}
        self._leased: dict[str, LeasedFile] = {}

    def __call__(self, name: str) -> bytes:
        """Return the bytes of a file."""
        self._uses[name] -= 1
        if name in self._held:
            return self._held[name] if self._uses[name] > 0 else self._held.pop(name)
        data = self._bundle.read(name)
        if self._uses[name] > 0:
            self._held[name] = data
        return data

    def begin(self) -> None:
        """Hash weights from now on, in other threads, while what will use them is made ready."""
        for name in self._uses:
            if name is not None and (leased := self._bundle.leased(name)) is not None:
                self._leased[name] = leased

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return self._bundle.size(name)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a file in order, each piece valid until the next; BundleError at the end for others."""
        if name in self._held or self._uses[name] > 1:
            yield memoryview(self(name))
        else:
            yield from self._bundle.pieces(name)

    @contextmanager
    def leased(self, name: str) -> Iterator[LeasedFile | None]:
        """Give a file that does not change meanwhile, as ``Bundle.leased`` does, and the same one to the next graph."""
        leased = self._leased.pop(name, None)
        if leased is None and name not in self._held:
            leased = self._bundle.leased(name)
        if leased is None:
            yield None
            return
        self._uses[name] -= 1
        try:
            yield leased
        except BaseException:
            leased.close()
            raise
        if self._uses[name] > 0 and leased.held():
            self._leased[name] = leased
        else:
            leased.close()

    def close(self) -> None:
        """Give back the leases that waited for a graph that was not opened."""
        while self._leased:
            self._leased.popitem()[1].close()


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn an OSError into the BundleError for a file that cannot be read."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{error.filename or folder} cannot be read: {error.strerror}. Check it.") from None


def read_manifest(folder: Path) -> Any:
    """Parse the bundle.json of a folder and check its format version, nothing else."""
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder; expected a bundle that `transom export` made.")
    path = regular_file(folder, MANIFEST)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes, at most {MAX_MANIFEST_BYTES} are read; it is no file of Transom."
        )
    return versioned(path.read_bytes(), str(path))


def versioned(data: bytes, path: str) -> dict[str, Any]:
    """Parse the bytes of a bundle.json and check its format version, nothing else."""
    value = parse_json(data, path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BundleError(f'{path} does not say "format": "{FORMAT}"; the folder is no bundle of Transom.')
    version = value.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise BundleError(
            f"{path} has format version {version!r:.60}, this Transom reads version {FORMAT_VERSION}. "
            "Upgrade with `pip install --upgrade transom`, or export the bundle again."
        )
    return value


def regular_file(folder: Path, name: str) -> Path:
    """Return the path of a file that exists, is a regular file, and lies in the folder when links are followed."""
    path = folder / name
    if not path.exists():
        reason = "it is no bundle, or an incomplete one" if name == MANIFEST else "the bundle is incomplete"
        raise BundleError(f"{folder} has no {name}; {reason}. Copy or export it again.")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link that leaves the bundle; a bundle must hold its own files.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise not_regular(path)
    return path


def opened(folder: Path, name: str) -> io.FileIO:
    """Open a regular file of the folder, unbuffered. One that became a pipe since it was found is refused, not read."""
    path = regular_file(folder, name)
    source = io.FileIO(path, opener=lambda path, flags: os.open(path, flags | NONBLOCK))
    if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
        source.close()
        raise not_regular(path)
    return source


def check_size(folder: Path, name: str, file: File) -> None:
    """Compare a file's size with what bundle.json says."""
    path = regular_file(folder, name)
    if path.stat().st_size != file.size:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes, bundle.json says {file.size}; it is truncated or changed. "
            "Copy the bundle again."
        )


def not_regular(path: Path) -> BundleError:
    return BundleError(f"{path} is no regular file; the bundle is damaged, copy it again.")


def changed(folder: Path, name: str) -> BundleError:
    return BundleError(f"{folder / name} does not have the SHA-256 that bundle.json says; copy the bundle again.")
