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

/* The same where x is a row of BF16 pairs yet to be made of floats; ``at`` counts pairs. */
TRANSOM_INLINE vector attention_load_row(int bf16, const float *x, int32_t at, int32_t columns) {
#if defined(TRANSOM_BF16)
  if (bf16)
    return bf16_in_order(attention_load(x, 2 * at, columns), attention_load(x, 2 * at + LANES, columns));
#else
  (void)bf16;
#endif
  return attention_load(x, at, columns);
}

/* ``count`` rows of keys become panels (depth, ATTENTION_PANEL) with a key in each column; columns up to the next
 * multiple of LANES are zero. ``following`` keys lie there in all, which the next calls may pack. */
TRANSOM_INLINE void attention_pack_keys_as(int bf16, const float *keys, int64_t stride, int32_t count,
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
        for (int32_t i = 0; i < LANES; i++) rows[i] = attention_load_row(bf16, keys + (key + i) * stride, at, dim);
      } else {
        for (int32_t i = 0; i < LANES; i++)
          rows[i] = key + i < count ? attention_load_row(bf16, keys + (key + i) * stride, at, dim) : vector_zero();
      }
      transpose(rows);
      if (depth - at >= LANES) {
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
  if (bf16)
    attention_pack_keys_as(1, keys, stride, count, following, dim, panels);
  else
    attention_pack_keys_as(0, keys, stride, count, following, dim, panels);
}

/* ``count`` rows of values become rows of ``width`` columns, a multiple of LANES; in BF16 each two rows become one of
 * pairs, and there is an even number of vectors of them: rows up to the next multiple of 2 LANES are zero. */
static void attention_pack_values(int bf16, const float *values, int64_t stride, int32_t count, int32_t dim,
                                  int32_t width, float *to) {
#if defined(TRANSOM_BF16)
  if (bf16) {
    int32_t rows = attention_round_up(count, 2 * LANES);
    for (int32_t row = 0; row < rows; row += 2)
      for (int32_t column = 0; column < width; column += LANES) {
        const float *x = values + row * stride;
        vector low = row < count ? attention_load(x, column, dim) : vector_zero();
        vector high = row + 1 < count ? attention_load(x + stride, column, dim) : vector_zero();
        vector_store(to + (int64_t)(row / 2) * width + column, bf16_side_by_side(low, high));
      }
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
