"""Windows over a map of tokens: their order, their cyclic shift, and what may attend to what inside one.

Swin (Liu et al., 2021, arXiv:2103.14030), section 3.2 and figure 4. Shape letters as in attention.py; M side of a
window, N = M * M tokens in it, W windows of a map, S tokens of a map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.models.patches import Size


@dataclass(frozen=True)
class Windows:
    """A map of tokens cut into square windows, padded at the bottom and on the right to whole ones.

    size    rows and columns of the map
    side    M
    shift   rows and columns by which the padded map is rolled up and to the left before it is cut; 0 for none
    """

    size: Size
    side: int
    shift: int = 0

    @property
    def padded(self) -> Size:
        """Rows and columns of whole windows."""
        return -(-self.size[0] // self.side) * self.side, -(-self.size[1] // self.side) * self.side

    @property
    def count(self) -> int:
        """W."""
        return self.padded[0] * self.padded[1] // self.side**2

    @property
    def tokens(self) -> int:
        """S."""
        return self.size[0] * self.size[1]

    @property
    def whole(self) -> bool:
        """Return whether the map is one window, with its tokens in their order."""
        return self.size == (self.side, self.side) and not self.shift

    def cut(self, values: Tensor) -> Tensor:
        """Cut a padded map of one number each (rows, columns) to (W, N)."""
        (rows, columns), M = self.padded, self.side
        return values.view(rows // M, M, columns // M, M).transpose(1, 2).reshape(-1, M * M)

    def order(self) -> Tensor:
        """Return the token at each place of the windows, int64 (W * N,); S, one past the last, where padding is."""
        places = torch.arange(self.tokens).view(self.size)
        rows, columns = self.padded[0] - self.size[0], self.padded[1] - self.size[1]
        padded = F.pad(places, (0, columns, 0, rows), value=self.tokens)
        return self.cut(padded.roll((-self.shift, -self.shift), (0, 1))).flatten()

    def places(self) -> Tensor:
        """Return the place in the windows of each token, int64 (S,): the inverse of ``order``."""
        return self.order().argsort(stable=True)[: self.tokens]

    def apart(self) -> Tensor:
        """Return which tokens of a window were no neighbours before the shift, bool (W, N, N): figure 4."""

        def region(length: int) -> Tensor:
            place = torch.arange(length)
            return (place >= length - self.side).long() + (place >= length - self.shift)

        rows, columns = map(region, self.padded)
        regions = self.cut(rows[:, None] * 3 + columns)  # (W, N)
        return regions[:, :, None] != regions[:, None, :]


def relative_index(side: int) -> Tensor:
    """Return the row of a table of (2M - 1)^2 offsets for each query and key of a window, int64 (N, N): section 3.2."""
    place = torch.arange(side * side)
    rows, columns = place // side, place % side
    down = rows[:, None] - rows + side - 1  # 0..2M - 2
    across = columns[:, None] - columns + side - 1
    return down * (2 * side - 1) + across
