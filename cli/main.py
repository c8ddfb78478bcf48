"""The entry point of the command line: the commands by name, the help, and how a process begins and ends.

Each command imports the packages that it needs when it runs: ``transom --help`` loads neither torch nor numpy.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from transom.cli.bench import bench
from transom.cli.build import build
from transom.cli.calibrate import calibrate
from transom.cli.capacity import capacity
from transom.cli.debug import accuracy
from transom.cli.doctor import doctor
from transom.cli.export import export
from transom.cli.failures import Terminated, debug_from_environment, given, reported, without
from transom.cli.help import GroupedCommand
from transom.cli.inspect_bundle import inspect
from transom.cli.output import say
from transom.cli.remove_engine import remove_engine
from transom.cli.report import report
from transom.cli.repository import repository
from transom.cli.run import run
from transom.cli.selftest import selftest
from transom.cli.table import table
from transom.cli.verify import verify

ARGUMENTS = "transom.arguments"  # key of the raw arguments between parsing and running
STDERR = 2  # descriptor
EXIT_STATUS = """\b
Exit status:
  0    done
  1    a Transom error, such as a failed parity check; stderr says which
  2    wrong usage
  70   a bug of Transom; run again with --debug
  130  Ctrl-C

\b
More on a command:  transom COMMAND --help
Tab completion:     transom --install-completion
"""


class Commands(TyperGroup):
    """The group of all commands: takes --debug from any position, turns errors into lines and statuses."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        with reported(args):  # help and version are printed while parsing
            return super().parse_args(ctx, without("--debug", args))

    def invoke(self, ctx: Any) -> Any:
        with reported(ctx.meta[ARGUMENTS]), warnings_shown():
            return super().invoke(ctx)


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Print each of Transom's warnings as a line on stderr; those of libraries are left as ``main`` set them."""
    from transom.runtime.saturation import SaturationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", SaturationWarning)
        show = warnings.showwarning

        def print_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            if issubclass(category, SaturationWarning):
                say(f"{category.__module__}.{category.__name__}: {message}")
            else:
                show(message, category, *rest, **named)

        warnings.showwarning = print_warning
        yield


app = typer.Typer(
    name="transom",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # help is plain text: "[MASK]" is no markup, and a pipe gets what a terminal gets
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"transom {version('transom')}")
        raise typer.Exit


@app.callback(epilog=EXIT_STATUS)
def transom(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
    debug: Annotated[  # read by Commands, for every command
        bool, typer.Option("--debug", help="Show tracebacks; in any position, or TRANSOM_DEBUG=1.")
    ] = False,
) -> None:
    """Carry Transformer models from PyTorch to the edge: ONNX export, parity as a gate, a small runtime.

    \b
    Examples:
      transom export minilm --out bundles/minilm      compared with PyTorch
      transom run bundles/minilm 'A sentence.'        use it, without torch
      transom run bundles/gpt 'It is a truth'         continue a prompt
      transom bench bundles/minilm --shape B=8,S=128  measure it here
      transom doctor                                  what is installed here
    """


def examples(*commands: str) -> Any:
    """Return the end of ``--help``: example commands, one a line, not re-wrapped."""
    return "\b\n" + "\n".join(["Examples:" if len(commands) > 1 else "Example:", *(f"  {c}" for c in commands)])


app.command(
    cls=GroupedCommand,
    epilog=examples(
        "transom export minilm --out bundles/minilm",
        "transom export ./checkpoint --out bundles/mine --precision fp16 --max S=256",
        "transom export google/vit-base-patch16-224 --out vit-384 --image-size 384",
        "transom export gpt --out bundles/gpt",
        "transom export minilm --out bundles/minilm-int8 --precision int8",
    ),
)(export)
app.command(epilog=examples("transom verify bundles/minilm", "transom verify bundles/mine --source ./checkpoint"))(
    verify
)
app.command(
    cls=GroupedCommand,
    epilog=examples(
        "transom calibrate bundles/minilm",
        "transom calibrate bundles/mine --calibration-data reviews.txt --force",
    ),
)(calibrate)
app.command(
    epilog=examples(
        "transom build bundles/minilm-int8 --target rtx-sm86",
        "transom build bundles/gpt-fp16 --target rtx-sm89 --target rtx-sm120 --report",
        "transom build bundles/minilm-int8 --target rtx-sm86 --max B=4,S=64",
    )
)(build)
app.command(
    cls=GroupedCommand,
    epilog=examples(
        "transom repository bundles/minilm bundles/gpt --out models",
        "transom repository bundles/minilm --out models --max-batch 32",
        "transom repository bundles/gpt --out models --kind stream --force",
        "transom repository bundles/vit --out models --kind tensors --kind onnx",
    ),
)(repository)
app.command(epilog=examples("transom remove-engine bundles/minilm-int8 --target rtx-sm86"))(remove_engine)
debugging = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
debugging.command(
    "accuracy",
    epilog=examples(
        "transom debug accuracy bundles/mine-int8",
        "transom debug accuracy bundles/mine-int8 --calibration-data reviews.txt",
        "transom debug accuracy bundles/mine-fp16 --target 0.001 --json",
    ),
)(accuracy)
app.command(epilog=examples("transom selftest bundles/minilm --threads 2"))(selftest)
app.command(
    cls=GroupedCommand,
    epilog=examples(
        "transom run bundles/minilm 'A sentence.' 'Another one.'",
        "transom run bundles/squad 'Who wrote it?' 'Ada wrote it in 1843.' --json",
        "transom run bundles/vit photo.png --top-k 3",
        "transom run bundles/clip photo.png --label 'a cat' --label 'a dog'",
        "transom run bundles/minilm - --out embeddings.npz <lines.txt",
        "transom run bundles/minilm inputs.npz --out outputs.npz",
        "transom run bundles/gpt 'It is a truth' --do-sample --top-p 0.9 --seed 1",
        "transom run bundles/gpt --score 'It is a truth universally acknowledged'",
        "transom run bundles/transformer '3 May 1921' --num-beams 4 --json",
    ),
)(run)
app.command(
    epilog=examples(
        "transom bench bundles/minilm --shape B=1,S=128 --shape B=8,S=128 --threads 2",
        "transom bench bundles/gpt --shape S=64 --new-tokens 64",
    )
)(bench)
app.command(
    epilog=examples(
        "transom capacity bundles/minilm --rate 200 --p99 50ms --shape S=128",
        "transom capacity bundles/gpt --rate 5 --p99 2s --shape S=64 --new-tokens 64",
    )
)(capacity)
app.command(epilog=examples("transom inspect bundles/minilm", "transom inspect bundles/minilm --json"))(inspect)
app.command(
    epilog=examples(
        "transom report bundles/vit photo.png --force",
        "transom report bundles/transformer '3 May 1979' --out dates.html",
        "transom report bundles/clip photo.png --prompt 'a dog' --prompt 'a cat'",
    )
)(report)
app.add_typer(debugging, name="debug", help="Find where a bundle's error comes from.")
app.command(epilog=examples("transom doctor", "transom doctor bundles/minilm --json"))(doctor)
app.command(epilog=examples("transom table bundles/*"))(table)


def terminate(signal_number: int, frame: object) -> NoReturn:
    raise Terminated


def usable(stream: Any) -> Any:
    """Return a standard stream that prints any file name, outside its encoding too; one to nowhere if it is closed."""
    stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    stream.reconfigure(errors="backslashreplace")
    return stream


def own_stderr(stream: Any) -> Any:
    """Return stderr on a descriptor of its own, and send what native libraries print to descriptor 2 nowhere.

    tokenizers is one: for a damaged file it prints a stack of Rust frames, though it raises an error as well, which
    is printed as one line.
    """
    if stream.fileno() != STDERR:
        return stream
    own = os.fdopen(os.dup(STDERR), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    os.close(nowhere)
    return own


def main() -> None:
    """Run the ``transom`` command; the process ends with one of the statuses above."""
    signal.signal(signal.SIGTERM, terminate)
    sys.stdout, sys.stderr = usable(sys.stdout), usable(sys.stderr)
    if not given("--debug", sys.argv) and not debug_from_environment():
        sys.stderr = own_stderr(sys.stderr)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # the libraries' notes to developers
    app(prog_name="transom")


if __name__ == "__main__":
    main()
