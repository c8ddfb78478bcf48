"""Choose the golden outputs that a bundle is compared with on a device, and how far off it may be.

FP32, FP16 and BF16 are compared with PyTorch. A quantised bundle is further from PyTorch than from what it computed at
its export: on a CPU it is compared with its own outputs of then, elsewhere with those of its graph for TensorRT, whose
Q/DQ pairs were simulated in float32. With PyTorch it is compared too, within twice the worst error of its export.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.format import at
from transom.runtime.host import UNKNOWN, instruction_set
from transom.runtime.manifest import QUANTIZED, Manifest
from transom.runtime.manifest_graphs import SIMULATED, TENSORRT_ALONE
from transom.runtime.manifest_sections import worst_error
from transom.runtime.saturation import multiplies_integers

# Sides of golden.safetensors, with SIMULATED: what computed the values. NATIVE are the lists of fused operators.
PYTORCH, BUNDLE, NATIVE = "pytorch", "bundle", "native"
OWNERS = {
    PYTORCH: "PyTorch's",
    BUNDLE: "the build's",
    NATIVE: "the build's own kernels'",
    SIMULATED: "the simulated TensorRT graph's",
}

# max|here - expected| / max|expected| of a quantised bundle on another CPU. Sums of integers are exact. The FP32 around
# them is not: what lies between two integers may be rounded to the other one, and the layers behind carry that on.
# Nearly every output repeats to 1e-6, a few do not: with FP32 arithmetic in place of the integer kernels the worst of
# the reference models are 3e-7 (ViT), 2.5e-3 (BERT), 7e-3 (Transformer), 1.1e-2 (GPT), 1.4e-2 (CLIP), 5.1e-2 (MiniLM).
REPEAT_TOLERANCE = 0.1
ENGINE_TOLERANCE = 0.1  # the same of an engine and the graph it was built from: other kernels around equal integers
BLOCKS_IN_FLOATS = ("sse", "neon", "unknown")  # where MatMulNBits multiplies floats: a product is cut by threads
MORE_THAN_EXPORT = 2.0  # times the worst error against PyTorch that the export measured
BELOW_ALL_ZEROS = 0.95  # outputs that are all zero have an error of 1 against PyTorch, which nothing may allow


@dataclass(frozen=True)
class Reference:
    """One side of the golden values, and the largest error that is allowed against it.

    ``tolerance`` is of max|here - expected| / max|expected| per output tensor; ``note`` says why it is not narrower.
    """

    side: str
    tolerance: float
    note: str = ""

    @property
    def owner(self) -> str:
        return OWNERS[self.side]


def references(
    manifest: Manifest, device: str, sides: Collection[str], native: Mapping[str, str] | None = None
) -> tuple[Reference, ...]:
    """Return what outputs on ``device`` are compared with, the narrowest first; all of them have to hold.

    ``sides`` are those that the golden values have: bundles of version 0.1.0 have no SIMULATED. ``native`` has the
    instruction set of the kernels by the graphs that lists of operators execute, None where none does.
    """
    pytorch = Reference(PYTORCH, pytorch_tolerance(manifest))
    if manifest.precision not in QUANTIZED:
        return (pytorch,)
    if native:
        return native_reference(manifest, sides, native), pytorch
    if device == "cpu":
        other = export_differences(manifest)
        note = f"not bit for bit: {'; '.join(other)}" if other else ""
        return Reference(BUNDLE, REPEAT_TOLERANCE if other else 0.0, note), pytorch
    if SIMULATED in sides:
        return Reference(SIMULATED, ENGINE_TOLERANCE), pytorch
    if not multiplies_integers(manifest):  # weights alone are integers: every device runs the same graph
        return Reference(BUNDLE, ENGINE_TOLERANCE), pytorch
    note = "the golden values hold no outputs of the simulated TensorRT graph; export again for a narrower comparison"
    return (Reference(PYTORCH, pytorch.tolerance, note),)


def native_reference(manifest: Manifest, sides: Collection[str], native: Mapping[str, str]) -> Reference:
    """Return the golden values of the native kernels; those of ONNX Runtime where there are none.

    Bit for bit where all graphs run by the kernels of the export, of the same sources for the same instruction set: of
    others sums of integers are the same, and float32 is added in another order, or attention multiplied in BF16.
    """
    if NATIVE not in sides:
        note = "the golden values hold no outputs of the native kernels; export again for a narrower comparison"
        return Reference(BUNDLE, REPEAT_TOLERANCE, note)
    here = native_sources()
    other = []
    for name, isa in native.items():
        made = at(manifest.native, name)
        if at(made, "kernels") != isa:
            there = str(at(made, "kernels") or "another")[:40]
            other.append(f"kernels of {name} are for {isa} here, at the export they were for {there}")
        elif not here or at(made, "sources") != here:
            other.append(f"kernels of {name} are of another version than at the export")
    if native.keys() != {file.graph.name for file in manifest.graphs}:
        other += export_differences(manifest)  # of the graphs that ONNX Runtime executes
    note = f"not bit for bit: {'; '.join(other)}" if other else ""
    return Reference(NATIVE, REPEAT_TOLERANCE if other else 0.0, note)


def native_sources() -> str:
    """Return the hash of the sources of the library that runs here; empty where none runs, or it has none."""
    from transom.runtime.native.library import native_library  # which loads the library

    library = native_library()
    return "" if library is None else library.sources


def pytorch_tolerance(manifest: Manifest) -> float:
    """Return the largest error allowed against PyTorch after the export.

    The recorded tolerance; of a quantised bundle, whose tolerance is wide, twice the worst error of its export.
    """
    tolerance = float(manifest.parity["tolerance"])
    worst = worst_error(manifest.parity)
    if manifest.precision not in QUANTIZED:
        return tolerance
    return min(tolerance if worst is None else MORE_THAN_EXPORT * worst, BELOW_ALL_ZEROS)


def export_differences(manifest: Manifest) -> list[str]:
    """Return why a quantised bundle need not repeat here the bits of its export; nothing where it has to.

    Another instruction set, other means by which sums of 8-bit products are exact, another version of ONNX Runtime.
    """
    made = manifest.quantization or {}
    pairs = [
        ("the instruction set", made.get("instruction_set"), instruction_set()),
        ("onnxruntime", manifest.tools.get("onnxruntime"), onnxruntime().__version__),
    ]
    if multiplies_integers(manifest):
        pairs.append(("what makes integer sums exact", made.get("integer_means"), integer_sums().way))
    found = [
        f"{what} is {here} here, at the export it was {'not recorded' if there is None else str(there)[:40]}"
        for what, there, here in pairs
        if there != here or here == UNKNOWN.name
    ]
    if manifest.made_for == TENSORRT_ALONE:
        found.append("a CPU computes its graph for TensorRT in float32")
    elif not multiplies_integers(manifest) and instruction_set() in BLOCKS_IN_FLOATS:
        found.append(f"with {instruction_set()} sums of weights in blocks depend on the number of threads")
    return found
