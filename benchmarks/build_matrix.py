"""Build full-size models with random weights for every target of TensorRT-RTX in FP16 and INT8: fusions, sizes.

    python benchmarks/build_matrix.py --out build/build-matrix        (docs/results/ has what came of it)

No GPU is needed. Each model is exported with its parity checked, INT8 is calibrated on real text and photographs (its
accuracy is no figure: the weights are random), TensorRT's variant is compared with the bundle, and every attention must
be one kernel. OUT.json grows with every engine, so that what is there is not built again; OUT.md is made of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from full_size_models import MODELS

from transom.export.engine.build import Engine, build
from transom.export.engine.targets import TARGETS, find_targets
from transom.export.pipeline import export
from transom.export.quantization.options import QuantizeOptions
from transom.runtime.bundle import Bundle
from transom.runtime.host import cpu_name

PRECISIONS = ("fp16", "int8")
RTX = tuple(target.name for target in TARGETS.values() if target.capability is not None)
MAX_SIZES = {"B": 4}
COLUMNS = ("model", "precision", "target", "graph", "profile", "attention", "GELU", "INT8 products", "kernels", "plan")
COLUMNS += ("built in",)


def bundle_of(model: str, precision: str, folder: Path) -> Path:
    """Return the exported bundle of one model in one precision."""
    import torch
    import transformers

    _, make, samples = MODELS[model]
    torch.manual_seed(0)
    make(transformers).eval().save_pretrained(folder / "checkpoint")
    options = QuantizeOptions()
    if precision == "int8":
        np.savez(folder / "calibration.npz", **samples())
        options = QuantizeOptions(calibration_data=(str(folder / "calibration.npz"),), gate=False)
    export(str(folder / "checkpoint"), folder / "bundle", precision=precision, max_sizes=MAX_SIZES, quantize=options)
    return folder / "bundle"


def record(model: str, precision: str, engine: Engine) -> dict[str, Any]:
    recorded = engine.to_json()
    for profile in recorded["profiles"]:
        del profile["alike"], profile["alone"]
    return {"model": model, "precision": precision, **recorded}


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Engines of full size, built without a GPU",
        "",
        f"{found['library']} on {found['cpu']}, two cores and no GPU, {found['date']}. The weights are random, and no "
        "engine was executed.",
        "Before anything was built, the variant of each graph was compared with the exported file in ONNX Runtime,",
        "decoders step by step.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for row in found["engines"]:
        for profile in row["profiles"]:
            attention, gelu, int8 = profile["attention"], profile["gelu"], profile["int8"]
            cells = [
                MODELS[row["model"]][0],
                row["precision"],
                row["target"],
                row["graph"],
                profile["profile"],
                f"{attention['fused']} of {attention['of']}",
                f"{gelu['fused']} of {gelu['of']}" if gelu["of"] else "–",
                f"{int8['products']} of {int8['of']}" if int8["of"] else "–",
                str(profile["kernels"]),
                f"{row['size'] / 2**20:.0f} MiB",
                f"{row['seconds']:.0f} s",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where OUT.json and OUT.md go")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--targets", nargs="+", choices=RTX, default=list(RTX))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    from transom.runtime.backends.trt_library import NAMES, library
    from transom.runtime.backends.trt_library import RTX as KIND

    path = options.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"engines": []}
    if path.exists():
        found = json.loads(path.read_text())
        print(f"{path} has {len(found['engines'])} engines, which are not built again; remove it to start anew")
    found |= {
        "library": f"{NAMES[KIND]} {library(KIND).__version__}",
        "cpu": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for model in options.models:
        for precision in options.precisions:
            there = {
                row["target"] for row in found["engines"] if (row["model"], row["precision"]) == (model, precision)
            }
            missing = [target for target in options.targets if target not in there]
            if not missing:
                continue
            with tempfile.TemporaryDirectory(prefix="build-matrix-") as made:
                os.environ["XDG_CACHE_HOME"] = f"{made}/cache"  # else every plan would stay there as well
                started = time.perf_counter()
                folder = bundle_of(model, precision, Path(made))
                print(f"{model} {precision}: exported in {time.perf_counter() - started:.0f} s", flush=True)
                for target in missing:
                    engines = build(Bundle(folder), find_targets([target]), allow_unfused=False, tell=lambda _: None)
                    for engine in engines:
                        found["engines"].append(record(model, precision, engine))
                        words = "; ".join(fusion.summary() for fusion in engine.fusions)
                        print(
                            f"  {target} {engine.graph}: {engine.size / 2**20:.0f} MiB, {engine.seconds:.0f} s, {words}"
                        )
                    found["engines"].sort(key=lambda row: (list(MODELS).index(row["model"]), row["precision"]))
                    path.write_text(json.dumps(found, indent=1) + "\n")
                    shutil.rmtree(f"{made}/cache", ignore_errors=True)
    options.out.with_suffix(".md").write_text(markdown(found))
    print(f"{options.out.with_suffix('.md')} has the table")


if __name__ == "__main__":
    main()
