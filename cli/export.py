"""``transom export``: export a checkpoint into a bundle that was compared with PyTorch."""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transom.cli.describe import (
    GPU_FORMATS,
    GPU_NOTE,
    kernel_fields,
    manifest_json,
    near_ties,
    parity_text,
    quantization_fields,
    score_line,
)
from transom.cli.extras import export_extra
from transom.cli.help import REFERENCES
from transom.cli.options import Json, sizes
from transom.cli.output import print_json, printable
from transom.cli.progress import progress
from transom.runtime.format import bytes_text, folder_bytes

if TYPE_CHECKING:
    from transom.runtime.manifest import Manifest


class Precision(StrEnum):
    """Values of ``--precision``."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class For(StrEnum):
    """Values of ``--for``."""

    both = "both"
    cpu = "cpu"
    tensorrt = "tensorrt"


class Method(StrEnum):
    """Values of ``--method``: how an activation's range is chosen from its values in calibration."""

    minmax = "minmax"
    percentile = "percentile"
    entropy = "entropy"
    mse = "mse"


class Activations(StrEnum):
    """Values of ``--activations``."""

    static = "static"
    dynamic = "dynamic"
    none = "none"


class Also(StrEnum):
    """Values of ``--also``."""

    attention = "attention"
    residual = "residual"


INTEGERS = "Integers (--precision int8, int4)"
EXAMPLE_IDS = "'1 2 3'"  # for a bundle that generates without a tokenizer


CalibrationData = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|NAME",
        help="Inputs like those in production: a .txt, .jsonl or .npz, a folder of images, or one of austen, "
        "digits, digit-captions, digit-compositions, digit-questions, wordnet, dates, date-lists; repeatable. A "
        "quarter is held out for the gate.",
        show_default="a reference model's own training inputs",
        rich_help_panel=INTEGERS,
    ),
]
MethodOption = Annotated[
    Method,
    typer.Option(help="How an activation's range is chosen from its values in calibration.", rich_help_panel=INTEGERS),
]
SmoothQuant = Annotated[
    bool,
    typer.Option(
        "--smooth-quant/--no-smooth-quant",
        help="Move outliers of single channels into the weights, where that helps.",
        rich_help_panel=INTEGERS,
    ),
]


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help=f"A Hugging Face checkpoint folder, a hub id, or the name of a reference model ({REFERENCES}).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new bundle.", show_default=False)],
    precision: Annotated[
        Precision,
        typer.Option(
            help="fp16 and bf16 are GPU formats; a CPU computes fp16 in FP32, from weights of half the size, and bf16 "
            "slowly. int8 is calibrated, and an accuracy gate judges it; int4 is for weights alone, for decoding."
        ),
    ] = Precision.fp32,
    made_for: Annotated[
        For,
        typer.Option(
            "--for",
            help="cpu: no graph for TensorRT is made, measured or shipped, and `transom build` refuses the bundle. "
            "tensorrt: a CPU computes TensorRT's graph in float32, for selftest and verify.",
        ),
    ] = For.both,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The hub's name of a task.", show_default="the checkpoint's own head"),
    ] = None,
    max: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=SIZE", help="Bound of an axis, such as S=512; repeatable.", show_default=False),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="PIXELS",
            help="384, or HEIGHTxWIDTH such as 384x512: positions are interpolated.",
            show_default="the checkpoint's",
        ),
    ] = None,
    ignore_unused: Annotated[
        bool, typer.Option("--ignore-unused", help="Accept weights of the checkpoint that the model does not use.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle that is at --out.")] = False,
    calibration_data: CalibrationData = None,
    method: MethodOption = Method.mse,
    smooth_quant: SmoothQuant = True,
    activations: Annotated[
        Activations | None,
        typer.Option(
            help="static: fixed ranges from calibration. dynamic: a range per row, at run time. none: weights alone.",
            show_default="static for encoders, dynamic for decoders",
            rich_help_panel=INTEGERS,
        ),
    ] = None,
    weight_bits: Annotated[
        int | None,
        typer.Option(
            metavar="8|7",
            help="7 is faster on x86 without VNNI, where exact sums of 8 bits cost time, and less accurate.",
            show_default="8",
            rich_help_panel=INTEGERS,
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            metavar="32|64|128|256",
            help="How many weights share a scale where weights alone are integers.",
            show_default="32",
            rich_help_panel=INTEGERS,
        ),
    ] = None,
    also: Annotated[
        list[Also] | None,
        typer.Option(
            help="Also quantise the operands of attention, or residual sums; costs accuracy; repeatable.",
            show_default=False,
            rich_help_panel=INTEGERS,
        ),
    ] = None,
    ranges: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A table that `transom calibrate` made, in place of calibrating.",
            show_default=False,
            rich_help_panel=INTEGERS,
        ),
    ] = None,
    gate: Annotated[
        bool,
        typer.Option(
            "--gate/--no-gate",
            help="Keep layers in higher precision until the accuracy gate holds, fail if it cannot. --no-gate measures "
            "once and writes the bundle whatever the result; parity with PyTorch still has to hold.",
            rich_help_panel=INTEGERS,
        ),
    ] = True,
    rank: Annotated[
        bool,
        typer.Option(
            "--rank",
            help="Record what quantising each layer costs, also where the gate holds without; the report draws it.",
            rich_help_panel=INTEGERS,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on where an export of the same model, data and options was interrupted. The bundle is the same.",
            rich_help_panel=INTEGERS,
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Export a checkpoint into a bundle, and compare it with PyTorch.

    The bundle appears at --out only when every output agrees with PyTorch over a grid of shapes; else
    the exit status is 1 and nothing is written.
    """
    bounds = {name: size for text in max or () for name, size in sizes(text, "--max").items()}
    pixels = image_size(image)
    # torch's exporter prints too: stdout is for the result alone
    with progress(quiet=as_json) as report, redirect_stdout(sys.stderr), export_extra():
        from transom.export import pipeline
        from transom.export.quantization.options import QuantizeOptions

        manifest = pipeline.export(
            source,
            out,
            precision=precision.value,
            task=task,
            max_sizes=bounds,
            image_size=pixels,
            ignore_unused=ignore_unused,
            force=force,
            quantize=QuantizeOptions(
                calibration_data=tuple(calibration_data or ()),
                method=method.value,
                smooth=smooth_quant,
                activations=activations and activations.value,
                weight_bits=weight_bits,
                block_size=block_size,
                optional_sites=tuple(extra.value for extra in also or ()),
                ranges=ranges,
                gate=gate,
                rank=rank,
                resume=resume,
            ),
            made_for=made_for.value,
            progress=report,
        )
    if as_json:
        print_json(manifest_json(out, manifest))
    else:
        print_summary(out, manifest)


def image_size(text: str | None) -> tuple[int, int] | None:
    """Parse ``384`` or ``384x512`` into (height, width) in pixels; BadParameter for anything else."""
    if text is None:
        return None
    words = text.lower().split("x")
    if len(words) > 2 or not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"--image-size is {text!r}; expected PIXELS or HEIGHTxWIDTH: 384 or 384x512.")
    return int(words[0]), int(words[-1])


def print_summary(out: Path, manifest: Manifest) -> None:
    """Print what was exported, how well it agrees with PyTorch, and commands to try."""
    size = bytes_text(folder_bytes(out))
    print(printable(f"{out}: {manifest.family}, {manifest.task}, {manifest.precision}, {size}"))
    if manifest.precision in GPU_FORMATS:
        print(f"{manifest.precision} is a {GPU_NOTE}")
    print(f"worst error against PyTorch: {parity_text(manifest.parity, manifest.quantization is not None)}")
    if manifest.quantization is not None:
        for name, words in quantization_fields(manifest.quantization, manifest.operators):
            print(printable(f"{name}: {words}"))
    for name, words in kernel_fields(manifest):
        print(printable(f"{name}: {words}"))
    for tie in near_ties(manifest.parity):
        print(tie)
    if manifest.score:
        print(printable(score_line(manifest.score)))
    print("try:")
    for command in next_commands(out, manifest):
        print(f"  {printable(command)}")


def next_commands(path: Path, manifest: Manifest) -> list[str]:
    """Return the commands to try on a bundle, ready to be pasted into a shell."""
    from transom.runtime.families import FAMILIES
    from transom.runtime.tasks import family_tasks

    bundle = shlex.quote(str(path))
    task = family_tasks(manifest.family).tasks.get(manifest.task) if manifest.family in FAMILIES else None
    inputs = task and task.example
    reads = {tensor.name for file in manifest.graphs for tensor in file.graph.inputs}
    if ("input_ids" in reads and manifest.tokenizer is None) or ("pixel_values" in reads and not manifest.preprocess):
        inputs = None if manifest.generation is None else EXAMPLE_IDS
    return [f"transom run {bundle} {inputs or 'inputs.npz'}", f"transom selftest {bundle}", f"transom bench {bundle}"]
