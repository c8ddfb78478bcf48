/* What happens to each finished row: transom_epilogue, in its order.
 *
 * A norm or a scale of the row needs the whole row, all else the columns alone. So a kernel that has some columns of a
 * row calls epilogue_columns, and, where epilogue_needs_row, epilogue_row_rest once all columns went through. One that
 * has the whole row calls epilogue_row. All give the same bits.
 */
#ifndef TRANSOM_EPILOGUE_H
#define TRANSOM_EPILOGUE_H

#include <math.h>

#include "../vector.h"

TRANSOM_INLINE int epilogue_needs_row(const transom_epilogue *then) {
  return then->norm != TRANSOM_NO_NORM || then->row_scale != TRANSOM_NONE;
}

TRANSOM_INLINE vector epilogue_activate(int32_t activation, vector x) {
  switch (activation) {
    case TRANSOM_RELU: return vector_max(x, vector_zero());
    case TRANSOM_GELU: return vector_gelu(x);
    case TRANSOM_GELU_TANH: return vector_gelu_tanh(x);
    case TRANSOM_QUICK_GELU: return vector_mul(x, vector_sigmoid(vector_mul(x, vector_set(1.702f))));
    case TRANSOM_SILU: return vector_mul(x, vector_sigmoid(x));
    case TRANSOM_TANH: return vector_tanh(x);
    default: return x;
  }
}

/* Pointers into one row of an epilogue, NULL for what it does not have. */
typedef struct {
  const float *bias, *residual, *inverse_scale;
  float *sum, *out;
  uint8_t *quantized;
} epilogue_row_of;

/* One vector of a row, n of its lanes; column from the first one of ``at``. */
TRANSOM_INLINE void epilogue_vector(int32_t activation, const epilogue_row_of *at, int32_t zero_point,
                                    const float *y, int32_t column, int32_t n, int whole) {
#define PART(name, from) (whole ? name(from) : name##_part(from, n))
  vector x = PART(vector_load, y + column);
  if (at->bias) x = vector_add(x, PART(vector_load, at->bias + column));
  x = epilogue_activate(activation, x);
  if (at->residual) x = vector_add(x, PART(vector_load, at->residual + column));
#undef PART
  if (whole) {
    if (at->sum) vector_store(at->sum + column, x);
    if (at->out) vector_store(at->out + column, x);
    if (at->quantized)
      vector_store_u8(at->quantized + column, vector_mul(x, vector_load(at->inverse_scale + column)), zero_point);
  } else {
    if (at->sum) vector_store_part(at->sum + column, x, n);
    if (at->out) vector_store_part(at->out + column, x, n);
    if (at->quantized)
      vector_store_u8_part(at->quantized + column, vector_mul(x, vector_load_part(at->inverse_scale + column, n)),
                           zero_point, n);
  }
}

TRANSOM_INLINE void epilogue_vectors(int32_t activation, const epilogue_row_of *at, int32_t zero_point,
                                     const float *y, int32_t count) {
  int32_t column = 0;
  for (; column + LANES <= count; column += LANES) epilogue_vector(activation, at, zero_point, y, column, LANES, 1);
  if (column < count) epilogue_vector(activation, at, zero_point, y, column, count - column, 0);
}

/* Columns [column, column + count) of a row of n, from ``y``, which points to the first of them. Where the row is needed
 * as a whole, what epilogue_row_rest goes on with is written to ``collected``, which may be y. */
static void epilogue_columns_to(const transom_epilogue *then, const transom_run *run, int64_t row, int32_t n,
                                int32_t column, int32_t count, const float *y, float *collected) {
  int64_t first = row * n + column;
  int needs_row = epilogue_needs_row(then);
  float *residual = transom_slot(run, then->residual), *sum = transom_slot(run, then->sum);
  float *out = transom_slot(run, then->out);
  uint8_t *quantized = transom_slot(run, then->quantized);
  epilogue_row_of at = {
    then->bias ? then->bias + column : NULL,
    residual ? residual + first : NULL,
    then->inverse_scale ? then->inverse_scale + column : NULL,
    sum ? sum + first : NULL,
    needs_row ? collected : out ? out + first : NULL,
    quantized && !needs_row ? quantized + first : NULL,
  };
  switch (then->activation) {
    case TRANSOM_RELU: epilogue_vectors(TRANSOM_RELU, &at, then->zero_point, y, count); break;
    case TRANSOM_GELU: epilogue_vectors(TRANSOM_GELU, &at, then->zero_point, y, count); break;
    case TRANSOM_GELU_TANH: epilogue_vectors(TRANSOM_GELU_TANH, &at, then->zero_point, y, count); break;
    case TRANSOM_QUICK_GELU: epilogue_vectors(TRANSOM_QUICK_GELU, &at, then->zero_point, y, count); break;
    case TRANSOM_SILU: epilogue_vectors(TRANSOM_SILU, &at, then->zero_point, y, count); break;
    case TRANSOM_TANH: epilogue_vectors(TRANSOM_TANH, &at, then->zero_point, y, count); break;
    default: epilogue_vectors(TRANSOM_IDENTITY, &at, then->zero_point, y, count); break;
  }
}

/* The same in place. y is left as it was where the row is not needed as a whole. */
static inline void epilogue_columns(const transom_epilogue *then, const transom_run *run, int64_t row, int32_t n,
                                    int32_t column, int32_t count, float *y) {
  epilogue_columns_to(then, run, row, n, column, count, y, y);
}

/* y - shift, of n lanes from a column on; lanes past n are zero. */
TRANSOM_INLINE vector epilogue_shifted(const float *y, int32_t column, int32_t n, vector shift) {
  if (column + LANES <= n) return vector_sub(vector_load(y + column), shift);
  return vector_keep(vector_sub(vector_load_part(y + column, n - column), shift), n - column);
}

static float epilogue_sum(const float *y, int32_t n) {
  vector total = vector_zero();
  for (int32_t column = 0; column < n; column += LANES)
    total = vector_add(total, epilogue_shifted(y, column, n, vector_zero()));
  return vector_sum(total);
}

/* The sum of (y - shift)^2. */
static float epilogue_squares(const float *y, int32_t n, float shift) {
  vector total = vector_zero();
  for (int32_t column = 0; column < n; column += LANES) {
    vector x = epilogue_shifted(y, column, n, vector_set(shift));
    total = vector_fma(x, x, total);
  }
  return vector_sum(total);
}

/* to = (y - shift) * factor [* weight] [+ bias]; returns the largest |to * multiplier|. */
static float epilogue_normalize(const transom_epilogue *then, const float *y, float *to, int32_t n, float shift,
                                float factor) {
  vector largest = vector_zero();
  for (int32_t column = 0; column < n; column += LANES) {
    int32_t lanes = n - column < LANES ? n - column : LANES;
    vector x = vector_mul(epilogue_shifted(y, column, n, vector_set(shift)), vector_set(factor));
    if (then->norm_weight) x = vector_mul(x, vector_load_part(then->norm_weight + column, lanes));
    if (then->norm_bias) x = vector_add(x, vector_load_part(then->norm_bias + column, lanes));
    if (to) vector_store_part(to + column, x, lanes);
    if (then->multiplier) x = vector_mul(x, vector_load_part(then->multiplier + column, lanes));
    largest = vector_max(largest, vector_abs(x));
  }
  return vector_largest(largest);
}

/* quantized = y [* multiplier] times ``inverse``, or inverse_scale (n) where that is what the row has. */
static void epilogue_quantize(const transom_epilogue *then, const float *y, uint8_t *quantized, int32_t n,
                              float inverse) {
  int dynamic = then->row_scale != TRANSOM_NONE;
  for (int32_t column = 0; column < n; column += LANES) {
    int32_t lanes = n - column < LANES ? n - column : LANES;
    vector x = vector_load_part(y + column, lanes);
    if (dynamic) {
      if (then->multiplier) x = vector_mul(x, vector_load_part(then->multiplier + column, lanes));
      x = vector_mul(x, vector_set(inverse));
    } else {
      x = vector_mul(x, vector_load_part(then->inverse_scale + column, lanes));
    }
    vector_store_u8_part(quantized + column, x, then->zero_point, lanes);
  }
}

/* Norm, out, and quantised form of a row whose columns all went through epilogue_columns. */
static void epilogue_row_rest(const transom_epilogue *then, const transom_run *run, int64_t row, int32_t n, float *y) {
  float *out = transom_slot(run, then->out), *row_scale = transom_slot(run, then->row_scale);
  uint8_t *quantized = transom_slot(run, then->quantized);
  float shift = 0.0f, factor = 1.0f;
  if (then->norm == TRANSOM_LAYER_NORM) {
    shift = epilogue_sum(y, n) / (float)n;
    factor = 1.0f / sqrtf(epilogue_squares(y, n, shift) / (float)n + then->epsilon);
  } else if (then->norm == TRANSOM_RMS_NORM) {
    factor = 1.0f / sqrtf(epilogue_squares(y, n, 0.0f) / (float)n + then->epsilon);
  } else if (then->norm == TRANSOM_L2_NORM) {
    float norm = sqrtf(epilogue_squares(y, n, 0.0f));
    factor = 1.0f / (norm > then->epsilon ? norm : then->epsilon);
  }
  float *to = out ? out + row * n : y;
  float largest = epilogue_normalize(then, y, to, n, shift, factor);
  if (!quantized) return;
  float inverse = 0.0f;
  if (row_scale) {
    float scale = largest / 127.0f;
    row_scale[row] = scale;
    inverse = scale > 1e-37f ? 1.0f / scale : 0.0f; /* the inverse of less is infinite */
  }
  epilogue_quantize(then, to, quantized + row * n, n, inverse);
}

/* A whole row y (n), which is overwritten. */
static inline void epilogue_row(const transom_epilogue *then, const transom_run *run, int64_t row, int32_t n,
                                float *y) {
  epilogue_columns(then, run, row, n, 0, n, y);
  if (epilogue_needs_row(then)) epilogue_row_rest(then, run, row, n, y);
}

#endif
