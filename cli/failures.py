"""Turn the failure of a command into one line on stderr and an exit status, without a traceback.

With ``--json`` the same is also the JSON document on stdout: {"error": {"type": ..., "message": ...}}.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import typer

from transom.cli.output import print_json, say
from transom.runtime.errors import TransomError

FAILED = 1
INTERNAL = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
READER_GONE = 141  # 128 + SIGPIPE
TERMINATED = 143  # 128 + SIGTERM

# click's; which module it lives in depends on typer's version
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


class Terminated(SystemExit):
    """SIGTERM arrived. An exception, so that temporary folders are removed on the way out."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class OutputError(Exception):
    """Stdout cannot be written: its disk is full, or its reader is gone."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause.strerror or cause))
        self.reader_gone = isinstance(cause, BrokenPipeError)


@contextmanager
def reported(args: Sequence[str]) -> Iterator[None]:
    """Run a command inside this: any exception becomes its line and ``typer.Exit``.

    ``args`` are the raw arguments, since ``--json`` must hold even where parsing them failed.
    """
    as_json, debug = given("--json", args), given("--debug", args) or debug_from_environment()
    try:
        with flushed():
            yield
    except typer.Exit:
        raise
    except Terminated as error:
        fail(error, "transom: terminated", TERMINATED, as_json, debug)
    except KeyboardInterrupt as error:
        fail(error, "transom: interrupted", INTERRUPTED, as_json, debug)
    except OutputError as error:
        drop_stdout()
        if error.reader_gone:
            raise typer.Exit(READER_GONE) from None
        fail(error, f"transom: the output cannot be written: {error}", FAILED, False, debug)
    except TransomError as error:
        name = f"transom.runtime.errors.{type(error).__name__}"
        fail(error, f"{name}: {error}", FAILED, as_json, debug)
    except UsageError as error:
        if as_json:
            print_error("UsageError", usage_message(error))
        raise
    except Exception as error:  # a bug of Transom or of a library
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        fail(error, f"transom: internal error ({reason}), run again with --debug", INTERNAL, as_json, debug)


@contextmanager
def flushed() -> Iterator[None]:
    """Flush stdout at the end, and raise OutputError where stdout itself fails.

    Commands turn errors of the files that they write into TransomErrors; any OSError left is stdout's.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        raise OutputError(error) from None
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            raise OutputError(error) from None


def fail(error: BaseException, line: str, status: int, as_json: bool, debug: bool) -> None:
    """Print the failure as a traceback, a line or JSON, as asked for, and exit with ``status``."""
    if debug:
        traceback.print_exception(error)
    say(line)
    if as_json:
        print_error(type(error).__name__, str(error) if isinstance(error, Exception) else line)
    raise typer.Exit(status)


def print_error(kind: str, message: str) -> None:
    """Print the JSON document of a failure; a reader that is gone is not reported as another failure."""
    try:
        print_json({"error": {"type": kind, "message": message}})
        sys.stdout.flush()
    except OSError:
        drop_stdout()


def usage_message(error: BaseException) -> str:
    """Return click's message about wrong usage, in one sentence."""
    return str(error.format_message()) if hasattr(error, "format_message") else str(error)


def given(flag: str, args: Sequence[str]) -> bool:
    """Return whether the flag is among the arguments, before a ``--`` that makes everything an INPUT."""
    return flag in args[: end_of_options(args)]


def without(flag: str, args: Sequence[str]) -> list[str]:
    """Return the arguments without that flag, wherever it is among the options."""
    end = end_of_options(args)
    return [arg for arg in args[:end] if arg != flag] + list(args[end:])


def end_of_options(args: Sequence[str]) -> int:
    """Return the position of ``--``, or the number of arguments."""
    return list(args).index("--") if "--" in args else len(args)


def debug_from_environment() -> bool:
    """Return whether TRANSOM_DEBUG asks for tracebacks."""
    return os.environ.get("TRANSOM_DEBUG", "") not in ("", "0")


def drop_stdout() -> None:
    """Redirect stdout to nothing, or the interpreter's last flush would report the same failure again."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
