"""Label every image of a folder: a batch job around a ViT or a CLIP bundle.

    transom export vit --out bundles/vit
    python examples/label_folder.py bundles/vit photos/ --out labels.csv
    transom export clip --out bundles/clip
    python examples/label_folder.py bundles/clip photos/ --out labels.jsonl \\
        --label zero --label one --template "a photo of the number {}" --template "a handwritten {}"

A ViT bundle knows its labels; a CLIP bundle takes any, each set into every template. The answer is CSV (image, rank,
label, probability), or JSON lines where --out ends in .jsonl. It appears at --out when it is complete: a run that is
interrupted leaves what was there before. Images that cannot be read are named on stderr and left out, and the exit
status is then 1. Needs the runtime and rich.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from transom.runtime import load
from transom.runtime.errors import InputError, TransomError
from transom.runtime.image_loading import open_image
from transom.runtime.tasks.clip import Clip
from transom.runtime.tasks.postprocess import Ranked
from transom.runtime.tasks.vit import ViT

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Answer = Ranked | InputError  # of one image: its labels, or why there are none
Labeller = Callable[[Sequence[Any]], list[Ranked]]  # images as the runtime takes them


def labeller_of(loaded: Any, labels: list[str], templates: list[str], top_k: int) -> Labeller:
    """What turns a batch of images into ranked labels; InputError where the bundle or the labels do not fit."""
    if isinstance(loaded, Clip):
        embedded = loaded.embed_labels(labels, templates or None)  # once, not once for each batch
        return lambda images: loaded.zero_shot(images, embedded, top_k=top_k)
    if not isinstance(loaded, ViT):
        raise InputError(f"this is a bundle for {loaded.manifest.task}; expected one that labels images.")
    loaded.need_task("image-classification")
    if labels or templates:
        raise InputError("--label and --template are for CLIP bundles; a ViT bundle has its own labels.")
    return lambda images: loaded.classify(images, top_k=top_k)


def label_batch(labeller: Labeller, paths: list[Path]) -> list[Answer]:
    """One answer per image; where an image spoils its batch, its neighbours are labelled one by one."""
    try:
        return [*labeller(paths)]
    except InputError:
        return [label_one(labeller, path) for path in paths]


def label_one(labeller: Labeller, path: Path) -> Answer:
    try:
        return labeller([open_image(path)])[0]
    except InputError as error:
        return error


def labelled(labeller: Labeller, paths: Sequence[Path], batch: int, workers: int) -> Iterator[tuple[Path, Answer]]:
    """All images in order, ``workers`` batches at a time; no more than twice as many wait for the writer."""
    waiting: deque[tuple[list[Path], Future[list[Answer]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for first in range(0, len(paths), batch):
            chosen = list(paths[first : first + batch])
            waiting.append((chosen, pool.submit(label_batch, labeller, chosen)))
            if len(waiting) >= 2 * workers:
                done, answers = waiting.popleft()
                yield from zip(done, answers.result(), strict=True)
        for done, answers in waiting:
            yield from zip(done, answers.result(), strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def replacing(out: Path) -> Iterator[TextIO]:
    """A file beside ``out`` that takes its place at the end, and is gone if the end is not reached."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(file: TextIO) -> Callable[[Path, Ranked], None]:
    writer = csv.writer(file)
    writer.writerow(["image", "rank", "label", "probability"])

    def write(path: Path, ranked: Ranked) -> None:
        writer.writerows([path, rank, label, f"{p:.6f}"] for rank, (label, p) in enumerate(ranked, 1))

    return write


def write_jsonl(file: TextIO) -> Callable[[Path, Ranked], None]:
    def write(path: Path, ranked: Ranked) -> None:
        labels = [{"label": label, "probability": probability} for label, probability in ranked]
        file.write(json.dumps({"image": str(path), "labels": labels}) + "\n")

    return write


def images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise InputError(f"{folder} holds no images; expected {', '.join(ENDINGS)}.")
    return found


def run(options: argparse.Namespace) -> int:
    """Label the folder; the number of images that could not be read."""
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    paths = images_in(options.folder)
    failed = 0
    with load(options.bundle, threads=1) as loaded:  # one thread a call: the workers are what runs side by side
        labeller = labeller_of(loaded, options.labels, options.templates, options.top_k)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with replacing(options.out) as file, Progress(*columns, console=console) as progress:
            write = write_jsonl(file) if options.out.suffix == ".jsonl" else write_csv(file)
            answers = labelled(labeller, paths, options.batch, options.workers)
            for path, answer in progress.track(answers, total=len(paths), description="labelling"):
                if isinstance(answer, InputError):
                    failed += 1
                    console.print(f"left out: {answer}")
                else:
                    write(path.relative_to(options.folder), answer)
    console.print(f"{len(paths) - failed} of {len(paths)} images labelled: {options.out}")
    return failed


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive integer")
    return int(word)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv|FILE.jsonl")
    parser.add_argument("--label", dest="labels", action="append", default=[], metavar="TEXT")
    parser.add_argument("--template", dest="templates", action="append", default=[], metavar="TEXT")
    parser.add_argument("--top-k", type=positive, default=1, metavar="N")
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="images a call")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="calls at a time")
    options = parser.parse_args()
    if options.out.is_dir() or not options.out.parent.is_dir():
        print(f"label_folder: --out {options.out} is no file in a folder that exists.", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: through every finally
    try:
        return 1 if run(options) else 0
    except TransomError as error:
        print(f"label_folder: {error}", file=sys.stderr)
    except OSError as error:
        print(f"label_folder: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("label_folder: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
