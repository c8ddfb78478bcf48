"""Calibrate, evaluate and draw ELECTRA as BERT: GateLimits and Figure are those of bert.py."""

from __future__ import annotations

from dataclasses import replace

from transom.export.families import bert

FAMILY = replace(bert.FAMILY, title="ELECTRA")
