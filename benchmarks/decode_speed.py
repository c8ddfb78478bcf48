"""Measure tokens per second of a GPT-2 bundle beside transformers, interleaved in one run.

    python benchmarks/decode_speed.py --work DIR                    GPT-2 of 124 M parameters, random weights
    python benchmarks/decode_speed.py --work DIR --checkpoint FOLDER

Greedy, batch 1, prompts of 64 and 900 tokens. The machine is noisy, so sides alternate and the ratio of the
medians is what counts. The bundle is exported into DIR the first time, parity and all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from transom.export.pipeline import export
from transom.runtime import load
from transom.runtime.host import processor

CASES = ((64, 64), (900, 100))  # tokens of the prompt, new tokens


def random_gpt2(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
    return folder


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    answer = call()
    return time.perf_counter() - started, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"on {processor()}", flush=True)
    checkpoint = options.checkpoint or random_gpt2(options.work / "gpt2-124m")
    bundle = options.work / f"{checkpoint.name}-bundle"
    if not bundle.exists():
        export(str(checkpoint), bundle)
    torch.set_num_threads(options.threads)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(checkpoint).eval()
    rng = np.random.default_rng(0)
    print("| prompt + new | transformers tokens/s | Transom tokens/s | ratio | same tokens |\n|---|---|---|---|---|")
    with load(bundle, threads=options.threads) as ours:
        for prompt_length, new in CASES:
            prompt = rng.integers(0, 50257, prompt_length).tolist()
            keywords = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

            def run_theirs(prompt: list[int] = prompt, keywords: dict[str, Any] = keywords) -> list[int]:
                with torch.inference_mode():
                    ids = torch.tensor([prompt])
                    found = theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **keywords)
                return found[0, len(prompt) :].tolist()

            def run_ours(prompt: list[int] = prompt, keywords: dict[str, Any] = keywords) -> list[int]:
                return list(ours.generate(prompt, **keywords))

            run_theirs(), run_ours()  # warm-up
            seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
            answers = {}
            for _ in range(options.rounds):
                for side, call in (("theirs", run_theirs), ("ours", run_ours)):
                    taken, answers[side] = timed(call)
                    seconds[side].append(taken)
            theirs_rate, ours_rate = (new / statistics.median(seconds[side]) for side in ("theirs", "ours"))
            same = answers["ours"] == answers["theirs"]
            rates = f"{theirs_rate:.1f} | {ours_rate:.1f} | {ours_rate / theirs_rate:.2f}"
            print(f"| {prompt_length} + {new} | {rates} | {same} |")


if __name__ == "__main__":
    main()
