"""One kernel for the attention that TensorRT refuses: flash attention, forward, in Triton.

O = softmax(scale Q K^T + bias + mask, where a query may look) V, for Q (B, H, S, D) and K, V (B, H / GROUP, T, D) in
FP32, FP16 or BF16, D of 1 to 256. Sums are FP32; "ieee" multiplies FP32 as FP32, "tf32" on tensor cores.

- A program has BLOCK_M queries and walks the keys in blocks of BLOCK_N. The largest score so far and the sum of
  exponentials are kept per query and corrected as they grow (Milakov and Gimelshein 2018, "Online normalizer
  calculation for softmax"; Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2": queries outside, one
  division at the end, comparisons in the blocks of keys alone that end or cross the diagonal).
- A step of decoding has few queries and a long cache: with PARTS the keys are cut into parts, each a program, and
  ``attention_whole`` puts the parts together by their largest scores and sums (Dao et al. 2023, "Flash-Decoding").
  There the queries of all heads that share keys are rows of one program, so that a cache is read once.
- What a query may look at: keys before its row's length; with CAUSAL those up to length - S + i, the lower right
  corner; and what a boolean mask leaves. A query that may look at nothing gives zeros.
- With INT8 the cache holds integers, and a scale per head and position. A key's scale multiplies its column of scores.
  A value's is multiplied in before the product: in FP16, weights times a small scale would vanish.

Everything that a call does not have is a constant of the compilation and costs nothing: an absent tensor is None.
Arguments are ordered as TensorRT's plugins want them: inputs, integers, outputs. Offsets that can pass 2^31 elements
are 64-bit.

WIDEN is for Triton's interpreter, which has no products of BF16: operands are rounded all the same, and multiplied in
FP32.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2
LOG2_E = 1.4426950408889634


@triton.jit
def attention(
    query, key, value, key_scale, value_scale, lengths, mask, bias,
    S, T, ROWS, q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, s_b, s_h, s_n, m_b, m_h, m_m, m_n, b_h, b_m, b_n,
    o_b, o_h, o_m,
    output, sums, parts,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, UNIT: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, INT8: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries * heads * B, parts of the keys).

    Strides are in elements, of axes b, h, queries m, keys n. A head's axis is contiguous, of Q, K, V and O. Scores are
    kept in units of 1 / UNIT: exp(x) is exp2(UNIT * x). With PARTS the outputs are ``sums`` FP32 (parts, 2, ROWS), the
    largest scores and the sums, and ``parts`` FP32 (parts, ROWS, D), values not yet divided, of ROWS = B * H * S.
    """
    count = S * GROUP if PARTS else S  # rows that share keys
    heads: tl.constexpr = H // GROUP if PARTS else H
    tiles = tl.cdiv(count, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest walks start first
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < count
    m = rows % S if PARTS else rows
    head = h * GROUP + rows // S if PARTS else h
    shared = h if PARTS else h // GROUP  # the head of keys and values
    columns, depth = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    deep = depth < D

    told = T  # may be more than there is room for: causality counts from it all the same
    if lengths is not None:
        told = tl.maximum(tl.load(lengths + b).to(tl.int32), 0)
    length = tl.minimum(told, T)
    last = told - S + m  # the last key that a query sees
    begin, end = 0, length
    checked = length  # from here on, keys are compared
    if CAUSAL:
        checked = told - S + 1 if PARTS else told - S + tile * BLOCK_M + 1
        checked = tl.maximum(checked, 0)
        if not PARTS:
            end = tl.minimum(length, tl.maximum(told - S + (tile + 1) * BLOCK_M, 0))
    if PARTS:
        each = tl.cdiv(tl.cdiv(length, tl.num_programs(1)), BLOCK_N) * BLOCK_N
        begin = tl.program_id(1) * each
        end = tl.minimum(end, begin + each)
    checked = tl.maximum(tl.minimum(checked, end) // BLOCK_N * BLOCK_N, begin)

    q_rows = query + b * q_b + head * q_h + m.to(tl.int64) * q_m
    q = tl.load(q_rows[:, None] + depth[None, :], mask=there[:, None] & deep[None, :], other=0.0)
    first = tl.cast(begin, tl.int64) if PARTS else 0
    k_at = key + b * k_b + shared * k_h + first * k_n
    v_at = value + b * v_b + shared * v_h + first * v_n
    if INT8:
        ks_at = key_scale + b * s_b + shared * s_h + first * s_n
        vs_at = value_scale + b * s_b + shared * s_h + first * s_n
    if MASK != 0:
        m_at = mask + b * m_b + head * m_h + m.to(tl.int64) * m_m + first * m_n
    if bias is not None:
        b_at = bias + head * b_h + m.to(tl.int64) * b_m + first * b_n

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for compared in tl.static_range(2):  # blocks that every query sees whole, and then the others
        low = checked if compared else begin
        high = end if compared else checked
        for at in range(low, high, BLOCK_N):
            near = at + columns < end
            k_places = k_at + depth[:, None] + columns[None, :] * k_n
            v_places = v_at + depth[None, :] + columns[:, None] * v_n
            if compared:
                k = tl.load(k_places, mask=near[None, :] & deep[:, None], other=0)
                v = tl.load(v_places, mask=near[:, None] & deep[None, :], other=0)
            elif BLOCK_D != D:
                k = tl.load(k_places, mask=deep[:, None], other=0)
                v = tl.load(v_places, mask=deep[None, :], other=0)
            else:
                k = tl.load(k_places)
                v = tl.load(v_places)
            if WIDEN:
                scores = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * SCALE
            else:
                scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * SCALE
            if INT8:
                k_scales = tl.load(ks_at + columns * s_n, mask=near, other=0.0)
                v_scales = tl.load(vs_at + columns * s_n, mask=near, other=0.0)
                scores = scores * k_scales[None, :]
                v = v.to(tl.float32) * v_scales[:, None]
            v = v.to(q.dtype)
            if MASK != 0:
                seen = tl.load(m_at[:, None] + columns[None, :] * m_n, mask=there[:, None] & near[None, :], other=0)
                scores = scores + seen.to(tl.float32) if MASK == 2 else tl.where(seen != 0, scores, float("-inf"))
            if bias is not None:
                added = tl.load(b_at[:, None] + columns[None, :] * b_n, mask=there[:, None] & near[None, :], other=0.0)
                scores = scores + added.to(tl.float32)
            if compared:
                visible = near[None, :] & (at + columns[None, :] <= last[:, None]) if CAUSAL else near[None, :]
                scores = tl.where(visible, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, 1))
            anchor = tl.where(larger == float("-inf"), 0.0, larger)  # nothing seen yet: -inf - -inf would be NaN
            weights = tl.exp2((scores - anchor[:, None]) * UNIT)
            shrink = tl.exp2((largest - anchor) * UNIT)
            total = total * shrink + tl.sum(weights, 1)
            weights = weights.to(q.dtype)
            mixed = mixed * shrink[:, None]
            if WIDEN:
                mixed = tl.dot(weights.to(tl.float32), v.to(tl.float32), mixed, input_precision=PRECISION)
            else:
                mixed = tl.dot(weights, v, mixed, input_precision=PRECISION)
            largest = larger
            k_at += BLOCK_N * k_n
            v_at += BLOCK_N * v_n
            if INT8:
                ks_at += BLOCK_N * s_n
                vs_at += BLOCK_N * s_n
            if MASK != 0:
                m_at += BLOCK_N * m_n
            if bias is not None:
                b_at += BLOCK_N * b_n

    stored = there[:, None] & deep[None, :]
    if PARTS:
        part = tl.program_id(1).to(tl.int64)
        place = (b * H + head) * S + m
        tl.store(sums + part * 2 * ROWS + place, largest, mask=there)
        tl.store(sums + (part * 2 + 1) * ROWS + place, total, mask=there)
        tl.store(parts + (part * ROWS + place)[:, None] * D + depth[None, :], mixed, mask=stored)
    else:
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]  # no key, no values: zeros
        o_rows = output + b * o_b + head * o_h + m.to(tl.int64) * o_m
        tl.store(o_rows[:, None] + depth[None, :], result.to(output.dtype.element_ty), mask=stored)


@triton.jit
def attention_whole(
    sums, parts,
    S, ROWS, COUNT, o_b, o_h, o_m,
    output,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (ROWS,): the COUNT parts of one query put together."""
    row = tl.program_id(0).to(tl.int64)
    depth = tl.arange(0, BLOCK_D)
    deep = depth < D
    largest = tl.full((1,), float("-inf"), tl.float32)
    for part in range(COUNT):
        largest = tl.maximum(largest, tl.load(sums + part * 2 * ROWS.to(tl.int64) + row))
    anchor = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(COUNT):
        at = sums + part * 2 * ROWS.to(tl.int64) + row
        share = tl.exp2((tl.load(at) - anchor) * UNIT)
        total += share * tl.load(at + ROWS)
        mixed += share * tl.load(parts + (part * ROWS.to(tl.int64) + row) * D + depth, mask=deep, other=0.0)
    result = mixed / tl.where(total > 0, total, 1.0)
    b, h, m = row // S // H, row // S % H, row % S
    tl.store(output + b * o_b + h * o_h + m * o_m + depth, result.to(output.dtype.element_ty), mask=deep)
