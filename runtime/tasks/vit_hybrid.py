"""Tasks of the hybrid ViT: ViT's."""

from __future__ import annotations

from transom.runtime.tasks import vit

FAMILY = vit.FAMILY
