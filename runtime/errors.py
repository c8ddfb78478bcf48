"""Define every error that Transom raises on purpose.

TransomError
├── CheckpointError     the source checkpoint is missing, damaged, pickled, or not a model we define
├── ExportError         the export cannot start or finish: options, an existing --out, a full disk
│   ├── ParityError     the artefact does not compute what PyTorch computes
│   ├── PrecisionError  a tensor does not fit the range of the precision that was asked for
│   ├── CalibrationError  calibration data or a table of ranges cannot be used
│   ├── AccuracyError   the quantised model is less accurate than its gate allows
│   └── EngineError     no engine can be built of a graph, or not the one that was asked for
├── BundleError         a bundle is damaged, hostile, or of a format this version does not know
├── InputError          a value handed to a loaded bundle cannot be used
│   ├── ShapeError      ... because of its rank or one of its axes
│   ├── NotFiniteError  ... because the model gives NaN or infinity for it
│   └── RowsError       ... among others that can: their answers are in it
└── BackendError        the device or library that was asked for is not there, or not any more

A message says what was received, what was expected, and what to do next, on one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class TransomError(Exception):
    """Base of all errors of Transom; the command line prints it on one line and exits 1."""


class CheckpointError(TransomError):
    """The source checkpoint is missing, damaged, pickled, or not a model we define."""


class ExportError(TransomError):
    """The export cannot start or finish: options, an existing ``--out``, a full disk."""


class ParityError(ExportError):
    """The artefact does not compute what PyTorch computes."""


class PrecisionError(ExportError):
    """A tensor does not fit the range of the precision that was asked for."""


class CalibrationError(ExportError):
    """Calibration data or a table of ranges cannot be used."""


class AccuracyError(ExportError):
    """The quantised model is less accurate than its gate allows."""


class EngineError(ExportError):
    """No engine can be built of a graph, or not the one that was asked for."""


class BundleError(TransomError):
    """A bundle is damaged, hostile, or of a format this version does not know."""


class InputError(TransomError):
    """A value handed to a loaded bundle cannot be used."""


class ShapeError(InputError):
    """An input has the wrong rank, or an axis outside the bounds of the bundle."""


class NotFiniteError(InputError):
    """An output that a task reads from the model is NaN or infinite."""


class RowsError(InputError):
    """Some rows of a batch cannot be used; the others were answered.

    ``answers`` are those of all rows in their order, None where a row failed; ``errors`` has the errors by place.
    """

    def __init__(self, answers: Sequence[Any], errors: Mapping[int, InputError]) -> None:
        super().__init__(answers, errors)
        self.answers, self.errors = answers, errors

    def __str__(self) -> str:
        first = min(self.errors)
        return (
            f"{len(self.errors)} of {len(self.answers)} rows failed, the first at place {first}: {self.errors[first]} "
            "The answers of the others are in .answers; return_exceptions=True returns errors among the answers."
        )


class BackendError(TransomError):
    """The device or library that was asked for is not there, or a loaded bundle is not: closed, in another process."""


def one_line(error: BaseException, limit: int = 400) -> str:
    """Return another library's message on one line of at most ``limit`` characters, for a message of Transom's."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
