"""Tasks of ELECTRA: BERT's, but for the next sentence.

A discriminator's bundle answers ``tag``: each token is "original" or "replaced", with the probability of that.
"""

from __future__ import annotations

from dataclasses import replace

from transom.runtime.tasks import bert

FAMILY = replace(
    bert.FAMILY, tasks={name: task for name, task in bert.FAMILY.tasks.items() if name != "next-sentence-prediction"}
)
