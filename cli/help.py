"""Print ``--help`` with options in groups, as plain text in a pipe as on a terminal (rich's panels are off)."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

REFERENCES = "{reference models}"  # stands for their names in a help text; replaced when help is shown


class GroupedCommand(TyperCommand):
    """A command whose ``--help`` lists options with a ``rich_help_panel`` under that heading, after the others."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                heading = getattr(parameter, "rich_help_panel", None) or ("Arguments" if argument else "Options")
                groups.setdefault(heading, []).append((record[0], filled(record[1])))
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def filled(text: str) -> str:
    """Return the help text with the names of the reference models filled in."""
    if REFERENCES not in text:
        return text
    from transom.export.reference_models import REFERENCE_MODELS as known

    return text.replace(REFERENCES, ", ".join(known))
