"""One kernel for the attention that TensorRT refuses: flash attention, forward, in Triton.

O = softmax(scale Q K^T + bias, where it may look) V, for Q (B, H, S, D) and K, V (B, H / G, T, D), D up to 256.

- Each program has BLOCK_M queries of one head and walks the keys by BLOCK_N. The largest score so far and the sum of
  exponentials are kept per query and corrected as they grow, all in FP32 (Milakov and Gimelshein 2018, "Online
  normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2": queries outside,
  one division at the end).
- A step of decoding has one query and a long cache: the keys are cut into parts, each a program of its own, and a
  second kernel puts the parts together by their largest scores and sums (Dao et al. 2023, "Flash-Decoding").
- What a query may look at: keys before its row's length; with CAUSAL those up to length - S + i, the lower right
  corner; and what a boolean mask or an additive one leaves. A query that may look at nothing gives zeros.
- With INT8 the cache holds integers, and a scale per head and position multiplies the scores and the weights instead of
  the keys and values: the products are of the dtype of Q.

Everything that a call does not have is a constant of the compilation and costs nothing. WIDEN is for Triton's
interpreter, which has no products of BF16: the operands are rounded all the same, and multiplied in FP32.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_SIZE = 256  # of a head
NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2


@triton.jit
def _attend(
    query, key, value, mask, bias, lengths, key_scale, value_scale,
    query_base, key_base, value_base, mask_base, bias_base, scale_base,
    q_m, k_n, v_n, m_m, m_n, b_m, b_n,
    start, end, length, first, S, D, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(largest score in base 2, sum of exponentials, weighted values) of BLOCK_M queries over keys start..end."""
    rows, columns, depth = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside, deep = rows < S, depth < D
    q = tl.load(
        query + query_base + rows[:, None] * q_m + depth[None, :], mask=inside[:, None] & deep[None, :], other=0.0
    )
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(start, end, BLOCK_N):
        keys = at + columns
        there = keys < end
        k = tl.load(key + key_base + keys[None, :] * k_n + depth[:, None], mask=there[None, :] & deep[:, None], other=0)
        k = k.to(q.dtype)
        if WIDEN:
            scores = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * scale
        else:
            scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if INT8:
            scores *= tl.load(key_scale + scale_base + keys, mask=there, other=0.0)[None, :]
        seen = there[None, :] & inside[:, None]
        if CAUSAL:
            seen = seen & (keys[None, :] <= (length - S + rows)[:, None])
        if MASK != 0:
            places = mask + mask_base + rows[:, None] * m_m + keys[None, :] * m_n
            if MASK == 1:
                seen = seen & (tl.load(places, mask=seen, other=0) != 0)
            else:
                scores += tl.load(places, mask=seen, other=0.0).to(tl.float32)
        if BIAS:
            places = bias + bias_base + rows[:, None] * b_m + keys[None, :] * b_n
            scores += tl.load(places, mask=seen, other=0.0).to(tl.float32)
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))  # log2(e): exp2 is one instruction
        larger = tl.maximum(largest, tl.max(scores, 1))
        anchor = tl.where(larger == float("-inf"), 0.0, larger)  # nothing seen yet: -inf - -inf would be NaN
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(largest - anchor)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            value + value_base + keys[:, None] * v_n + depth[None, :], mask=there[:, None] & deep[None, :], other=0
        )
        if INT8:
            weights *= tl.load(value_scale + scale_base + keys, mask=there, other=0.0)[None, :]
        weights, v = weights.to(q.dtype), v.to(q.dtype)
        if WIDEN:
            added = tl.dot(weights.to(tl.float32), v.to(tl.float32), input_precision=PRECISION)
        else:
            added = tl.dot(weights, v, input_precision=PRECISION)
        mixed = mixed * shrink[:, None] + added
        largest = larger
    return largest, total, mixed


@triton.jit
def attention(
    query, key, value, mask, bias, lengths, key_scale, value_scale, output,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_m, m_n, b_h, b_m, b_n, s_b, s_h, o_b, o_h, o_m,
    H, GROUP, S, T, D, scale,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(S / BLOCK_M), B * H). Strides are in elements, of axes B, H, queries m and keys n; D is contiguous."""
    first, row = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    b, h = (row // H).to(tl.int64), (row % H).to(tl.int64)
    shared = h // GROUP  # the head of keys and values
    length = tl.load(lengths + b).to(tl.int32) if LENGTHS else T
    length = tl.minimum(length, T)
    end = tl.minimum(length, tl.maximum(length - S + first + BLOCK_M, 0)) if CAUSAL else length
    _, total, mixed = _attend(
        query, key, value, mask, bias, lengths, key_scale, value_scale,
        b * q_b + h * q_h, b * k_b + shared * k_h, b * v_b + shared * v_h, b * m_b + h * m_h, h * b_h,
        b * s_b + shared * s_h, q_m, k_n, v_n, m_m, m_n, b_m, b_n, 0, end, length, first, S, D, scale,
        CAUSAL, MASK, BIAS, INT8, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN,
    )  # fmt: skip
    result = tl.where(total[:, None] > 0, mixed / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    rows, depth = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    places = output + b * o_b + h * o_h + rows[:, None] * o_m + depth[None, :]
    tl.store(places, result.to(output.dtype.element_ty), mask=(rows < S)[:, None] & (depth < D)[None, :])


@triton.jit
def attention_part(
    query, key, value, mask, bias, lengths, key_scale, value_scale, sums, parts,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_m, m_n, b_h, b_m, b_n, s_b, s_h,
    H, GROUP, S, T, D, scale, EACH,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (parts, B * H): EACH keys for at most BLOCK_M queries.

    ``sums`` FP32 (B * H, parts, 2, BLOCK_M) gets largest scores and sums, ``parts`` FP32
    (B * H, parts, BLOCK_M, BLOCK_D) the weighted values, not divided.
    """
    part, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // H).to(tl.int64), (row % H).to(tl.int64)
    shared = h // GROUP
    length = tl.load(lengths + b).to(tl.int32) if LENGTHS else T
    length = tl.minimum(length, T)
    end = tl.minimum(length, (part + 1) * EACH)
    largest, total, mixed = _attend(
        query, key, value, mask, bias, lengths, key_scale, value_scale,
        b * q_b + h * q_h, b * k_b + shared * k_h, b * v_b + shared * v_h, b * m_b + h * m_h, h * b_h,
        b * s_b + shared * s_h, q_m, k_n, v_n, m_m, m_n, b_m, b_n, part * EACH, end, length, 0, S, D, scale,
        CAUSAL, MASK, BIAS, INT8, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN,
    )  # fmt: skip
    rows, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    place = row.to(tl.int64) * tl.num_programs(0) + part
    tl.store(sums + place * 2 * BLOCK_M + rows, largest)
    tl.store(sums + place * 2 * BLOCK_M + BLOCK_M + rows, total)
    tl.store(parts + place * BLOCK_M * BLOCK_D + rows[:, None] * BLOCK_D + depth[None, :], mixed)


@triton.jit
def attention_whole(
    sums, parts, output, o_b, o_h, o_m, H, S, D, COUNT,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (B * H,): the COUNT parts of a row put together."""
    row = tl.program_id(0)
    b, h = (row // H).to(tl.int64), (row % H).to(tl.int64)
    rows, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in range(COUNT):
        place = row.to(tl.int64) * COUNT + part
        theirs = tl.load(sums + place * 2 * BLOCK_M + rows)
        larger = tl.maximum(largest, theirs)
        anchor = tl.where(larger == float("-inf"), 0.0, larger)
        ours, other = tl.exp2(largest - anchor), tl.exp2(theirs - anchor)
        total = total * ours + tl.load(sums + place * 2 * BLOCK_M + BLOCK_M + rows) * other
        values = tl.load(parts + place * BLOCK_M * BLOCK_D + rows[:, None] * BLOCK_D + depth[None, :])
        mixed = mixed * ours[:, None] + values * other[:, None]
        largest = larger
    result = tl.where(total[:, None] > 0, mixed / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    places = output + b * o_b + h * o_h + rows[:, None] * o_m + depth[None, :]
    tl.store(places, result.to(output.dtype.element_ty), mask=(rows < S)[:, None] & (depth < D)[None, :])
