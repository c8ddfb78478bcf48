"""Measure INT8 against Transom's FP32 on this CPU: a BERT of base size with random weights, texts of 128 tokens.

    python benchmarks/int8_speed.py --work DIR [--mode static --mode dynamic] [--json FILE]
    python benchmarks/int8_speed.py --fp32 BUNDLE --int8 BUNDLE         two bundles that are there already

What is timed is ``LoadedBundle.run``. Both sessions live in one process and their runs alternate in blocks: 12 of one,
a rest of 50 ms, because a session's threads spin on for a while after its last run, 12 of the other, three times over.
What counts is the ratio of the medians; it says nothing without the processor's instructions, so they are printed. Run
it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.metadata import version
from pathlib import Path

from int8_measures import BLOCKS, RUNS, alternating, machine

from transom.runtime import load
from transom.runtime.bench import example_feeds, sizes_of

S = 128
BATCHES = (1, 8)
MODES = ("static", "dynamic")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def random_bert(folder: Path) -> Path:
    """Return a BERT-base with random weights, and MiniLM's tokenizer, of the same 30,522 words, for calibration."""
    import torch
    import transformers

    from transom.export.reference_models import reference_folder

    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        transformers.BertModel(transformers.BertConfig()).save_pretrained(folder)
        for name in TOKENIZER_FILES:
            shutil.copy(reference_folder("minilm") / name, folder)
    return folder


def bundles(work: Path, modes: list[str]) -> tuple[Path, dict[str, Path]]:
    """Return (FP32's bundle, INT8's by mode), exported unless they exist."""
    from transom.export.pipeline import export
    from transom.export.quantization.options import QuantizeOptions

    checkpoint, sizes = str(random_bert(work / "bert-base")), {"S": S, "B": max(BATCHES)}
    fp32 = work / "bert-base-fp32"
    if not fp32.exists():
        export(checkpoint, fp32, max_sizes=sizes)
    found = {mode: work / f"bert-base-int8-{mode}" for mode in modes}
    for mode, bundle in found.items():
        if not bundle.exists():
            options = QuantizeOptions(calibration_data=("wordnet",), activations=mode, gate=False)
            export(checkpoint, bundle, precision="int8", max_sizes=sizes, quantize=options)
    return fp32, found


def compare(fp32: Path, int8: Path, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the median milliseconds of both, and their ratio."""
    with load(fp32, threads=options.threads) as plain, load(int8, threads=options.threads) as small:
        graph = plain.manifest.graphs[0].graph
        feeds = example_feeds(graph, sizes_of(graph, plain.manifest.axes, {"B": batch, "S": S}))
        calls = {"fp32": lambda: plain.run(feeds), "int8": lambda: small.run(feeds)}
        seconds = alternating(calls, options.blocks, options.runs)
    found = {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
    return {**found, "ratio": seconds["fp32"] / seconds["int8"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where checkpoint and bundles go")
    parser.add_argument("--fp32", type=Path, metavar="BUNDLE")
    parser.add_argument("--int8", type=Path, metavar="BUNDLE", action="append")
    parser.add_argument("--mode", choices=MODES, action="append", help="how INT8 quantises activations; static")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.work is None) == (options.fp32 is None or options.int8 is None):
        parser.error("give --work, or --fp32 and --int8")
    if options.work is not None:
        fp32, int8 = bundles(options.work, options.mode or [MODES[0]])
    else:
        fp32, int8 = options.fp32, {path.name: path for path in options.int8}
    about = {**machine(), "threads": options.threads, "onnxruntime": version("onnxruntime"), "S": S}
    print(json.dumps(about), "\n\n| INT8 | B | FP32, ms | INT8, ms | ratio |\n|---|---|---|---|---|", sep="")
    rows = []
    for name, bundle in int8.items():
        for batch in BATCHES:
            found = compare(fp32, bundle, batch, options)
            rows.append({"int8": name, "batch": batch, **found})
            print(f"| {name} | {batch} | {found['fp32_ms']:.1f} | {found['int8_ms']:.1f} | {found['ratio']:.2f} |")
    if options.json is not None:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
