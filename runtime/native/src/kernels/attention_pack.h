/* Keys and values as the products of attention read them: attention_tile.h. */
#ifndef TRANSOM_ATTENTION_PACK_H
#define TRANSOM_ATTENTION_PACK_H

#include "attention_tile.h"
#include "transpose.h"

/* Floats of a row of ``columns``, or pairs of BF16 in the place of floats. */
TRANSOM_INLINE int32_t attention_depth(int bf16, int32_t columns) { return bf16 ? (columns + 1) / 2 : columns; }

TRANSOM_INLINE int32_t attention_round_up(int32_t x, int32_t step) { return (x + step - 1) / step * step; }

/* Fetch a row of ``columns`` into the second cache: more lines can be on their way there than to the first. */
TRANSOM_INLINE void attention_fetch(const float *x, int32_t columns) {
  for (int32_t column = 0; column < columns; column += 16) __builtin_prefetch(x + column, 0, 2);
}

/* x[column], ..., zero from ``columns`` on. */
TRANSOM_INLINE vector attention_load(const float *x, int32_t column, int32_t columns) {
  int32_t n = columns - column;
  if (n >= LANES) return vector_load(x + column);
  return n > 0 ? vector_load_part(x + column, n) : vector_zero();
}

/* The same where x is a row of BF16 pairs yet to be made of floats; ``at`` counts pairs. No lane is outside of
 * ``whole`` rows. */
TRANSOM_INLINE vector attention_load_row(int bf16, int whole, const float *x, int32_t at, int32_t columns) {
#if defined(TRANSOM_BF16)
  if (bf16) {
    x += 2 * at;
    if (whole) return bf16_in_order(vector_load(x), vector_load(x + LANES));
    columns -= 2 * at;
    return bf16_in_order(attention_load(x, 0, columns), attention_load(x, LANES, columns));
  }
#else
  (void)bf16;
#endif
  return whole ? vector_load(x + at) : attention_load(x, at, columns);
}

TRANSOM_INLINE int attention_whole(int bf16, int32_t columns) { return columns % ((bf16 ? 2 : 1) * LANES) == 0; }

/* ``count`` rows of keys become panels (depth, ATTENTION_PANEL) with a key in each column; columns up to the next
 * multiple of LANES are zero. ``following`` keys lie there in all, which the next calls may pack. */
TRANSOM_INLINE void attention_pack_keys_as(int bf16, int whole, const float *keys, int64_t stride, int32_t count,
                                           int32_t following, int32_t dim, float *panels) {
  int32_t depth = attention_depth(bf16, dim);
  for (int32_t key = 0; key < count; key += LANES) {
    for (int32_t i = key + ATTENTION_AHEAD; i < key + ATTENTION_AHEAD + LANES && i < following; i++)
      attention_fetch(keys + i * stride, dim);
    float *panel = panels + (int64_t)(key / ATTENTION_PANEL) * depth * ATTENTION_PANEL + key % ATTENTION_PANEL;
    for (int32_t at = 0; at < depth; at += LANES) {
      vector rows[LANES];
      if (count - key >= LANES) {
#pragma GCC unroll 16
        for (int32_t i = 0; i < LANES; i++)
          rows[i] = attention_load_row(bf16, whole, keys + (key + i) * stride, at, dim);
      } else {
        for (int32_t i = 0; i < LANES; i++)
          rows[i] = key + i < count ? attention_load_row(bf16, whole, keys + (key + i) * stride, at, dim)
                                    : vector_zero();
      }
      transpose(rows);
      if (whole || depth - at >= LANES) {
#pragma GCC unroll 16
        for (int32_t i = 0; i < LANES; i++) vector_store(panel + (at + i) * ATTENTION_PANEL, rows[i]);
      } else {
        for (int32_t i = 0; i < depth - at; i++) vector_store(panel + (at + i) * ATTENTION_PANEL, rows[i]);
      }
    }
  }
}

static void attention_pack_keys(int bf16, const float *keys, int64_t stride, int32_t count, int32_t following,
                                int32_t dim, float *panels) {
  int whole = attention_whole(bf16, dim);
  if (bf16 && whole) attention_pack_keys_as(1, 1, keys, stride, count, following, dim, panels);
  else if (bf16) attention_pack_keys_as(1, 0, keys, stride, count, following, dim, panels);
  else if (whole) attention_pack_keys_as(0, 1, keys, stride, count, following, dim, panels);
  else attention_pack_keys_as(0, 0, keys, stride, count, following, dim, panels);
}

#if defined(TRANSOM_BF16)
/* Two rows, or one that zeros follow, become one of pairs. */
TRANSOM_INLINE void attention_pair_values(int whole, const float *x, const float *next, int32_t dim, int32_t width,
                                          float *to) {
  for (int32_t column = 0; column < width; column += LANES) {
    vector low = whole ? vector_load(x + column) : attention_load(x, column, dim), high = vector_zero();
    if (next) high = whole ? vector_load(next + column) : attention_load(next, column, dim);
    vector_store(to + column, bf16_side_by_side(low, high));
  }
}
#endif

/* ``count`` rows of values become rows of ``width`` columns, a multiple of LANES; in BF16 each two rows become one of
 * pairs, and zeros follow the last one of an odd number. */
static void attention_pack_values(int bf16, const float *values, int64_t stride, int32_t count, int32_t dim,
                                  int32_t width, float *to) {
#if defined(TRANSOM_BF16)
  if (bf16) {
    int32_t row = 0;
    for (; row + 2 <= count; row += 2, values += 2 * stride, to += width) {
      if (dim == width) attention_pair_values(1, values, values + stride, width, width, to);
      else attention_pair_values(0, values, values + stride, dim, width, to);
    }
    if (row < count) attention_pair_values(0, values, NULL, dim, width, to);
    return;
  }
#else
  (void)bf16;
#endif
  for (int32_t row = 0; row < count; row++)
    for (int32_t column = 0; column < width; column += LANES)
      vector_store(to + (int64_t)row * width + column, attention_load(values + row * stride, column, dim));
}

#endif
