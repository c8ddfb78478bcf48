"""Apply SentencePiece's precompiled charsmap, the normaliser's rules that replace bytes of a text by others.

The format is that of SentencePiece's ``normalizer.cc``: the size of a trie in bytes (uint32, little-endian),
the trie (a double array of Darts-clone), and the replacements, each ended by a zero byte. The charsmap stays
as compact as it comes: nmt_nfkc has 225,276 rules in 300 kB.
"""

from __future__ import annotations

import struct

from transom.runtime.errors import BundleError

MAX_REPLACEMENT = 256  # bytes; Unicode's compatibility forms have 33. More could fill the memory


class Charsmap:
    """The trie and the replacements; the longest matching rule applies. A unit of the trie is 32 bits:

    bits 0..7, 31   the byte of the edge to this unit; where bit 31 is set the unit ends a rule instead, and
                    bits 0..30 are the offset of its replacement
    bit 8           whether a rule ends here; child 0 then has the offset of its replacement
    bits 9..31      the offset of the children: child c of the unit at i is at i xor offset xor c

    Every access is checked against the size of the trie. Raises BundleError where the parts do not fit together.
    """

    def __init__(self, data: bytes) -> None:
        self._units: tuple[int, ...] = ()
        self._replacements = b""
        if data:
            size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
            if size == 0 or size % 4 or size > len(data) - 4:
                raise BundleError(f"the charsmap has {len(data)} bytes and a trie of {size}. Export the bundle again.")
            self._units = struct.unpack_from(f"<{size // 4}I", data, 4)
            self._replacements = data[4 + size :]
            longest = max(map(len, self._replacements.split(b"\0")))
            if longest > MAX_REPLACEMENT:
                raise BundleError(
                    f"the charsmap has a replacement of {longest} bytes, expected {MAX_REPLACEMENT} at most. Export "
                    "the bundle again."
                )
        self._starts = [
            self._child(children_offset(self._units[0]), byte) is not None if data else False for byte in range(256)
        ]

    def rewrite(self, text: bytes, start: int) -> tuple[bytes, int] | None:
        """Return the replacement of the bytes of ``text`` at ``start``, and how many they are; None without a rule."""
        if not self._starts[text[start]]:
            return None
        found = None
        node = children_offset(self._units[0])
        for position in range(start, len(text)):
            child = self._child(node, text[position])
            if child is None:
                break
            unit = self._units[child]
            node = child ^ children_offset(unit)
            if unit >> 8 & 1 and node < len(self._units):
                found = self._units[node] & 0x7FFFFFFF, position + 1 - start
        if found is None:
            return None
        place, length = found
        end = self._replacements.find(b"\0", place)
        return self._replacements[place : end if end >= 0 else None], length

    def _child(self, node: int, byte: int) -> int | None:
        child = node ^ byte
        if child < len(self._units) and self._units[child] & 0x800000FF == byte:
            return child
        return None


def children_offset(unit: int) -> int:
    """Return the offset of a unit's children; where bit 9 is set it is in steps of 256."""
    return (unit >> 10) << ((unit & 1 << 9) >> 6)
