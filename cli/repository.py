"""``transom repository``: write bundles as models of Triton Inference Server."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transom.cli.options import Device, Json
from transom.cli.output import print_json, print_table, printable
from transom.cli.progress import progress
from transom.runtime.format import bytes_text

if TYPE_CHECKING:
    from transom.export.triton.config import TensorConfig
    from transom.export.triton.repository import Written

PANEL = "Capacity of each model"


class Kind(StrEnum):
    TASK = "task"
    STREAM = "stream"
    TENSORS = "tensors"
    ONNX = "onnx"


def repository(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE", help="Folders that `transom export` made.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The repository: a new folder, or one that gets more models."),
    ],
    kind: Annotated[
        list[Kind] | None,
        typer.Option(
            help="Of these, the models that a bundle has. Repeatable.",
            show_default="task and stream; tensors where there is no task",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the models are named after.", show_default="the bundle's folder"),
    ] = None,
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace models that exist.")] = False,
    as_json: Json = False,
    instances: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="How often to load a model: calls at a time.",
            show_default="one a core here, at most 4; 1 on a GPU",
            rich_help_panel=PANEL,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="CPU threads per call.",
            show_default="the server's cores, divided by the instances",
            rich_help_panel=PANEL,
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=65536,
            help="Greatest number of rows that share a call, and of one request.",
            show_default="the bundle's bound of B",
            rich_help_panel=PANEL,
        ),
    ] = None,
    queue_delay: Annotated[
        int,
        typer.Option(
            metavar="MICROSECONDS",
            min=0,
            max=60_000_000,
            help="How long a request waits for others to share its call; 0: only while the model is busy.",
            rich_help_panel=PANEL,
        ),
    ] = 0,
    streams: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=1024, help="Answers that an instance streams at a time.", rich_help_panel=PANEL
        ),
    ] = 4,
) -> None:
    """Write bundles as a model repository of Triton Inference Server.

    \b
    A bundle in the folder `minilm` gives these, by --kind:
      task     minilm             its task: text or an encoded image in;
                                  a vector, labels or text out
      stream   minilm_stream      generated text in pieces (decoupled mode);
                                  a client that leaves ends its generation
      tensors  minilm_model       a graph's tensors, for each graph
      onnx     minilm_model_onnx  the ONNX file, for Triton's ONNX Runtime;
                                  only graphs without caches

    The first three are Triton's Python backend around Transom's runtime, with a copy of the bundle: the server needs
    nothing but `pip install transom`, and checks the bundle's hashes when it loads a model. Rows of several requests
    share a call. Each model loads the weights once more, so ask for the kinds that are used. Neither torch nor a GPU
    is needed to write. Engines of full TensorRT are written by `transom build --repository`.
    """
    with progress(quiet=as_json) as report_progress:
        from transom.export.triton.repository import Options, write_repository
        from transom.runtime.progress import ProgressReporter

        written = write_repository(
            out,
            bundles,
            Options(
                kinds=[each.value for each in kind or ()],
                instances=instances,
                threads=threads,
                max_batch=max_batch,
                queue_delay_us=queue_delay,
                device=device,
                streams=streams,
            ),
            name=name,
            force=force,
            tell=ProgressReporter(report_progress, 0).more,
        )
    if as_json:
        print_json({"repository": out, "models": [each.to_json() for each in written]})
        return
    print_table(("model", "kind", "inputs", "outputs", "rows", "size"), map(cells, written), right=("rows", "size"))
    print()
    print(printable(f"tritonserver --model-repository {shlex.quote(str(out))}"))


def cells(written: Written) -> list[str]:
    """Return the row of a model in the table."""
    config = written.model.config
    return [
        written.model.name,
        written.model.kind,
        names(config.inputs),
        names(config.outputs),
        str(config.max_batch_size or "–"),
        bytes_text(written.size),
    ]


def names(tensors: tuple[TensorConfig, ...]) -> str:
    """Return the names of tensors; those of a decoder's many caches are counted."""
    shown = [f"{tensor.name}?" if tensor.optional else tensor.name for tensor in tensors]
    return ", ".join(shown if len(shown) <= 5 else [*shown[:4], f"{len(shown) - 4} more"])
