"""Send ``kill -9`` at many moments of ``transom export vit --out DIR --force``: is the rest complete, and cleaned up?

    python benchmarks/kill_export.py [--kills 200] [--source vit] [--seed 0]

In half of the runs an older bundle is at --out, in half there is nothing. Three ways to choose the moment:

- half of them just before one of the file-system operations that the export makes in its folders, each of them in
  turn: making a hidden folder, opening a file for writing, the renames, what is deleted in the end;
- a tenth at a random moment of a command that was started afresh;
- the others at a random moment of a process forked from one that has imported the libraries, so that no time is spent
  on importing them. It runs the command's own code with the same arguments, and dies of the same signal.

After each: at --out is the old bundle to the byte, a whole new one (sizes and hashes compared, golden values there), or
nothing; beside it are hidden ``.transom-*`` folders alone; and what the next export does first (``remove_stale``)
removes these, and puts a bundle back that was moved aside. New bundles of distinct content are run through
``transom selftest`` at the end. Anything else is told, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transom.export.staging import NAME, remove_stale
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError
from transom.runtime.host import processor
from transom.runtime.manifest import MANIFEST, manifest_sha256

COUNTED = ("tempfile.mkdtemp", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir")
COMMAND = (sys.executable, "-m", "transom.cli.main")


@dataclass(frozen=True)
class Moment:
    """A moment to kill at: after some seconds or before the n-th file operation; ``fresh`` is a new interpreter."""

    seconds: float | None = None
    operation: int | None = None
    fresh: bool = False


class Watch:
    """Audit hook that writes each operation below ``folder`` to a pipe, and kills its process before the n-th."""

    def __init__(self, folder: Path, last: int | None, pipe: int) -> None:
        self.folder, self.last, self.pipe, self.seen = str(folder), last, pipe, 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in COUNTED) or not any(self.folder in str(argument) for argument in arguments):
            return
        if self.seen == self.last:
            os.write(self.pipe, f"@before {event}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1
        os.write(self.pipe, f"#{event}\n".encode())


def forked(arguments: list[str], folder: Path, moment: Moment) -> tuple[int, list[str]]:
    """Return (wait status, lines of stderr and of the hook) of the command in a fork, killed at the moment."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.close(read)
            os.dup2(write, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.addaudithook(Watch(folder, moment.operation, write))
            sys.argv = ["transom", *arguments]
            from transom.cli.main import main

            main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    if moment.seconds is not None:
        time.sleep(moment.seconds)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read, errors="replace") as lines:
        said = lines.read().splitlines()
    return os.waitpid(child, 0)[1], said


def fresh(arguments: list[str], moment: Moment) -> tuple[int, list[str]]:
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        time.sleep(moment.seconds or 0)
        run.kill()
        said = run.communicate()[1].splitlines()
    return (signal.SIGKILL if run.returncode == -signal.SIGKILL else run.returncode), said


def contents(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def older(bundle: Path, folder: Path) -> Path:
    """Return a complete bundle that differs from the export's: its manifest has another name and new hashes."""
    made = Path(shutil.copytree(bundle, folder))
    words = json.loads((made / MANIFEST).read_text())
    words["name"] = "older"
    words["manifest_sha256"] = manifest_sha256(words)
    (made / MANIFEST).write_text(json.dumps(words))
    return made


def state(out: Path, old: dict[str, str], seen: dict[str, Path], keep: Path) -> str:
    """Return what is at --out: "old", "new", "none", or its problem. A new one of unseen content is kept."""
    if not os.path.lexists(out):
        return "none"
    found = contents(out)
    if found == old:
        return "old"
    try:
        manifest = Bundle(out).manifest
    except BundleError as error:
        return f"HALF-WRITTEN: {error}"
    if manifest.name == "older" or "golden.safetensors" not in found or found.keys() - manifest.files - {MANIFEST}:
        return f"MIXED: {sorted(found)}"
    key = found[MANIFEST]
    if key not in seen:
        seen[key] = Path(shutil.copytree(out, keep / str(len(seen))))
    return "new"


def moments(kills: int, operations: int, seconds: float, seconds_fresh: float, rng: random.Random) -> list[Moment]:
    """Yield kills before operations, at random moments of fresh commands, and at random moments of forks."""
    chosen = [Moment(operation=index % operations) for index in range(kills // 2)]
    chosen += [Moment(seconds=rng.uniform(0, seconds_fresh), fresh=True) for _ in range(kills // 10)]
    chosen += [Moment(seconds=rng.uniform(0, seconds)) for _ in range(kills - len(chosen))]
    return chosen


def phase(said: list[str]) -> str:
    """Return the stage that was running: the last line of progress, or the next operation."""
    stages = [line.removesuffix(" ...") for line in said if line.endswith(" ...")]
    return "parity" if stages and stages[-1].startswith("parity") else stages[-1] if stages else "starting"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--source", default="vit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"on {processor()}", flush=True)
    import transom.cli.main
    import transom.export.pipeline  # noqa: F401  what forks need not import again

    base = Path(tempfile.mkdtemp(prefix="kill-export-"))
    failures, phases, before, seen = [], Counter[str](), Counter[str](), dict[str, Path]()
    try:
        aside, parent, keep = base / "aside", base / "bundles", base / "new"
        for folder in (aside, parent, keep):
            folder.mkdir()
        out = parent / options.source
        arguments = ["export", options.source, "--out", str(out), "--force"]
        plans = []
        forked(arguments, parent, Moment())  # reads files for the first time
        shutil.rmtree(out, ignore_errors=True)
        for present in (False, True):
            begun = time.monotonic()
            status, said = forked(arguments, parent, Moment())
            seconds = time.monotonic() - begun
            if status != 0:
                print("\n".join(said), file=sys.stderr)
                return 1
            operations = sum(line.startswith("#") for line in said)
            print(f"{'an older bundle' if present else 'nothing'} at --out: {seconds:.1f} s, {operations} operations")
            if not present:
                older(out, aside / "old")
                begun = time.monotonic()
                subprocess.run([*COMMAND, *arguments], capture_output=True, check=True)
                seconds_fresh = time.monotonic() - begun
            rng = random.Random(options.seed + present)
            count = (options.kills + (not present)) // 2
            plans += [(present, moment) for moment in moments(count, operations, seconds, seconds_fresh, rng)]
        old = contents(aside / "old")
        for index, (present, moment) in enumerate(plans):
            shutil.rmtree(out, ignore_errors=True)
            if present:
                shutil.copytree(aside / "old", out)
            status, said = fresh(arguments, moment) if moment.fresh else forked(arguments, parent, moment)
            expected = {"old", "new", "none"} if present else {"new", "none"}
            found = state(out, old, seen, keep)
            strangers = [name for name in os.listdir(parent) if name != out.name and not NAME.fullmatch(name)]
            hidden = [name for name in os.listdir(parent) if NAME.fullmatch(name)]
            remove_stale(parent)
            cleared = state(out, old, seen, keep)
            wrong = found not in expected or strangers or set(os.listdir(parent)) - {out.name}
            lost = (present and cleared == "none") or (cleared != found and (found, cleared) != ("none", "old"))
            killed = status == signal.SIGKILL
            if wrong or lost or (not killed and status != 0):
                failures.append(f"kill {index}, {moment}: {found}, then {cleared}; beside it {strangers}; {said[-3:]}")
                print(failures[-1], flush=True)
            put_back = found == "none" and cleared == "old"
            outcome = f"{'old there' if present else 'none there'}: {'none, put back' if put_back else found}"
            phases[f"{phase(said) if killed else 'finished before'} | {outcome}"] += 1
            before.update(line.removeprefix("@") for line in said if line.startswith("@"))
            print(f"{index + 1:4d} {phase(said):32.32s} {outcome}, {len(hidden)} hidden cleared", flush=True)
        for number, bundle in enumerate(seen.values()):
            done = subprocess.run([*COMMAND, "selftest", str(bundle)], capture_output=True, text=True, check=False)
            if done.returncode:
                failures.append(f"selftest of new bundle {number}: {done.stderr.strip()}")
        print(
            f"\n{len(plans)} kills, {len(seen)} distinct new bundles, each through selftest; {len(failures)} failures"
        )
        for what, count in sorted(phases.items()):
            print(f"{count:5d}  killed in: {what}")
        for what, count in sorted(before.items()):
            print(f"{count:5d}  killed {what}")
        print("\n".join(failures), end="")
    finally:
        with suppress(OSError):
            shutil.rmtree(base)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
