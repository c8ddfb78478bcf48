"""Answer blocks of rows with a bundle and write their shards: the actor of ``ray_batch.py``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from batch_rows import Piece, Row, RowReader, arrays_for
from batch_shards import Answer, Name, write_ids, write_table, write_vectors

from transom.runtime import load
from transom.runtime.errors import InputError, TransomError, one_line
from transom.runtime.serving.ports import Array
from transom.runtime.serving.service import Request, Service
from transom.runtime.serving.tasks import task_operation

TRIES = 4  # of a block: Ray starts workers that died again, and rows that kill each of them must not do so for ever


@dataclass(frozen=True)
class Job:
    """What each worker is made with."""

    bundle: str
    device: str
    threads: int
    folder: str
    columns: Mapping[str, str]  # the column of each input
    constants: Mapping[str, Any]  # inputs that are the same for all rows
    parameters: Mapping[str, Any]
    batch: int  # rows a call
    out: str
    npy: bool

    def shard(self, block: int) -> Path:
        return Path(self.out) / f"part-{block:06d}.{'npy' if self.npy else 'parquet'}"


class Worker:
    """An actor of Ray Data: a bundle in a process of its own, which answers blocks of rows and writes their shards."""

    def __init__(self, job: Job) -> None:
        os.environ.setdefault("RAYON_NUM_THREADS", str(job.threads))  # the tokenizer's
        self.job = job
        self.problem = ""  # errors are returned: raised ones Ray wraps, prints with its own calls, and may try again
        try:
            self.bundle = load(job.bundle, device=job.device, threads=job.threads)
            self.operation = task_operation(self.bundle)
        except (TransomError, OSError) as error:
            self.problem = one_line(error)
            return
        self.service = Service(self.operation)
        self.reader = RowReader(Path(job.folder), self.operation.inputs, job.columns)

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Do blocks of Ray Data's batch: columns ``block``, a number, and ``pieces``, JSON."""
        for block, pieces in zip(batch["block"], batch["pieces"], strict=True):
            try:
                if not self.problem:
                    self.do(int(block), [Piece(*piece) for piece in json.loads(str(pieces))])
            except (TransomError, OSError) as error:
                self.problem = one_line(error)
        return {"rows": batch["rows"], "problem": np.array([self.problem] * len(batch["rows"]), object)}

    def do(self, block: int, pieces: Sequence[Piece]) -> None:
        """Answer the rows of a block and write its shard, unless it is there: by a worker that died right after."""
        path = self.job.shard(block)
        if path.exists():
            return
        with tries_of(path).open("ab") as file:
            file.write(b".")
            if file.tell() > TRIES:
                raise TransomError(f"{TRIES} workers died at the rows from {pieces[0].file}:{pieces[0].first} on.")
        waiting = self.reader.rows(pieces)
        ids: list[Name] = []
        answers: list[Answer] = []
        while rows := list(islice(waiting, self.job.batch)):
            ids += [(row.file, row.line) for row in rows]
            answers += self.answers(rows)
        if self.job.npy:
            write_ids(path.with_suffix(".jsonl"), ids, answers)
            write_vectors(path, self.operation.outputs[0], answers, self.width)  # last, since it says that all is there
        else:
            write_table(path, self.operation.outputs, ids, answers)
        tries_of(path).unlink(missing_ok=True)

    def answers(self, rows: Sequence[Row]) -> list[Answer]:
        """Return each row's answer, or what is wrong with it."""
        found: dict[int, Answer] = {}
        requests: dict[int, Request] = {}
        for place, row in enumerate(rows):
            try:
                if isinstance(row.values, InputError):
                    raise row.values
                values = {**self.job.constants, **row.values}
                requests[place] = Request(arrays_for(self.operation.inputs, values), self.job.parameters)
            except InputError as error:
                found[place] = error
        answered = self.service.answer(list(requests.values()))
        found |= dict(zip(requests, answered, strict=True))
        return [found[place] for place in range(len(rows))]

    def width(self) -> int:
        """Return the size of a vector, for a block in which no row has one."""
        white = np.full((8, 8, 3), 255, np.uint8)
        ((vector,),) = self.operation.answer([(white if self.operation.inputs[0].name == "image" else "a",)], {})
        return len(vector)


def tries_of(shard: Path) -> Path:
    """Return the file that has a byte for each worker that began this shard."""
    return shard.with_name(f".{shard.name}.tries")
