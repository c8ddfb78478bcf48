/* Packing of float32 weights, from float32 or float16, into the panels of linear_f32.h. */
#ifndef TRANSOM_PACK_F32_H
#define TRANSOM_PACK_F32_H

#include "linear_f32.h"

#define F32_PACK_DEPTH 16 /* rows that are packed into one panel after the other: a source is read along its rows */

static int64_t packed_bytes_f32(int32_t k, int32_t n) {
  return (int64_t)f32_parts(n, F32_COLUMNS) * F32_COLUMNS * k * (int64_t)sizeof(float);
}

/* count elements of a source, which need not be aligned to their size. */
static void f32_read(const uint8_t *source, int32_t dtype, int64_t first, int32_t count, float *to) {
  if (dtype == TRANSOM_F32) {
    memcpy(to, source + first * (int64_t)sizeof(float), (size_t)count * sizeof(float));
    return;
  }
  const uint8_t *from = source + first * (int64_t)sizeof(uint16_t);
  uint16_t halves[LANES];
  for (int32_t i = 0; i < count; i += LANES) {
    int32_t lanes = count - i < LANES ? count - i : LANES;
    memcpy(halves, from + (int64_t)i * 2, (size_t)lanes * sizeof *halves);
    vector_store_part(to + i, vector_load_f16_part(halves, lanes), lanes);
  }
}

/* Rows [k, k + depth) of columns [column, column + count), which lie in one panel from its column ``at``. */
static void f32_pack_block(const void *source, int32_t dtype, int64_t stride, int transposed, int32_t k, int32_t depth,
                           int32_t column, int32_t count, float *panel, int32_t at) {
  float *to = panel + (int64_t)k * F32_COLUMNS + at;
  if (!transposed) {
    for (int32_t row = 0; row < depth; row++)
      f32_read(source, dtype, (k + row) * stride + column, count, to + row * F32_COLUMNS);
    return;
  }
  for (int32_t i = 0; i < count; i++) {
    float line[F32_PACK_DEPTH];
    f32_read(source, dtype, (column + i) * stride + k, depth, line);
    for (int32_t row = 0; row < depth; row++) to[row * F32_COLUMNS + i] = line[row];
  }
}

/* transom_pack for float32: the columns past n are zeroed with the last part. */
static void pack_f32(int32_t k, int32_t n, int32_t column, int32_t n_part, const void *source, int32_t source_dtype,
                     int64_t stride, int32_t transposed, void *panels) {
  float *to = panels;
  int32_t end = column + n_part;
  for (int32_t start = 0; start < k; start += F32_PACK_DEPTH) {
    int32_t depth = k - start < F32_PACK_DEPTH ? k - start : F32_PACK_DEPTH;
    for (int32_t at = column; at < end;) {
      int32_t panel = at / F32_COLUMNS, inside = at % F32_COLUMNS;
      int32_t count = end - at < F32_COLUMNS - inside ? end - at : F32_COLUMNS - inside;
      float *block = to + (int64_t)panel * k * F32_COLUMNS;
      f32_pack_block(source, source_dtype, stride, transposed, start, depth, at - column, count, block, inside);
      at += count;
      if (at == n)
        for (int32_t row = start; row < start + depth; row++)
          for (int32_t i = inside + count; i < F32_COLUMNS; i++) block[(int64_t)row * F32_COLUMNS + i] = 0.0f;
    }
  }
}

#endif
