"""Calibrate, evaluate and draw Swin v2 as Swin."""

from __future__ import annotations

from dataclasses import replace

from transom.export.families import swin

FAMILY = replace(swin.FAMILY, title="Swin Transformer v2")
