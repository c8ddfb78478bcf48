"""Embed, label, caption or translate a folder of any size: a batch job of Ray Data around any bundle of a task.

    python examples/ray_batch.py bundles/minilm notes/ --out vectors --workers 2
    python examples/ray_batch.py bundles/minilm notes/ --out vectors --format npy
    python examples/ray_batch.py bundles/minilm reviews.jsonl --column body --out vectors
    python examples/ray_batch.py bundles/vit photos/ --out labels --parameter top_k=1
    python examples/ray_batch.py bundles/clip photos/ --out labels --label zero --label one --template "a photo of a {}"
    python examples/ray_batch.py bundles/show_attend_tell photos/ --out captions
    python examples/ray_batch.py bundles/transformer dates.txt --out dates --parameter num_beams=4

The input is a folder or a file: .txt (a row is a line), .jsonl and .parquet (--column names the column, or
--column question=asked that of an input), images. OUT gets a shard for each block of rows, part-000000.parquet: the
row's file and line, what the bundle says, and why there is nothing where it is a row that cannot be used; or with
--format npy part-000000.npy, float32 (rows, D), NaN where there is none, and beside it part-000000.jsonl.

A shard appears whole. The same command again does what is missing, so also after Ctrl-C; a worker that dies is started
again and does its block again. Rows are the same bit for bit whatever did them. Exit status 1 says that rows failed.
Ray is started on the loopback address for as long as the job runs, and sends nothing; --address is that of a cluster,
whose machines need transom installed, and the bundle, the input and OUT under the same paths.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import batch_rows
import batch_shards
import batch_worker
from batch_rows import Piece, blocks_of, check_columns, files_in, listing_hash
from batch_shards import failed_rows, replacing
from batch_worker import Job, Worker
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from transom.runtime import load
from transom.runtime.errors import InputError, TransomError, one_line
from transom.runtime.serving.operation import Operation
from transom.runtime.serving.service import parsed
from transom.runtime.serving.tasks import task_operation

ANSWERS_S = 10  # a cluster that is there
MOST_TASKS = 10_000  # of Ray; where there are more blocks, a task does several
OBJECT_STORE_BYTES = 128 << 20  # little goes through it: workers read and write files themselves


def failures(job: Job, blocks: Iterable[int]) -> int:
    """Return how many rows of the shards have an error."""
    return sum(failed_rows(job.shard(block)) for block in blocks)


@contextmanager
def started_ray(options: argparse.Namespace) -> Iterator[Any]:
    """Start Ray on the loopback address, or go to a cluster; InputError where it has too few CPUs or GPUs."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what is wrong with a worker is raised
    if options.address:
        check_address(options.address)
    else:  # a secret for this run; Ray would keep one in the home folder
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # elsewhere too: this keeps it on the loopback address
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing: pip install 'transom[ray]'.") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it warns of its progress bars; errors are raised
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        here: dict[str, Any] = {
            "num_cpus": options.workers * options.threads,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": folder,  # its logs
        }
        try:
            ray.init(
                options.address or "local",
                logging_level=logging.WARNING,
                log_to_driver=False,
                **({} if options.address else here),
            )
            signal.signal(signal.SIGTERM, stop)  # Ray has put its own in the place of it
            check_resources(ray.cluster_resources(), options)
            yield ray
        finally:
            ray.shutdown()


def check_address(address: str) -> None:
    """Raise InputError where no cluster answers, for which Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWERS_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"no Ray cluster answers at {address}, which should be HOST:PORT: {one_line(error)}") from None


def check_resources(there: Mapping[str, float], options: argparse.Namespace) -> None:
    """Raise InputError where Ray would wait for ever for what it does not have."""
    for kind, each in (("CPU", options.threads), ("GPU", options.gpus_per_worker)):
        needed = options.workers * each
        if there.get(kind, 0) < needed:
            raise InputError(
                f"{options.workers} workers need {needed:g} {kind}s, Ray has {there.get(kind, 0):g}; ask for fewer."
            )


def work(job: Job, blocks: Mapping[int, Sequence[Piece]], options: argparse.Namespace, console: Console) -> None:
    """Have workers of Ray do the blocks; TransomError where one cannot be done."""
    with started_ray(options) as ray:
        for module in (batch_rows, batch_shards, batch_worker):
            ray.cloudpickle.register_pickle_by_value(module)  # workers need not find this folder
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows = [
            {"block": block, "pieces": json.dumps([astuple(piece) for piece in pieces]), "rows": size_of(pieces)}
            for block, pieces in blocks.items()
        ]
        done = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_TASKS)).map_batches(
            Worker,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=min(options.workers, len(rows))),
            batch_size=1,
            batch_format="numpy",
            num_cpus=options.threads,
            num_gpus=options.gpus_per_worker,
        )
        total = sum(map(size_of, blocks.values()))
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
            bar = progress.add_task("rows", total=total)
            try:
                for row in done.iter_rows():
                    if row["problem"]:
                        raise TransomError(f"a worker failed: {row['problem']}")
                    progress.advance(bar, int(row["rows"]))
            except ray.exceptions.RayError as error:
                raise TransomError(reason(error)) from None


def size_of(pieces: Iterable[Piece]) -> int:
    return sum(piece.count for piece in pieces)


def reason(error: BaseException) -> str:
    """Return why a worker failed: the last line of what Ray says, which is of the innermost error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"a worker failed: {lines[-1].strip() if lines else type(error).__name__}"


def columns_of(operation: Operation, words: Sequence[str], constants: Iterable[str]) -> dict[str, str]:
    """Return the column of each input: as --column says, else those of the inputs' own names."""
    if words:
        pairs = [tuple(word.split("=", 1)) if "=" in word else (operation.inputs[0].name, word) for word in words]
        return dict(pairs)
    needed = [port.name for port in operation.inputs if not port.optional and port.name not in constants]
    return {name: name for name in needed or [port.name for port in operation.inputs]}


def checked(options: argparse.Namespace, operation: Operation) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs that all rows share, and the parameters; InputError where the bundle takes no such."""
    constants = {"candidate_label": options.labels, "template": options.templates}
    constants = {name: values for name, values in constants.items() if values}
    known = {port.name: port for port in operation.inputs}
    for name in constants:
        if name not in known:
            raise InputError("--label and --template are for CLIP bundles; this one takes " + ", ".join(known) + ".")
    labelled = "candidate_label" in constants or any(word.startswith("candidate_label=") for word in options.columns)
    if "candidate_label" in known and not labelled:
        raise InputError("this bundle ranks labels that you name: give --label for each.")
    pairs = [word.partition("=")[::2] for word in options.parameters]
    parameters = parsed(operation.parameters, dict(pairs))
    operation.alone(parameters)  # raises for those that contradict each other
    if options.format == "npy" and [port.name for port in operation.outputs] != ["embedding"]:
        raise InputError(
            f"--format npy holds vectors; this bundle answers with {', '.join(p.name for p in operation.outputs)}. "
            "Use --format parquet."
        )
    return constants, parameters


def plan(options: argparse.Namespace) -> tuple[Job, dict[str, Any], dict[int, list[Piece]]]:
    """Check everything; return the job, what shards of it depend on, and its blocks by number."""
    with load(options.bundle, threads=1) as bundle:  # where a GPU is asked for, it may be on another machine
        operation = task_operation(bundle)
    constants, parameters = checked(options, operation)
    ports = [port for port in operation.inputs if port.name not in constants]
    folder, names = files_in(options.input, ports)
    if options.input.is_dir() and options.out.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"--out {options.out} is in the input {options.input}, and would be read as input; give another."
        )
    columns = columns_of(operation, options.columns, constants)
    check_columns(folder, names, ports, columns)
    device = options.device or ("cuda" if options.gpus_per_worker else "cpu")
    places = (str(path.resolve()) for path in (options.bundle, folder, options.out))
    bundle_path, folder_path, out = places
    job = Job(
        bundle_path, device, options.threads, folder_path, columns, constants, parameters, options.batch, out,
        options.format == "npy",
    )  # fmt: skip
    depends = {
        "bundle": hashlib.sha256((options.bundle / "bundle.json").read_bytes()).hexdigest(),
        "input": listing_hash(folder, names),
        "block": options.block,
        "format": options.format,
        "device": device,
        "columns": columns,
        "constants": constants,
        "parameters": parameters,
    }
    return job, depends, dict(enumerate(blocks_of(folder, names, options.block)))


@contextmanager
def held(out: Path, depends: Mapping[str, Any]) -> Iterator[None]:
    """Keep other runs out of OUT while the block runs; InputError where there is one, or shards of another job."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing to {out}; wait for it, or give another --out.") from None
        path = out / "job.json"
        if path.exists() and any(out.glob("part-*")):
            before = json.loads(path.read_bytes())
            changed = [name for name, value in depends.items() if before.get(name) != value]
            if changed:
                raise InputError(
                    f"{out} has shards of another job: {', '.join(changed)} differ. Give another --out, or delete it."
                )
        else:
            with replacing(path) as file:
                file.write(json.dumps(depends, indent=1).encode())
        clear(out)  # of a run that was killed
        try:
            yield
        finally:
            clear(out)


def clear(out: Path) -> None:
    """Delete what workers that died left: files half-written, and counts of their tries."""
    for pattern in (".part-*.partial", ".part-*.tries"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def run(options: argparse.Namespace) -> int:
    """Do the job, or what is left of it; return the number of rows that failed."""
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    job, depends, blocks = plan(options)
    with held(options.out, depends):
        missing = {block: pieces for block, pieces in blocks.items() if not job.shard(block).exists()}
        if len(missing) < len(blocks):
            console.print(f"{len(blocks) - len(missing)} of {len(blocks)} shards are there already")
        if missing:
            work(job, missing, options, console)
        failed = failures(job, blocks)
    rows = sum(map(size_of, blocks.values()))
    console.print(f"{rows} rows in {len(blocks)} shards, {failed} of them failed: {options.out}")
    return failed


def stop(number: int, frame: Any) -> None:
    sys.exit(128 + number)  # as Ctrl-C: through every finally


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive integer")
    return int(word)


def share(word: str) -> float:
    try:
        found = float(word)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 64:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of GPUs, such as 0, 0.5 or 1")
    return found


def pair(word: str) -> str:
    if "=" not in word:
        raise argparse.ArgumentTypeError(f"{word!r} is not NAME=VALUE")
    return word


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("input", type=Path, help="a folder or a file: .txt, .jsonl, .parquet, images")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--format", choices=("parquet", "npy"), default="parquet")
    parser.add_argument("--column", dest="columns", action="append", default=[], metavar="[INPUT=]COLUMN")
    parser.add_argument("--parameter", dest="parameters", action="append", default=[], type=pair, metavar="NAME=VALUE")
    parser.add_argument("--label", dest="labels", action="append", default=[], metavar="TEXT")
    parser.add_argument("--template", dest="templates", action="append", default=[], metavar="TEXT")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of each worker")
    parser.add_argument("--gpus-per-worker", type=share, default=0.0, metavar="N", help="0.5: two workers share one")
    parser.add_argument("--device", choices=("cpu", "cuda", "tensorrt", "auto"), help="cuda where workers have GPUs")
    parser.add_argument("--block", type=positive, default=1000, metavar="N", help="rows of a shard")
    parser.add_argument("--batch", type=positive, default=256, metavar="N", help="rows a call")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster; without it Ray is started here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    try:
        return 1 if run(options) else 0
    except TransomError as error:
        print(f"ray_batch: {error}", file=sys.stderr)
    except OSError as error:
        print(f"ray_batch: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("ray_batch: interrupted; what is done is kept, the same command does the rest", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
