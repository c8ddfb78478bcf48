/* The two products of attention: a few rows times panels of keys or of values, in float32 or in BF16.
 *
 * Both are sums over a depth of ``x[row][d] * panel[d][column]`` where x and panel have floats, or, in BF16, pairs of
 * numbers in the place of a float, whose products are added in pairs. A sum is one chain over the depth in ascending
 * order, however many rows there are: a row has the same bits alone and among others.
 */
#ifndef TRANSOM_ATTENTION_TILE_H
#define TRANSOM_ATTENTION_TILE_H

#include "../vector.h"
#if defined(TRANSOM_BF16)
#include "attention_bf16.h"
#endif

#define ATTENTION_PANEL (2 * LANES) /* columns of a panel of keys */
#define ATTENTION_KEYS 128          /* keys that are packed at a time; a multiple of ATTENTION_PANEL */
#define ATTENTION_PARTS 4           /* vectors of columns that one or two rows are multiplied by at a time; others: 2 */
#define ATTENTION_AHEAD 64          /* keys or values that are fetched before their use */
#if defined(TRANSOM_VECTOR_AVX512)
#define ATTENTION_ROWS 12
#elif defined(TRANSOM_VECTOR_AVX2)
#define ATTENTION_ROWS 6
#else
#define ATTENTION_ROWS 4
#endif

/* A pointer that the compiler is to take as it comes. It would compute those of all rows before the loop, more than
 * there are general registers, and keep the others where they come late: behind all products issued before. */
#define ATTENTION_UNKNOWN(pointer) __asm__("" : "+r"(pointer))

TRANSOM_INLINE vector attention_product(int bf16, vector a, vector b, vector sum) {
#if defined(TRANSOM_BF16)
  if (bf16) return bf16_product(a, b, sum);
#else
  (void)bf16;
#endif
  return vector_fma(a, b, sum);
}

/* sums (rows, parts * LANES) = x times a panel, or that added to them unless ``first``. */
TRANSOM_INLINE void attention_tile(int32_t rows, int32_t parts, int bf16, int32_t depth, const float *x,
                                   int64_t x_stride, const float *panel, int64_t panel_stride, float *sums,
                                   int64_t sum_stride, int first) {
  vector sum[ATTENTION_ROWS][ATTENTION_PARTS];
#pragma GCC unroll 12
  for (int32_t row = 0; row < rows; row++)
#pragma GCC unroll 4
    for (int32_t part = 0; part < parts; part++)
      sum[row][part] = vector_zero();
  if (!first) {
    const float *before = sums;
#pragma GCC unroll 12
    for (int32_t row = 0; row < rows; row++, before += sum_stride) {
      ATTENTION_UNKNOWN(before);
#pragma GCC unroll 4
      for (int32_t part = 0; part < parts; part++) sum[row][part] = vector_load(before + part * LANES);
    }
  }
  /* Every third row has a pointer. */
  const float *third[(ATTENTION_ROWS + 2) / 3];
#pragma GCC unroll 4
  for (int32_t i = 0; 3 * i < rows; i++) third[i] = x + 3 * i * x_stride;
  for (int32_t d = 0; d < depth; d++, panel += panel_stride) {
    vector column[ATTENTION_PARTS];
    if (rows <= 2) /* memory, not arithmetic, is the limit */
      for (int32_t part = 0; part < parts; part++)
        __builtin_prefetch(panel + ATTENTION_AHEAD * panel_stride + part * LANES, 0, 2);
#pragma GCC unroll 4
    for (int32_t i = 0; 3 * i < rows; i++) ATTENTION_UNKNOWN(third[i]);
#pragma GCC unroll 4
    for (int32_t part = 0; part < parts; part++) column[part] = vector_load(panel + part * LANES);
#pragma GCC unroll 12
    for (int32_t row = 0; row < rows; row++) {
      vector factor = vector_set(third[row / 3][row % 3 * x_stride]);
#pragma GCC unroll 4
      for (int32_t part = 0; part < parts; part++)
        sum[row][part] = attention_product(bf16, factor, column[part], sum[row][part]);
    }
#pragma GCC unroll 4
    for (int32_t i = 0; 3 * i < rows; i++) third[i]++;
  }
#pragma GCC unroll 12
  for (int32_t row = 0; row < rows; row++, sums += sum_stride) {
    ATTENTION_UNKNOWN(sums);
#pragma GCC unroll 4
    for (int32_t part = 0; part < parts; part++) vector_store(sums + part * LANES, sum[row][part]);
  }
}

/* The number of rows is one of few, so that the compiler keeps the sums of each in registers: more rows than asked for
 * are computed where it is not, at most ATTENTION_ROWS in all. */
#define ATTENTION_CASE(count) \
  attention_tile(count, parts, bf16, depth, x, x_stride, panel, panel_stride, sums, sum_stride, first)
TRANSOM_INLINE void attention_tile_of(int32_t rows, int32_t parts, int bf16, int32_t depth, const float *x,
                                      int64_t x_stride, const float *panel, int64_t panel_stride, float *sums,
                                      int64_t sum_stride, int first) {
  if (rows <= 1) ATTENTION_CASE(1);
  else if (rows <= 2) ATTENTION_CASE(2);
  else if (rows <= 4) ATTENTION_CASE(4);
#if ATTENTION_ROWS > 4
  else if (rows <= 6) ATTENTION_CASE(6);
#endif
#if ATTENTION_ROWS > 6
  else if (rows <= 8) ATTENTION_CASE(8);
  else ATTENTION_CASE(12);
#endif
}

#define ATTENTION_FUNCTION(name, parts, bf16)                                                                        \
  static __attribute__((noinline)) void name(int32_t rows, int32_t depth, const float *x, int64_t x_stride,          \
                                             const float *panel, int64_t panel_stride, float *sums,                  \
                                             int64_t sum_stride, int first) {                                        \
    attention_tile_of(rows, parts, bf16, depth, x, x_stride, panel, panel_stride, sums, sum_stride, first);          \
  }
static __attribute__((noinline)) void attention_f32_few(int32_t rows, int32_t depth, const float *x, int64_t x_stride,
                                                        const float *panel, int64_t panel_stride, float *sums,
                                                        int64_t sum_stride, int first) {
  if (rows <= 1)
    attention_tile(1, ATTENTION_PARTS, 0, depth, x, x_stride, panel, panel_stride, sums, sum_stride, first);
  else
    attention_tile(2, ATTENTION_PARTS, 0, depth, x, x_stride, panel, panel_stride, sums, sum_stride, first);
}
ATTENTION_FUNCTION(attention_f32_narrow, 1, 0)
ATTENTION_FUNCTION(attention_f32_wide, 2, 0)
#if defined(TRANSOM_BF16)
ATTENTION_FUNCTION(attention_bf16_narrow, 1, 1)
ATTENTION_FUNCTION(attention_bf16_wide, 2, 1)
#endif

/* sums (rows, parts * LANES), parts being 1 or 2, or ATTENTION_PARTS for up to 2 rows in float32. */
static void attention_multiply(int32_t rows, int32_t parts, int bf16, int32_t depth, const float *x, int64_t x_stride,
                               const float *panel, int64_t panel_stride, float *sums, int64_t sum_stride, int first) {
#if defined(TRANSOM_BF16)
  if (bf16) {
    (parts == 1 ? attention_bf16_narrow : attention_bf16_wide)(rows, depth, x, x_stride, panel, panel_stride, sums,
                                                               sum_stride, first);
    return;
  }
#else
  (void)bf16;
#endif
  (parts == 1   ? attention_f32_narrow
   : parts == 2 ? attention_f32_wide
                : attention_f32_few)(rows, depth, x, x_stride, panel, panel_stride, sums, sum_stride, first);
}

#endif
