"""Find out whether ONNX Runtime adds up 8-bit products exactly on this processor, and make it do so.

x86 without VNNI multiplies U8 x S8 by ``vpmaddubsw``, which adds two products in 16 bits: 2 x 255 x 127 does not fit
and becomes 32767. ``session.x64quantprecision`` (onnxruntime_session_options_config_keys.h) has ONNX Runtime make
U8 x U8 of it, which adds in 32 bits. Whether a processor needs that, and whether it helps, one product with known sums
decides: what the system says of the processor may be of another one, under emulation or in a virtual machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from transom.runtime.backends.known_sum import known_product
from transom.runtime.backends.ort_library import FATAL, onnxruntime
from transom.runtime.errors import BackendError, one_line
from transom.runtime.manifest_sections import EXACT, SATURATED

U8U8 = "session.x64quantprecision"


@dataclass(frozen=True)
class IntegerSums:
    """Sums of 8-bit products on this processor: ``kind`` is EXACT or SATURATED, ``way`` the short name of how.

    ``entries`` are the session's configuration that this takes; ``means`` says it in words.
    """

    way: str
    kind: str
    means: str
    entries: Mapping[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return self.kind == EXACT

    @property
    def saturates_alone(self) -> bool:
        """Return whether U8 x S8 saturates here unless something is done about it."""
        return not self.exact or bool(self.entries)


NATIVE = IntegerSums("native", EXACT, "exact as the processor multiplies")
WIDENED = IntegerSums("u8u8", EXACT, f"exact by {U8U8}, because U8 x S8 saturates here", {U8U8: "1"})
LOST = IntegerSums(
    "saturating", SATURATED, f"wrong: pairs of products saturate at 16 bits, and {U8U8} has no effect here"
)


@cache
def integer_sums() -> IntegerSums:
    """Return how sums come out in this process: measured at the first call, some milliseconds.

    Raises BackendError where ONNX Runtime cannot run the product.
    """
    return next((way for way in (NATIVE, WIDENED) if sums_right(way.entries)), LOST)


def sums_right(entries: Mapping[str, str]) -> bool:
    """Return whether a session with ``entries`` gives the known sums, of a single row and of several."""
    library = onnxruntime()
    options = library.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for key, setting in entries.items():
        options.add_session_config_entry(key, setting)
    model, x, expected = known_product()
    try:
        session = library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found = [session.run(["y"], {"x": rows})[0] for rows in (x[:1], x)]
    except Exception as error:  # the library raises bare RuntimeError and its own types alike
        raise BackendError(
            f"onnxruntime {library.__version__} cannot run an 8-bit product ({one_line(error)}). "
            "Install it again: `pip install --force-reinstall onnxruntime`."
        ) from None
    return np.array_equal(found[0], expected[:1]) and np.array_equal(found[1], expected)
