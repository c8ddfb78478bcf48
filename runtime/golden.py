"""Read the golden values of a bundle, check that they are complete, and cut them to an engine's bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transom.runtime.backends.base import Array
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, ShapeError
from transom.runtime.feeds import checked_feeds
from transom.runtime.golden_reference import BUNDLE, PYTORCH
from transom.runtime.graph_spec import EngineAxis
from transom.runtime.session import LoadedBundle

GOLDEN = "golden.safetensors"
GENERATION = "generation"  # the case that holds whole greedy generations

Sides = Mapping[str, Mapping[str, Array]]  # of one case: "input" and each side, tensor name -> array


def read_golden(bundle: Bundle) -> dict[str, dict[str, dict[str, Array]]]:
    """Read golden.safetensors: case -> "input" | "pytorch" | "bundle" | "simulated" -> tensor name -> array."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    if GOLDEN not in bundle.manifest.files:
        return {}
    try:
        tensors = parse(bundle.read(GOLDEN))
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"{GOLDEN} is not usable ({error}); export the bundle again.") from None
    cases: dict[str, dict[str, dict[str, Array]]] = {}
    for key, array in tensors.items():
        case, _, rest = key.partition("/")
        side, _, name = rest.partition("/")
        cases.setdefault(case, {"input": {}}).setdefault(side, {})[name] = array
    return cases


def require_complete(loaded: LoadedBundle, golden: Mapping[str, Sides]) -> frozenset[str]:
    """Return the sides that every case has.

    Raises BundleError where PyTorch's or the build's are missing, and where no case runs one of the bundle's graphs.
    """
    from transom.runtime.tasks.generator import Generator

    sides = frozenset.intersection(*(frozenset(arrays) for arrays in golden.values()))
    for needed in (PYTORCH, BUNDLE):
        if needed not in sides:
            raise BundleError(f"{GOLDEN}: a case has no outputs of the side {needed!r}; export the bundle again.")
    ran = {loaded.graph_for(arrays["input"]).name for name, arrays in golden.items() if name != GENERATION}
    if GENERATION in golden or (isinstance(loaded, Generator) and loaded.context == 1):  # which generates nothing
        ran |= {file.graph.name for file in loaded.manifest.graphs}  # a decoder, and the encoder that it reads
    missing = [file.graph.name for file in loaded.manifest.graphs if file.graph.name not in ran]
    if missing:
        raise BundleError(f"{GOLDEN}: no case runs the graph {missing[0]!r}; export the bundle again.")
    return sides


def cut_to_bounds(loaded: LoadedBundle, name: str, arrays: Sides) -> tuple[Sides | None, str]:
    """Return what the engine takes of a golden case, None for nothing, and why not all of it; "" where all.

    A generation is cut to the rows and steps that fit, any other case is left out.
    """
    if not any(isinstance(axis, EngineAxis) for axis in loaded.axes.values()):
        return arrays, ""
    if name != GENERATION:
        try:
            checked_feeds(loaded.graph_for(arrays["input"]), loaded.axes, arrays["input"])
        except ShapeError as error:
            return None, str(error)
        return arrays, ""
    return cut_generation(loaded, arrays)


def cut_generation(loaded: LoadedBundle, arrays: Sides) -> tuple[Sides | None, str]:
    """Cut a golden generation to the rows and steps that fit into the engine's rows and its context."""
    from transom.runtime.greedy_check import prompts_from_arrays
    from transom.runtime.tasks.generator import Generator

    given, tokens = arrays["input"], arrays[PYTORCH].get("tokens")
    if not isinstance(loaded, Generator) or not are_prompts(given) or tokens is None:
        return arrays, ""  # which is an error of its own
    prompts, axis = prompts_from_arrays(given), loaded.prompt_axis()
    used = [loaded.decoder_length(prompt) for prompt in prompts]
    rows = [
        row
        for row, prompt in enumerate(prompts)
        if (axis is None or len(prompt) <= loaded.max_size(axis)) and used[row] < loaded.context
    ]
    rows = rows[: loaded.max_size("B")]
    steps = min([tokens.shape[1], *(loaded.context - used[row] for row in rows)])
    if len(rows) < loaded.axes["B"].min:
        longest = "" if axis is None else f"{loaded.max_size(axis)} tokens and "
        return None, f"of its prompts {len(rows)} fit into {longest}a context of {loaded.context}"
    if (len(rows), steps) == tokens.shape:
        return arrays, ""
    cut = {
        side: {key: array[rows] if side == "input" else array[rows][:, :steps] for key, array in held.items()}
        for side, held in arrays.items()
    }
    return cut, f"{len(rows)} of {len(tokens)} rows and {steps} of {tokens.shape[1]} steps fit into the engine"


def is_generation(
    given: Mapping[str, Array], sides: Sequence[Mapping[str, Array]], reference: Mapping[str, Array]
) -> bool:
    """Return whether a golden generation has all arrays and they fit each other; PyTorch's are the first of ``sides``.

    ``reference`` is the side whose tokens are compared.
    """
    theirs = sides[0]
    needed = (
        (theirs, "tokens", "int64", 2),
        *((side, "logits", "float32", 3) for side in sides),
        (reference, "tokens", "int64", 2),
        (reference, "margins", "float32", 2),
    )
    for arrays, name, dtype, axes in needed:
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].ndim != axes:
            return False
    tokens, logits = theirs["tokens"], theirs["logits"]
    return (
        are_prompts(given)
        and 0 < len(given["prompts"]) == len(tokens) == len(logits)
        and 0 < logits.shape[1] <= tokens.shape[1]
        and tokens.shape == reference["tokens"].shape == reference["margins"].shape
        and all(side["logits"].shape == logits.shape for side in sides)
        and has_largest_logits(reference, logits.shape[2])
    )


def are_prompts(given: Mapping[str, Array]) -> bool:
    """Return whether arrays are what ``prompts_to_arrays`` makes: token ids, their lengths and images, or pixels."""
    prompts, lengths = given.get("prompts"), given.get("lengths")
    if prompts is None:
        return False
    if lengths is None:
        return prompts.dtype == np.float32 and prompts.ndim == 4
    return are_images(given, len(prompts)) and (
        prompts.dtype == lengths.dtype == np.int64
        and (prompts.ndim, lengths.ndim) == (2, 1)
        and 0 < len(prompts) == len(lengths)
        and 0 < int(lengths.min()) <= int(lengths.max()) <= prompts.shape[1]
    )


def are_images(given: Mapping[str, Array], rows: int) -> bool:
    """Return whether the images beside the tokens of ``rows`` prompts fit their numbers; prompts may have none."""
    images, pixels = given.get("images"), given.get("pixel_values")
    if images is None:
        return pixels is None
    if images.dtype != np.int64 or images.shape != (rows,) or int(images.min(initial=0)) < 0:
        return False
    if pixels is None:
        return not images.any()
    return (
        pixels.dtype == np.float32
        and pixels.ndim == 5
        and len(pixels) == rows
        and int(images.max(initial=0)) <= pixels.shape[1]
    )


def has_largest_logits(reference: Mapping[str, Array], vocabulary: int) -> bool:
    """Return whether the largest logits of each step fit the tokens; bundles of version 0.1.0 have none."""
    if "top_ids" not in reference and "top_logits" not in reference:
        return True
    ids, logits = reference.get("top_ids"), reference.get("top_logits")
    return (
        ids is not None
        and logits is not None
        and ids.dtype == np.int64
        and logits.dtype == np.float32
        and ids.shape == logits.shape
        and ids.ndim == 3
        and ids.shape[:2] == reference["tokens"].shape
        and ids.size > 0
        and 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
    )
