"""Tasks of Swin v2: Swin's."""

from transom.runtime.tasks.swin import FAMILY as FAMILY
