"""Flash attention in Triton: the fused kernel for the attention that TensorRT has none of. Forward only.

O = softmax(scale Q K^T + bias + mask) V, for Q (B, H, S, D) and K, V (B, H / GROUP, T, D) in FP32, FP16 or BF16, D of
1 to 256. The accumulator is FP32; "ieee" multiplies FP32 as FP32, "tf32" on tensor cores.

- A program has BLOCK_M queries and loops over the keys in blocks of BLOCK_N. The running max ``m_i`` and the normaliser
  ``l_i`` are kept per query, and the accumulator ``acc`` is rescaled by ``alpha`` as they grow (Milakov and Gimelshein
  2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2":
  queries outside, one division at the end, comparisons only in the blocks of keys that end or cross the diagonal).
- Split-KV, for decoding, which has few queries and a long cache: with SPLIT_KV the keys are divided into splits, each a
  program, and ``attention_combine`` combines them by their ``m_i`` and ``l_i`` (Dao et al. 2023, "Flash-Decoding").
  There the queries of all heads that share keys are rows of one program, so that a cache is read once.
- Visible keys: those before the row's length; with CAUSAL those up to length - S + i, the lower right corner; and those
  that a boolean mask allows. A query with no visible key gives zeros.
- With INT8 the cache holds integers, and a scale per head and position. A key's scale multiplies its column of scores.
  A value's is multiplied in before the product: in FP16, weights times a small scale would vanish.

What a call does not have is a constant of the compilation and costs nothing: an absent tensor is None. Arguments are
ordered as TensorRT's plugins want them: inputs, integers, outputs. Offsets that can pass 2^31 elements are 64-bit.

WIDEN is for Triton's interpreter, which has no products of BF16: operands are rounded all the same, and multiplied in
FP32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attention(
    query, key, value, key_scale, value_scale, lengths, mask, bias,
    S, T, ROWS, q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, s_b, s_h, s_n, m_b, m_h, m_m, m_n, b_h, b_m, b_n,
    o_b, o_h, o_m,
    output, split_ml, split_acc,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, UNIT: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, INT8: tl.constexpr, SPLIT_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute one attention. Grid (tiles of queries * heads * B, splits of the keys).

    Strides are in elements, of axes b, h, queries m, keys n. A head's axis is contiguous, of Q, K, V and O. Scores are
    in units of 1 / UNIT: exp(x) is exp2(UNIT * x). With SPLIT_KV the outputs are ``split_ml`` FP32 (splits, 2, ROWS),
    ``m_i`` and ``l_i`` of each split, and ``split_acc`` FP32 (splits, ROWS, D), accumulators that are not yet divided,
    of ROWS = B * H * S.
    """
    row_count = S * GROUP if SPLIT_KV else S  # rows that share keys
    heads: tl.constexpr = H // GROUP if SPLIT_KV else H
    tiles = tl.cdiv(row_count, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # those with the most keys start first
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = offs_m < row_count
    m = offs_m % S if SPLIT_KV else offs_m
    head = h * GROUP + offs_m // S if SPLIT_KV else h
    kv_head = h if SPLIT_KV else h // GROUP  # the head of keys and values
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    dim_valid = offs_d < D

    kv_len = T  # may exceed the buffer: causality counts from it all the same
    if lengths is not None:
        kv_len = tl.maximum(tl.load(lengths + b).to(tl.int32), 0)
    kv_end = tl.minimum(kv_len, T)
    last_key = kv_len - S + m  # the last visible key of each query
    split_begin, split_end = 0, kv_end
    masked_from = kv_end  # from this key on, blocks are masked
    if CAUSAL:
        masked_from = kv_len - S + 1 if SPLIT_KV else kv_len - S + tile * BLOCK_M + 1
        masked_from = tl.maximum(masked_from, 0)
        if not SPLIT_KV:
            split_end = tl.minimum(kv_end, tl.maximum(kv_len - S + (tile + 1) * BLOCK_M, 0))
    if SPLIT_KV:
        each = tl.cdiv(tl.cdiv(kv_end, tl.num_programs(1)), BLOCK_N) * BLOCK_N
        split_begin = tl.program_id(1) * each
        split_end = tl.minimum(split_end, split_begin + each)
    masked_from = tl.maximum(tl.minimum(masked_from, split_end) // BLOCK_N * BLOCK_N, split_begin)

    q_ptrs = query + b * q_b + head * q_h + m.to(tl.int64) * q_m
    q = tl.load(q_ptrs[:, None] + offs_d[None, :], mask=row_valid[:, None] & dim_valid[None, :], other=0.0)
    offset = tl.cast(split_begin, tl.int64) if SPLIT_KV else 0
    k_base = key + b * k_b + kv_head * k_h + offset * k_n
    v_base = value + b * v_b + kv_head * v_h + offset * v_n
    if INT8:
        ks_base = key_scale + b * s_b + kv_head * s_h + offset * s_n
        vs_base = value_scale + b * s_b + kv_head * s_h + offset * s_n
    if MASK != 0:
        mask_base = mask + b * m_b + head * m_h + m.to(tl.int64) * m_m + offset * m_n
    if bias is not None:
        bias_base = bias + head * b_h + m.to(tl.int64) * b_m + offset * b_n

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for masked in tl.static_range(2):  # full blocks, then those that need a mask
        loop_begin = masked_from if masked else split_begin
        loop_end = split_end if masked else masked_from
        for start in range(loop_begin, loop_end, BLOCK_N):
            key_valid = start + offs_n < split_end
            k_ptrs = k_base + offs_d[:, None] + offs_n[None, :] * k_n
            v_ptrs = v_base + offs_d[None, :] + offs_n[:, None] * v_n
            if masked:
                k = tl.load(k_ptrs, mask=key_valid[None, :] & dim_valid[:, None], other=0)
                v = tl.load(v_ptrs, mask=key_valid[:, None] & dim_valid[None, :], other=0)
            elif BLOCK_D != D:
                k = tl.load(k_ptrs, mask=dim_valid[:, None], other=0)
                v = tl.load(v_ptrs, mask=dim_valid[None, :], other=0)
            else:
                k = tl.load(k_ptrs)
                v = tl.load(v_ptrs)
            if WIDEN:
                qk = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * SCALE
            else:
                qk = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * SCALE
            if INT8:
                k_scales = tl.load(ks_base + offs_n * s_n, mask=key_valid, other=0.0)
                v_scales = tl.load(vs_base + offs_n * s_n, mask=key_valid, other=0.0)
                qk = qk * k_scales[None, :]
                v = v.to(tl.float32) * v_scales[:, None]
            v = v.to(q.dtype)
            if MASK != 0:
                valid = row_valid[:, None] & key_valid[None, :]
                mask_tile = tl.load(mask_base[:, None] + offs_n[None, :] * m_n, mask=valid, other=0)
                qk = qk + mask_tile.to(tl.float32) if MASK == 2 else tl.where(mask_tile != 0, qk, float("-inf"))
            if bias is not None:
                valid = row_valid[:, None] & key_valid[None, :]
                bias_tile = tl.load(bias_base[:, None] + offs_n[None, :] * b_n, mask=valid, other=0.0)
                qk = qk + bias_tile.to(tl.float32)
            if masked:
                visible = key_valid[None, :]
                if CAUSAL:
                    visible = visible & (start + offs_n[None, :] <= last_key[:, None])
                qk = tl.where(visible, qk, float("-inf"))
            m_ij = tl.maximum(m_i, tl.max(qk, 1))
            m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)  # no visible key yet: -inf - -inf would be NaN
            p = tl.exp2((qk - m_safe[:, None]) * UNIT)
            alpha = tl.exp2((m_i - m_safe) * UNIT)
            l_i = l_i * alpha + tl.sum(p, 1)
            p = p.to(q.dtype)
            acc = acc * alpha[:, None]
            if WIDEN:
                acc = tl.dot(p.to(tl.float32), v.to(tl.float32), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(p, v, acc, input_precision=PRECISION)
            m_i = m_ij
            k_base += BLOCK_N * k_n
            v_base += BLOCK_N * v_n
            if INT8:
                ks_base += BLOCK_N * s_n
                vs_base += BLOCK_N * s_n
            if MASK != 0:
                mask_base += BLOCK_N * m_n
            if bias is not None:
                bias_base += BLOCK_N * b_n

    stored = row_valid[:, None] & dim_valid[None, :]
    if SPLIT_KV:
        split = tl.program_id(1).to(tl.int64)
        row = (b * H + head) * S + m
        tl.store(split_ml + split * 2 * ROWS + row, m_i, mask=row_valid)
        tl.store(split_ml + (split * 2 + 1) * ROWS + row, l_i, mask=row_valid)
        tl.store(split_acc + (split * ROWS + row)[:, None] * D + offs_d[None, :], acc, mask=stored)
    else:
        result = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]  # no key, no values: zeros
        o_ptrs = output + b * o_b + head * o_h + m.to(tl.int64) * o_m
        tl.store(o_ptrs[:, None] + offs_d[None, :], result.to(output.dtype.element_ty), mask=stored)


@triton.jit
def attention_combine(
    split_ml, split_acc,
    S, ROWS, SPLITS, o_b, o_h, o_m,
    output,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Combine the SPLITS partial results of each query. Grid (ROWS,)."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    dim_valid = offs_d < D
    m_i = tl.full((1,), float("-inf"), tl.float32)
    for split in range(SPLITS):
        m_i = tl.maximum(m_i, tl.load(split_ml + split * 2 * ROWS.to(tl.int64) + row))
    m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)
    l_i = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(SPLITS):
        ml_ptr = split_ml + split * 2 * ROWS.to(tl.int64) + row
        alpha = tl.exp2((tl.load(ml_ptr) - m_safe) * UNIT)
        l_i += alpha * tl.load(ml_ptr + ROWS)
        acc += alpha * tl.load(split_acc + (split * ROWS.to(tl.int64) + row) * D + offs_d, mask=dim_valid, other=0.0)
    result = acc / tl.where(l_i > 0, l_i, 1.0)
    b, h, m = row // S // H, row // S % H, row % S
    tl.store(output + b * o_b + h * o_h + m * o_m + offs_d, result.to(output.dtype.element_ty), mask=dim_valid)
