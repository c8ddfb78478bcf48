"""Sizes and strides of the attention kernels' contiguous tensors, as formulas of B, S, T and the number of splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transom.export.plugins.kernel_spec import NO_MASK, Variant
from transom.runtime.errors import EngineError

ORDERS = ("bhsd", "bshd")
MASK_AXES = ("", "b", "h", "m", "bh", "bm", "hm", "bhm")
Formula = tuple[int, str]  # a factor and the sizes it is multiplied by: (64, "S") is 64 S; P is the number of splits


@dataclass(frozen=True)
class Layout:
    """Layout of the contiguous tensors that an engine passes.

    ``order`` is "bhsd" or "bshd", of queries, keys, values and output; ``mask`` names the axes that a mask has besides
    T, of b, h and m: "" is (1, 1, 1, T), "bm" is (B, 1, S, T). Scales are (B, H / G, T).
    """

    order: str = "bhsd"
    mask: str = "bhm"

    def __post_init__(self) -> None:
        if self.order not in ORDERS or self.mask not in MASK_AXES:
            raise EngineError(
                f"a layout of {self.order!r:.20} with a mask of {self.mask!r:.20}; "
                f"expected {' or '.join(ORDERS)}, and the mask's axes out of b, h and m, in this order."
            )

    def elements(self, variant: Variant) -> dict[str, Formula]:
        """Return the number of elements of every tensor."""
        H, KV, D = variant.heads, variant.heads // variant.groups, variant.size
        shared = dict.fromkeys(("key", "value"), (KV * D, "BT"))
        shared |= dict.fromkeys(("key_scale", "value_scale"), (KV, "BT"))
        axes = "".join({"b": "B", "m": "S"}.get(axis, "") for axis in self.mask)
        return {
            **shared,
            "query": (H * D, "BS"),
            "lengths": (1, "B"),
            "mask": (H if "h" in self.mask else 1, axes + "T"),
            "bias": (H, "ST"),
            "output": (H * D, "BS"),
            "split_ml": (2 * H, "PBS"),
            "split_acc": (H * D, "PBS"),
        }

    def strides(self, variant: Variant, *, combine: bool = False) -> dict[str, Formula]:
        """Return every integer argument.

        With split-KV the attention kernel writes no output; the ``combine`` kernel does, and gets the number of splits.
        """
        H, KV, D = variant.heads, variant.heads // variant.groups, variant.size
        heads_first = self.order == "bhsd"

        def strides_of(name: str, heads: int, axis: str) -> dict[str, Formula]:
            rows = "m" if axis == "S" else "n"
            within = (D, axis) if heads_first else (D, "")
            return {
                f"{name}_b": (heads * D, axis),
                f"{name}_h": within,
                f"{name}_{rows}": (D, "") if heads_first else (heads * D, ""),
            }

        queries, heads = ("S" if "m" in self.mask else ""), (H if "h" in self.mask else 1)
        none: Formula = (0, "")
        strides = {"S": (1, "S"), "T": (1, "T"), "ROWS": (H, "BS")} | ({"SPLITS": (1, "P")} if combine else {})
        strides |= {
            **strides_of("q", H, "S"),
            **strides_of("k", KV, "T"),
            **strides_of("v", KV, "T"),
            **strides_of("o", H, "S"),
        }
        strides |= {"s_b": (KV, "T"), "s_h": (1, "T"), "s_n": (1, "")}
        strides |= {"m_b": (heads, queries + "T") if "b" in self.mask else none}
        strides |= {"m_h": (1, queries + "T") if "h" in self.mask else none}
        strides |= {"m_m": (1, "T") if "m" in self.mask else none, "m_n": (1, "")}
        strides |= {"b_h": (1, "ST"), "b_m": (1, "T"), "b_n": (1, "")}
        absent = {"s": not variant.int8, "m": variant.mask == NO_MASK, "b": not variant.bias}
        absent["o"] = variant.split and not combine
        return {
            name: none if "_" in name and absent.get(name[0]) else strides[name]
            for name in strides
            if variant.split or name != "ROWS"
        }


def product(formula: Formula, sizes: Mapping[str, Any]) -> Any:
    """Return the value of a formula: (64, "S") is 64 S.

    A size may be an engine builder's symbol. It stands in front: a symbol can be multiplied by a number, not the number
    by a symbol.
    """
    factor, letters = formula
    value = sizes[letters[0]] * factor
    for letter in letters[1:]:
        value = value * sizes[letter]
    return value
