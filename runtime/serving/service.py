"""Answer requests of many callers with one loaded bundle: put their rows together, run once, take the answers apart."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transom.runtime.errors import InputError, RowsError
from transom.runtime.generation.field_specs import FieldSpec
from transom.runtime.serving.operation import Operation, Row
from transom.runtime.serving.ports import Array

TEXTS = ("stop_strings",)  # parameters whose text is not read as JSON unless it is a list


@dataclass(frozen=True)
class Request:
    """The arrays of one request by name, rows first, and its parameters."""

    inputs: Mapping[str, Array]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One row, the place of its request, and its number there."""

    place: int
    number: int
    row: Row


class Service:
    """An operation, for requests of many callers. Any number of threads may call it."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation

    def answer(self, requests: Sequence[Request]) -> list[dict[str, Array] | InputError]:
        """Return the arrays of each request's answer, or its error, in their order.

        Rows of equal parameters share a call, also those of different requests. A request that cannot be used fails
        alone. Raises what is no request's fault, such as BackendError.
        """
        errors: dict[int, InputError] = {}
        rows: list[list[Row]] = [[] for _ in requests]
        groups: dict[object, list[Entry]] = {}
        values: dict[object, Mapping[str, Any]] = {}
        for place, request in enumerate(requests):
            try:
                parameters = parsed(self.operation.parameters, request.parameters)
                alone = place if self.operation.alone(parameters) else None
                rows[place] = self.operation.read(request.inputs)
            except InputError as error:
                errors[place] = error
                continue
            for number, row in enumerate(rows[place]):
                key: object = (json.dumps(parameters, sort_keys=True), self.operation.key(row), alone)
                groups.setdefault(key, []).append(Entry(place, number, row))
                values[key] = parameters
        for key, entries in groups.items():
            self._call(entries, values[key], rows, errors)
        return [
            errors[place] if place in errors else self.operation.write(answers) for place, answers in enumerate(rows)
        ]

    def _call(
        self,
        entries: Sequence[Entry],
        parameters: Mapping[str, Any],
        answers: list[list[Row]],
        errors: dict[int, InputError],
    ) -> None:
        """Answer rows in one call or, where a row cannot be used, those of each request by themselves."""
        try:
            found = self.operation.answer([entry.row for entry in entries], parameters)
        except InputError as error:
            places = dict.fromkeys(entry.place for entry in entries)
            if len(places) == 1:
                errors.setdefault(entries[0].place, of_one(error))
                return
            for place in places:
                self._call([entry for entry in entries if entry.place == place], parameters, answers, errors)
            return
        for entry, answer in zip(entries, found, strict=True):
            answers[entry.place][entry.number] = answer

    def stream(self, request: Request) -> Generator[dict[str, Array], None, None]:
        """Yield the answer to a request of one row in pieces; closing the iterator ends the generation.

        Raises InputError, at once, for a request that cannot be used, and for an operation that does not stream.
        """
        stream = self.operation.stream
        if stream is None:
            raise InputError("answers of this bundle come at once; ask without streaming.")
        parameters = parsed(self.operation.parameters, request.parameters)
        rows = self.operation.read(request.inputs)
        if len(rows) != 1:
            raise InputError(f"a stream answers one row, received {len(rows)}; send a request for each.")
        return self._written(stream(rows[0], parameters))

    def _written(self, pieces: Generator[Row, None, None]) -> Generator[dict[str, Array], None, None]:
        with closing(pieces):
            for piece in pieces:
                yield self.operation.write([piece])


def of_one(error: InputError) -> InputError:
    """Return an error in the words of its request: of rows that failed among others, the first one's own."""
    return error.errors[min(error.errors)] if isinstance(error, RowsError) else error


def parsed(specs: Mapping[str, FieldSpec], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's parameters, those of text read as JSON; InputError for one that is unknown or out of range.

    The protocols of some servers have no numbers with a fraction, and none has lists: "0.7", "[1, 2]".
    """
    found = {}
    for name, value in given.items():
        spec = specs.get(name)
        if spec is None:
            near = get_close_matches(str(name), specs, n=1)
            there = f"there are {', '.join(specs)}" if specs else "it takes none"
            raise InputError(
                f"unknown parameter {name!r:.60}; " + (f"did you mean {near[0]}?" if near else f"{there}.")
            )
        value = from_text(name, value) if isinstance(value, str) else value
        try:
            spec.parse(value)
        except ValueError:
            raise InputError(f"the parameter {name} is {value!r:.60}; expected {spec.expected}.") from None
        found[name] = json.loads(json.dumps(value, default=lambda number: number.tolist()))  # numpy's as Python's
    return found


def from_text(name: str, text: str) -> Any:
    if name in TEXTS and not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
