"""Zero-, one- and few-shot prompting through the runtime: the same weights, given a task by examples alone.

    transom export gpt --out bundles/gpt
    python examples/few_shot.py bundles/gpt

Prints a prompt of each kind with the model's answer, then the accuracy on 500 fresh prompts of each, with 95 %
intervals. in_context.py says what the task is.
"""

from __future__ import annotations

import sys

import numpy as np
from in_context import draw, question, table

from transom.runtime import load
from transom.runtime.tasks.gpt import GPT

KINDS = {"zero-shot": 0, "one-shot": 1, "few-shot": 8}
SEED = 3


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with load(sys.argv[1]) as gpt:
        assert isinstance(gpt, GPT)
        for kind, shots in KINDS.items():
            prompt = draw(np.random.RandomState(SEED), shots)
            answer = gpt.generate(question(prompt), max_new_tokens=1)
            print(f"{kind}, the right answer is {prompt[-1][1]}:\n{question(prompt)}[{answer}]\n")
        print("\n".join(table(lambda prompt: gpt.generate(prompt, max_new_tokens=1))))


if __name__ == "__main__":
    main()
