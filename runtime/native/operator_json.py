"""Read and write the JSON form of a list of operators; docs/bundle_format.md is the specification.

Each record of ``operators`` is an object with the names of its fields; a field that has its default may be left out.
An operator says its kind under "operator": "linear", "attention", ... Only forms are checked here, not meanings:
``operator_list`` does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from transom.runtime.json_reader import Fields
from transom.runtime.native.operators import (
    Attention,
    Embed,
    Epilogue,
    Linear,
    Norm,
    Operator,
    OperatorList,
    Patches,
    Pool,
    Prepend,
    Quantized,
    Select,
    StoredTensor,
    Table,
    Unpack,
)

VERSION = 1
KINDS: Mapping[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Linear, Attention, Embed, Patches, Prepend, Select, Pool, Unpack)
}
NAME_OF = {kind: name for name, kind in KINDS.items()}
MAX_NAME = 300  # characters
MAX_INTEGER = 2**31 - 1
LARGEST_FLOAT = 3.4e38  # of float32
MAX_OPERATORS = 1 << 14  # BERT-large takes about 150
MAX_PARTS = 64  # of a tuple: weights that lie side by side, tables, axes of a shape


def is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME


def is_integer(value: Any) -> bool:
    return type(value) is int and -MAX_INTEGER <= value <= MAX_INTEGER


def is_number(value: Any) -> bool:
    """Return whether a value is a number that float32 holds."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST_FLOAT


def is_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_PARTS and all(map(is_name, value))


def is_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MAX_PARTS:
        return False
    return all(type(size) is int and 0 < size <= MAX_INTEGER for size in value)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# How a field is read, by its annotation in ``operators``: the check of its JSON value, and what was expected.
PLAIN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "str": (is_name, f"a text of 1..{MAX_NAME} characters"),
    "str | None": (or_none(is_name), f"a text of 1..{MAX_NAME} characters, or null"),
    "int": (is_integer, "an integer of 32 bits"),
    "int | None": (or_none(is_integer), "an integer of 32 bits, or null"),
    "float": (is_number, "a number that float32 holds"),
    "float | None": (or_none(is_number), "a number that float32 holds, or null"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "tuple[str, ...]": (is_names, f"an array of at most {MAX_PARTS} texts"),
    "tuple[int, ...]": (is_sizes, f"an array of at most {MAX_PARTS} sizes, each 1..{MAX_INTEGER}"),
}
RECORDS: Mapping[str, type[Any]] = {"Epilogue": Epilogue, "Norm | None": Norm, "Quantized | None": Quantized}

# Of each record its fields: name, type as it is written, default, ... where there is none.
FORMS: Mapping[type[Any], tuple[tuple[str, str, Any], ...]] = {
    kind: tuple((f.name, str(f.type), ... if f.default is MISSING else f.default) for f in fields(kind))
    for kind in (*KINDS.values(), *RECORDS.values(), StoredTensor, Table)
}


def operators_from_json(value: Any, problems: list[str]) -> OperatorList | None:
    """Return a list of the right form, None where some of it is not; ``problems`` gets what is wrong."""
    before = len(problems)
    given = Fields(value, "the list", problems)
    given.integer("version", VERSION, VERSION)
    texts = {key: given.take(key, *PLAIN["str"]) for key in ("graph", "weights", "ids")}
    mask = given.take("mask", *PLAIN["str | None"], None)
    operators = given.sequence("operators")
    if len(operators) > MAX_OPERATORS:
        problems.append(f"the list has {len(operators)} operators, expected at most {MAX_OPERATORS}")
        operators = []
    made = [operator_from_json(each, f"operators[{place}]", problems) for place, each in enumerate(operators)]
    tensors = {
        str(name): record_from_json(StoredTensor, tensor, f"tensors[{str(name)[:60]!r}]", problems)
        for name, tensor in given.mapping("tensors").items()
    }
    outputs = given.take("outputs", of_each(is_name), "an object of texts", {})
    counts = given.take("counts", of_each(is_integer), "an object of integers", {})
    given.done()
    if len(problems) > before:
        return None
    return OperatorList(
        **texts, mask=mask, operators=tuple(made), tensors=tensors, outputs=dict(outputs), counts=dict(counts)
    )


def of_each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return the check of an object that has ``check`` for each of its values."""
    return lambda value: isinstance(value, dict) and all(map(is_name, value)) and all(map(check, value.values()))


def operator_from_json(value: Any, where: str, problems: list[str]) -> Any:
    """Return an operator, None where it says no known kind."""
    rest = dict(value) if isinstance(value, dict) else {}
    kind = rest.pop("operator", None)
    if not isinstance(kind, str) or kind not in KINDS:
        problems.append(f"{where} is {repr(kind)[:60]}, expected one of the operators {', '.join(KINDS)}")
        return None
    return record_from_json(KINDS[kind], rest, f"{where} ({kind})", problems)


def record_from_json(kind: type[Any], value: Any, where: str, problems: list[str]) -> Any:
    """Return a record of one kind; None where a field is not of its form."""
    before = len(problems)
    given, made = Fields(value, where, problems), {}
    for name, annotation, default in FORMS[kind]:
        if annotation in RECORDS:
            optional = annotation.endswith("None")
            inner = given.take(name, or_none(is_object) if optional else is_object, "an object", default)
            if inner is not None:
                inner = record_from_json(RECORDS[annotation], inner, f"{where}.{name}", problems)
            made[name] = inner
        elif annotation == "tuple[Table, ...]":
            tables = given.sequence(name)[: MAX_PARTS + 1]
            made[name] = tuple(record_from_json(Table, each, f"{where}.tables[]", problems) for each in tables)
        else:
            found = given.take(name, *PLAIN[annotation], default)
            made[name] = tuple(found) if isinstance(found, list) else found
            if annotation.startswith("float") and found is not None:
                made[name] = float(found)
    given.done()
    if len(problems) > before:
        return None
    return kind(**made)


def operators_to_json(operators: OperatorList) -> dict[str, Any]:
    """Return a list as plain data; fields that have their defaults are left out."""
    found = record_to_json(operators)
    found["operators"] = [operator_to_json(operator) for operator in operators.operators]
    found["tensors"] = {name: record_to_json(tensor) for name, tensor in operators.tensors.items()}
    for name in ("outputs", "counts"):
        found[name] = dict(getattr(operators, name))
    return {"version": VERSION, **{key: value for key, value in found.items() if value is not None}}


def operator_to_json(operator: Operator) -> dict[str, Any]:
    """Return an operator as plain data."""
    return {"operator": NAME_OF[type(operator)], **record_to_json(operator)}


def record_to_json(record: Any) -> dict[str, Any]:
    """Return a record's fields but those that have their defaults."""
    found = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if field.default is MISSING or value != field.default:
            found[field.name] = plain(value)
    return found


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    if isinstance(value, (Epilogue, Norm, Quantized, Table)):
        return record_to_json(value)
    return value
