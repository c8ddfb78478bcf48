"""Attention as a superset of convolution: Cordonnier, Loukas and Jaggi, "On the Relationship between Self-Attention and
Convolutional Layers" (2020), https://arxiv.org/abs/1911.03584.

Theorem 1: multi-head attention with K^2 heads and a relative position encoding expresses any K x K convolution, each
head attending to one tap. Lemma 2: the quadratic encoding does so in the limit of sharpness alpha. In floating point it
is exact at a finite alpha: see SHARPNESS.

Shape letters, in the code and as axis names in the ONNX graph:
    B batch   H rows   W columns   N pixels, N = H * W   T pixels with the padding   C channels   A heads
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.runtime.errors import InputError

# A pixel at distance d from the head's centre scores -alpha d^2, the centre itself exactly 0, and all others at most
# -alpha. exp(-1024) is zero in every format, for float64 ends at exp(-746), float32 at exp(-104), bfloat16 at exp(-93),
# float16 at exp(-18). So the softmax is one-hot, not nearly so. Scores that overflow float16 are -inf, which is zero
# as well.
SHARPNESS = 1024.0


class QuadraticAttention(nn.Module):
    """Multi-head self-attention over the pixels of an image, with the quadratic relative encoding of section 3.

    The score of query q and key k in head h, delta = k - q, has a part of the content and one of the position
    (equations 8 and 9):

        (W_qry x_q) (W_key x_k) / sqrt(C) - alpha_h |delta - center_h|^2

    which is the paper's v_h r_delta of v_h = -alpha_h (1, -2 center_h), r_delta = (|delta|^2, delta), less
    alpha_h |center_h|^2: the same for all keys of a head, so the softmax does not see it. ``padding`` rows and columns
    of zeros surround the keys. Without them a head whose centre lies outside of the image attends to the pixel that is
    nearest to it; a convolution sees zeros there (section 3, "Padding").
    """

    center: Tensor
    alpha: Tensor

    def __init__(self, in_channels: int, out_channels: int, heads: int, padding: int = 0) -> None:
        super().__init__()
        self.heads, self.padding = heads, padding
        self.center = nn.Parameter(torch.zeros(heads, 2))  # rows and columns from the query
        self.alpha = nn.Parameter(torch.ones(heads))
        self.query = nn.Linear(in_channels, heads * in_channels, bias=False)
        self.key = nn.Linear(in_channels, heads * in_channels, bias=False)
        self.value = nn.Linear(in_channels, heads * in_channels, bias=False)
        self.output = nn.Linear(heads * in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to (B, out_channels, H, W)."""
        _, C, H, W = x.shape
        queries = x.flatten(2).transpose(1, 2)  # (B, N, C)
        keys = F.pad(x, [self.padding] * 4).flatten(2).transpose(1, 2)  # (B, T, C)
        q, k, v = (
            project(pixels).unflatten(2, (self.heads, C)).transpose(1, 2)
            for project, pixels in ((self.query, queries), (self.key, keys), (self.value, keys))
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.position_scores(H, W))  # (B, A, N, C)
        # A copy: the exporter of torch 2.13 cannot prove that heads join in place where N is a product of two axes
        joined = y.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)  # (B, N, A * C)
        y = self.output(joined)  # (B, N, out_channels)
        return y.transpose(1, 2).unflatten(2, (H, W))  # type: ignore[no-any-return]

    def position_scores(self, H: int, W: int) -> Tensor:
        """Return -alpha |delta - center|^2 of every head, query and key: (1, A, N, T).

        Subtracted as integers: a half has small differences exactly, but not the rows of a large image. So an integral
        centre scores exactly 0, whatever is rounded elsewhere.
        """
        p = self.padding
        queries, keys = pixel_grid(0, H, 0, W, self.center), pixel_grid(-p, H + p, -p, W + p, self.center)
        delta = (keys[None] - queries[:, None]).to(self.center.dtype)  # (N, T, 2)
        squared = (delta - self.center[:, None, None]).square().sum(-1)  # (A, N, T)
        return (-self.alpha[:, None, None] * squared)[None]


def pixel_grid(top: int, bottom: int, left: int, right: int, like: Tensor) -> Tensor:
    """Return the row and column of every pixel of a rectangle, row by row: int64 (N, 2), on the device of ``like``."""
    rows, columns = torch.arange(top, bottom, device=like.device), torch.arange(left, right, device=like.device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)


def attention_from_convolution(convolution: nn.Conv2d, alpha: float = SHARPNESS) -> QuadraticAttention:
    """Return the attention that computes ``convolution``: Theorem 1, with Lemma 2's encoding.

    K x K heads, the head of tap (i, j) centred on dilation * (i - K // 2, j - K // 2); W_qry = W_key = 0, for the
    content has no say; W_val the identity, so that a head's output is its shifted image, bit for bit; and the taps in
    W_out. (The proof has the taps in W_val, and so as many output channels as a head has; here any number.) Groups are
    zeros in W_out. What is left to rounding is the order of a sum: section "What exact means" of
    docs/attention_as_convolution.md.

    Raises InputError for a convolution whose output is not of its input's height and width, or that pads with other
    than zeros: an even kernel, a stride; and for other modules, a transposed convolution too.
    """
    padding = require_same_size(convolution)
    C, heads = convolution.in_channels, convolution.kernel_size[0] * convolution.kernel_size[1]
    K, dilation = convolution.kernel_size[0], convolution.dilation[0]
    attention = QuadraticAttention(C, convolution.out_channels, heads, padding).to(convolution.weight)
    taps = ungrouped(convolution.weight.detach(), convolution.groups)  # (out, C, K, K)
    around = range(-(K // 2), K // 2 + 1)
    centers = [[dilation * row, dilation * column] for row in around for column in around]
    with torch.no_grad():
        attention.center.copy_(torch.tensor(centers))
        attention.alpha.fill_(alpha)
        attention.query.weight.zero_()
        attention.key.weight.zero_()
        attention.value.weight.copy_(torch.eye(C).repeat(heads, 1))
        attention.output.weight.copy_(taps.permute(0, 2, 3, 1).flatten(1))  # (out, A * C), heads first
        bias = convolution.bias
        attention.output.bias.copy_(torch.zeros(()) if bias is None else bias)
    return attention.eval()


def require_same_size(convolution: nn.Conv2d) -> int:
    """Return the padding of a convolution that keeps height and width. Raises InputError for any other."""
    if not isinstance(convolution, nn.Conv2d):  # a ConvTranspose2d has all that is read below, and other weights
        raise InputError(f"the convolution is {convolution}; expected a torch.nn.Conv2d. Hand over one.")
    (rows, columns), dilation = convolution.kernel_size, convolution.dilation[0]
    padding = dilation * (rows // 2)
    square = rows == columns and rows % 2 == 1 and convolution.stride == (1, 1)
    even = convolution.dilation == (dilation, dilation) and convolution.padding in ("same", (padding, padding))
    if not square or not even or convolution.padding_mode != "zeros":
        raise InputError(
            f"the convolution is {convolution}; expected an odd square kernel, stride 1, and padding=dilation * "
            "(kernel_size // 2) with zeros. Pad, crop or subsample its input and output instead."
        )
    return padding


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """Return the weight (out, C / groups, K, K) of a grouped convolution as that of a plain one: (out, C, K, K)."""
    if groups == 1:
        return weight
    out, within, *kernel = weight.shape
    each = torch.arange(groups)
    full = weight.new_zeros(groups, out // groups, groups, within, *kernel)
    full[each, :, each] = weight.reshape(groups, out // groups, within, *kernel)
    return full.reshape(out, groups * within, *kernel)
