"""Calibrate, evaluate and draw ELECTRA as BERT."""

from __future__ import annotations

from dataclasses import replace

from transom.export.families import bert

FAMILY = replace(bert.FAMILY, title="ELECTRA")
