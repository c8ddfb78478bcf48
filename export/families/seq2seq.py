"""Calibrate, evaluate and draw seq2seq: as the Transformer, whose tasks it has."""

from __future__ import annotations

from dataclasses import replace

from transom.export.families import transformer

FAMILY = replace(transformer.FAMILY, title="seq2seq")
