"""``transom run``: run a bundle on texts, images or arrays, and print the results."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transom.cli.arrays import array_json, array_line, read_arrays, write_arrays
from transom.cli.generation_options import GenerationOptions, option_of, with_generation_options
from transom.cli.options import BundlePath, Device, Json, Kernels, Threads
from transom.cli.output import print_json, printable, say
from transom.cli.streaming import can_stream, print_stream
from transom.runtime.errors import InputError

if TYPE_CHECKING:
    from transom.runtime.tasks.task import RunOptions, Task

STDIN = "-"


@with_generation_options
def run(
    bundle: BundlePath,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="What the bundle's task takes (see above), FILE.npz, or - for the lines of stdin.",
            show_default=False,
        ),
    ],
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Number of answers; in sampling, of tokens to draw from.",
            show_default="the task's",
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="TEXT",
            help="A label an image may have (zero-shot); repeatable.",
            show_default=False,
        ),
    ] = None,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="TEXT",
            help="A sentence with {} for the label, such as 'a photo of a {}'; several are averaged.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="An image that an INPUT asks about: where it has <image>, else in front of it; repeatable.",
            show_default=False,
        ),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Truncate texts that are too long; embeddings always do.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Write output arrays there.", show_default=False)
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    kernels: Kernels = "auto",
    as_json: Json = False,
    *,
    generation: GenerationOptions,
) -> None:
    """Run a bundle on texts, images or arrays. Needs no torch.

    What INPUT means follows the bundle's task (see `transom inspect`):

    \b
      feature-extraction             texts, or image files     -> embeddings
      fill-mask                      texts with the mask token -> tokens
      text-, token-classification    texts                     -> labels
      question-answering             QUESTION CONTEXT          -> answers
      next-sentence-prediction       A B                       -> does B follow A?
      image-classification           image files               -> labels
      zero-shot-image-classification image files, --label ...  -> labels
      text-generation                prompts                   -> new text
      translation                    texts                     -> texts
      image-to-text                  image files               -> captions
      image-text-to-text             image files, or questions
                                     with --image FILE ...     -> new text

    One INPUT that ends in .npz is a raw run: its arrays are the graph's inputs by name. Put a text that
    begins with a dash after `--`. All of stdin is one text for text-generation, and where a task takes two
    texts. A bundle that generates without a tokenizer takes token ids ('1 2 3') and prints ids.
    """
    from transom.runtime import load
    from transom.runtime.tasks import family_tasks

    if out is not None and out.suffix != ".npz":
        raise typer.BadParameter(f"--out is {str(out)!r}; expected the name of a .npz file.")
    with load(bundle, device, threads, kernels) as loaded:
        if len(inputs) == 1 and inputs[0].endswith(".npz"):
            refuse_generation(generation, "a raw run")
            if labels or templates or images:
                raise typer.BadParameter("--label, --template and --image are for image files; a raw run takes arrays.")
            arrays = loaded.run(read_arrays(Path(inputs[0])))
            if out is not None:
                write_arrays(out, arrays)
            show_arrays(bundle, arrays, out, as_json)
            return
        manifest = loaded.manifest
        task = family_tasks(manifest.family).tasks.get(manifest.task)
        if task is None:
            raise typer.BadParameter(
                f"a {manifest.family} bundle for {manifest.task} takes arrays only; give one INPUT that ends in .npz."
            )
        options = checked_options(task, manifest.task, top_k, truncate, out, generation)
        options = with_labels(options, task, manifest.task, labels or [], templates or [])
        options = with_images(options, task, manifest.task, images or [])
        given = expanded(inputs, whole=task.whole)
        if task.pair is not None and len(given) != 2:
            raise typer.BadParameter(f"{manifest.task} takes {task.pair}; received {len(given)} INPUTs.")
        if task.prompt is not None and not as_json and can_stream(loaded, given, options):
            print_stream(loaded, task.prompt(loaded, given[0], options), options, trimmed=task.asks)
            return
        results = task.ask(loaded, given, options)
    if out is not None and task.array is not None:
        write_vectors(out, task.array, results)
    failed = [result["error"] for result in results if "error" in result]
    if as_json:
        print_json({"bundle": bundle, "task": manifest.task, "results": results, **written(out)})
    else:
        for line in task.lines(results):
            print(printable(line))
        if out is not None:
            print(printable(f"written to {out}"))
    for error in failed:  # the other INPUTs have their answers
        say(f"transom.runtime.errors.{error['type']}: {error['message']}")
    if failed:
        raise typer.Exit(1)


def checked_options(
    task: Task, name: str, top_k: int | None, truncate: bool, out: Path | None, generation: GenerationOptions
) -> RunOptions:
    """Return the run options; BadParameter for one that the task called ``name`` does not use."""
    from transom.runtime.tasks.task import RunOptions

    if out is not None and task.array is None:
        raise typer.BadParameter(f"--out holds arrays; the answers of {name} are none. Use --json.")
    if not task.generates:
        refuse_generation(generation, name)
        if top_k is not None and not task.ranks:
            raise typer.BadParameter(f"--top-k is {top_k}; {name} gives no ranking.")
        if top_k == 0:
            raise typer.BadParameter(f"--top-k is 0; {name} gives at least one answer.")
        return RunOptions(top_k, truncate)
    if generation.score and not task.scores:
        raise typer.BadParameter(f"--score is for text-generation; this bundle is for {name}.")
    if truncate and (task.scores or task.asks):
        raise typer.BadParameter(f"--truncate is given; {name} truncates no prompt, since it continues its end.")
    keywords = generation.keywords() | ({} if top_k is None else {"top_k": top_k})
    if generation.score and keywords:
        raise typer.BadParameter(f"{option_of(next(iter(keywords)))} is given, but --score generates nothing.")
    return RunOptions(top_k, truncate, keywords, generation.score)


def with_labels(options: RunOptions, task: Task, name: str, labels: list[str], templates: list[str]) -> RunOptions:
    """Return the options with the labels of a zero-shot task; BadParameter for any other task."""
    if task.labelled and not labels:
        raise typer.BadParameter(f"{name} needs --label, once for each thing that an image may show.")
    if not task.labelled and (labels or templates):
        given = "--label" if labels else "--template"
        raise typer.BadParameter(f"{given} is given; {name} does not choose among labels of yours.")
    return replace(options, labels=labels, templates=templates)


def with_images(options: RunOptions, task: Task, name: str, images: Sequence[Path]) -> RunOptions:
    """Return the options with the images that the INPUTs ask about; BadParameter for a task that has no such."""
    if images and not task.asks:
        raise typer.BadParameter(f"--image is given; {name} takes no question about an image. Leave it out.")
    return replace(options, images=[str(image) for image in images])


def refuse_generation(generation: GenerationOptions, what: str) -> None:
    """Raise BadParameter if a generation option is given for ``what``, which generates nothing."""
    names = [*map(option_of, generation.keywords()), *(["--score"] if generation.score else [])]
    if names:
        raise typer.BadParameter(f"{names[0]} is given, but {what} generates nothing.")


def expanded(inputs: Sequence[str], *, whole: bool) -> list[str]:
    """Return the INPUTs with ``-`` replaced by the lines of stdin, or by all of it as one text if ``whole``."""
    if inputs.count(STDIN) > 1:
        raise typer.BadParameter("INPUT - is given twice; stdin can be read only once.")
    found: list[str] = []
    for text in inputs:
        if text != STDIN:
            found.append(text)
        elif whole:
            found.append(read_stdin().removesuffix("\n").removesuffix("\r"))
        else:
            found += read_stdin().splitlines()
    if not found:
        raise InputError("stdin is empty; expected one INPUT per line.")
    return found


def read_stdin() -> str:
    """Return stdin as text; InputError unless it is UTF-8, with a byte order mark or without."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 (byte {error.start}); convert it, with iconv for example.") from None


def write_vectors(out: Path, name: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the results' vectors as one array (results, size) called ``name``."""
    import numpy as np

    write_arrays(out, {name: np.stack([result[name] for result in results])})


def show_arrays(bundle: Path, arrays: Mapping[str, Any], out: Path | None, as_json: bool) -> None:
    """Print the outputs of a raw run: as JSON in full unless they are in a file, else a line for each."""
    if as_json:
        outputs = {name: array_json(array, values=out is None) for name, array in arrays.items()}
        print_json({"bundle": bundle, "outputs": outputs, **written(out)})
        return
    for name, array in arrays.items():
        print(printable(array_line(name, array)))
    if out is not None:
        print(printable(f"written to {out}"))


def written(out: Path | None) -> dict[str, Path]:
    """Return the field "out" of a JSON document, where a file was written."""
    return {} if out is None else {"out": out}
