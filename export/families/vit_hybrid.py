"""Calibrate, evaluate and draw the hybrid ViT as ViT."""

from __future__ import annotations

from dataclasses import replace

from transom.export.families import vit

FAMILY = replace(vit.FAMILY, title="hybrid Vision Transformer")
