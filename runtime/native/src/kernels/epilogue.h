/* What happens to each finished row: transom_epilogue, in its order.
 *
 * A norm or a scale of the row needs the whole row, all else the columns alone. So a kernel that has some columns of a
 * row calls epilogue_columns, and, where epilogue_needs_row, epilogue_row_rest once all columns went through, which
 * begins with the residual. One that has the whole row calls epilogue_row. All give the same bits.
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
    case TRANSOM_QUICK_GELU: return vector_quick_gelu(x);
    case TRANSOM_SILU: return vector_silu(x);
    case TRANSOM_TANH: return vector_tanh(x);
    default: return x;
  }
}

/* Rows and columns on their way: pointers to the first of them, NULL for what an epilogue does not have. */
typedef struct {
  int32_t rows, columns;
  int64_t n;                 /* from row to row of all slots */
  const float *y;            /* float32, or int32 sums where there is a scale */
  int64_t y_stride;
  const float *scale;        /* of columns */
  const float *row_factor;   /* of rows, or NULL */
  const float *bias, *residual, *inverse_scale;
  float *sum, *out;
  int64_t out_stride;
  uint8_t *quantized;
  int32_t zero_point;
} epilogue_block;

#define EPILOGUE_LOAD(from) (whole ? vector_load(from) : vector_load_part(from, lanes))
#define EPILOGUE_STORE(to, x) (whole ? vector_store(to, x) : vector_store_part(to, x, lanes))

/* What a block has. Where it is known to the compiler, none of it is asked for again for each vector. */
enum {
  EPILOGUE_SCALE = 1,
  EPILOGUE_FACTOR = 2,
  EPILOGUE_BIAS = 4,
  EPILOGUE_RESIDUAL = 8,
  EPILOGUE_SUM = 16,
  EPILOGUE_OUT = 32,
  EPILOGUE_QUANTIZED = 64,
};

/* One vector of columns of all rows: what belongs to columns is read once. */
TRANSOM_INLINE void epilogue_vector(int32_t activation, int32_t has, const epilogue_block *at, int32_t column,
                                    int32_t lanes, int whole) {
  vector bias = has & EPILOGUE_BIAS ? EPILOGUE_LOAD(at->bias + column) : vector_zero();
  vector scale = has & EPILOGUE_SCALE ? EPILOGUE_LOAD(at->scale + column) : vector_zero();
  vector inverse = has & EPILOGUE_QUANTIZED ? EPILOGUE_LOAD(at->inverse_scale + column) : vector_zero();
  const float *y = at->y + column;
  int64_t place = column;
  for (int32_t row = 0; row < at->rows; row++, y += at->y_stride, place += at->n) {
    vector x;
    if (has & EPILOGUE_SCALE) {
      const int32_t *sums = (const int32_t *)(const void *)y;
      x = vector_mul(whole ? vector_load_s32(sums) : vector_load_s32_part(sums, lanes), scale);
    } else {
      x = EPILOGUE_LOAD(y);
    }
    if (has & EPILOGUE_FACTOR) x = vector_mul(x, vector_set(at->row_factor[row]));
    if (has & EPILOGUE_BIAS) x = vector_add(x, bias);
    x = epilogue_activate(activation, x);
    if (has & EPILOGUE_RESIDUAL) x = vector_add(x, EPILOGUE_LOAD(at->residual + place));
    if (has & EPILOGUE_SUM) EPILOGUE_STORE(at->sum + place, x);
    if (has & EPILOGUE_OUT) EPILOGUE_STORE(at->out + row * at->out_stride + column, x);
    if (has & EPILOGUE_QUANTIZED) {
      x = vector_mul(x, inverse);
      if (whole) vector_store_u8(at->quantized + place, x, at->zero_point);
      else vector_store_u8_part(at->quantized + place, x, at->zero_point, lanes);
    }
  }
}

TRANSOM_INLINE void epilogue_vectors(int32_t activation, int32_t has, const epilogue_block *given) {
  const epilogue_block copy = *given, *at = &copy; /* which no store can change: it stays in registers */
  int32_t column = 0;
  for (; column + LANES <= at->columns; column += LANES) epilogue_vector(activation, has, at, column, LANES, 1);
  if (column < at->columns) epilogue_vector(activation, has, at, column, at->columns - column, 0);
}

/* The blocks that most of an encoder's time would go to have loops of their own. */
static void epilogue_compute(int32_t activation, const epilogue_block *at) {
  enum { SUMS = EPILOGUE_SCALE | EPILOGUE_BIAS };
  int32_t has = (at->scale ? EPILOGUE_SCALE : 0) | (at->row_factor ? EPILOGUE_FACTOR : 0) |
                (at->bias ? EPILOGUE_BIAS : 0) | (at->residual ? EPILOGUE_RESIDUAL : 0) |
                (at->sum ? EPILOGUE_SUM : 0) | (at->out ? EPILOGUE_OUT : 0) |
                (at->quantized ? EPILOGUE_QUANTIZED : 0);
  switch (activation) {
    case TRANSOM_RELU: epilogue_vectors(TRANSOM_RELU, has, at); break;
    case TRANSOM_GELU:
      if (has == (SUMS | EPILOGUE_QUANTIZED)) epilogue_vectors(TRANSOM_GELU, SUMS | EPILOGUE_QUANTIZED, at);
      else epilogue_vectors(TRANSOM_GELU, has, at);
      break;
    case TRANSOM_GELU_TANH: epilogue_vectors(TRANSOM_GELU_TANH, has, at); break;
    case TRANSOM_QUICK_GELU: epilogue_vectors(TRANSOM_QUICK_GELU, has, at); break;
    case TRANSOM_SILU: epilogue_vectors(TRANSOM_SILU, has, at); break;
    case TRANSOM_TANH: epilogue_vectors(TRANSOM_TANH, has, at); break;
    default:
      if (has == (SUMS | EPILOGUE_OUT)) epilogue_vectors(TRANSOM_IDENTITY, SUMS | EPILOGUE_OUT, at);
      else if (has == (EPILOGUE_FACTOR | EPILOGUE_OUT))
        epilogue_vectors(TRANSOM_IDENTITY, EPILOGUE_FACTOR | EPILOGUE_OUT, at);
      else if (has == (EPILOGUE_FACTOR | EPILOGUE_QUANTIZED))
        epilogue_vectors(TRANSOM_IDENTITY, EPILOGUE_FACTOR | EPILOGUE_QUANTIZED, at);
      else epilogue_vectors(TRANSOM_IDENTITY, has, at);
      break;
  }
}

/* Columns [column, column + columns) of rows [row, row + rows) of n, from at->y on. Where rows are needed whole, what
 * epilogue_row_rest goes on with is written to at->out, else that and all other slots are set here. */
static void epilogue_columns_of(const transom_epilogue *then, const transom_run *run, int64_t row, int32_t column,
                                epilogue_block *at) {
  at->bias = then->bias ? then->bias + column : NULL;
  at->zero_point = then->zero_point;
  if (!epilogue_needs_row(then)) {
    int64_t first = row * at->n + column;
    float *residual = transom_slot(run, then->residual), *sum = transom_slot(run, then->sum);
    float *out = transom_slot(run, then->out);
    uint8_t *quantized = transom_slot(run, then->quantized);
    at->residual = residual ? residual + first : NULL;
    at->sum = sum ? sum + first : NULL;
    at->out = out ? out + first : NULL;
    at->out_stride = at->n;
    at->quantized = quantized ? quantized + first : NULL;
    at->inverse_scale = then->inverse_scale ? then->inverse_scale + column : NULL;
  }
  epilogue_compute(then->activation, at);
}

/* Columns [column, column + count) of one row y, which points to the first of them. y is left as it was where the row is
 * not needed as a whole, else replaced by what epilogue_row_rest goes on with. */
static inline void epilogue_columns(const transom_epilogue *then, const transom_run *run, int64_t row, int32_t n,
                                    int32_t column, int32_t count, float *y) {
  epilogue_block at = {.rows = 1, .columns = count, .n = n, .y = y, .out = y};
  epilogue_columns_of(then, run, row, column, &at);
}

/* The sum of y - shift, or of its squares, in four vectors that take turns. */
TRANSOM_INLINE float epilogue_total(const float *y, int32_t n, float shift, int squares) {
  vector total[4] = {vector_zero(), vector_zero(), vector_zero(), vector_zero()}, by = vector_set(shift);
  int32_t column = 0;
  for (; column + 4 * LANES <= n; column += 4 * LANES) {
#pragma GCC unroll 4
    for (int32_t turn = 0; turn < 4; turn++) {
      vector x = vector_sub(vector_load(y + column + turn * LANES), by);
      total[turn] = squares ? vector_fma(x, x, total[turn]) : vector_add(total[turn], x);
    }
  }
  for (; column < n; column += LANES) {
    int32_t lanes = n - column < LANES ? n - column : LANES;
    vector x = vector_keep(vector_sub(vector_load_part(y + column, lanes), by), lanes);
    total[0] = squares ? vector_fma(x, x, total[0]) : vector_add(total[0], x);
  }
  return vector_sum(vector_add(vector_add(total[0], total[2]), vector_add(total[1], total[3])));
}

static float epilogue_sum(const float *y, int32_t n) { return epilogue_total(y, n, 0.0f, 0); }

/* The sum of (y - shift)^2. */
static float epilogue_squares(const float *y, int32_t n, float shift) { return epilogue_total(y, n, shift, 1); }

/* One vector of a normalised row: to = (y - shift) * factor [* weight] [+ bias]. Masks are for the last one of a row
 * alone: processors store by them slowly. Where the row has no scale of its own it is quantised here. */
TRANSOM_INLINE vector epilogue_normalize_vector(const transom_epilogue *then, const float *y, float *to,
                                                uint8_t *quantized, int32_t column, int32_t lanes, int whole,
                                                vector shift, vector factor) {
  vector x = vector_mul(vector_sub(EPILOGUE_LOAD(y + column), shift), factor);
  if (then->norm_weight) x = vector_mul(x, EPILOGUE_LOAD(then->norm_weight + column));
  if (then->norm_bias) x = vector_add(x, EPILOGUE_LOAD(then->norm_bias + column));
  EPILOGUE_STORE(to + column, x);
  if (quantized) {
    vector scaled = vector_mul(x, EPILOGUE_LOAD(then->inverse_scale + column));
    if (whole) vector_store_u8(quantized + column, scaled, then->zero_point);
    else vector_store_u8_part(quantized + column, scaled, then->zero_point, lanes);
  }
  if (then->multiplier) x = vector_mul(x, EPILOGUE_LOAD(then->multiplier + column));
  return vector_abs(whole ? x : vector_keep(x, lanes));
}

/* The whole row; returns the largest |to * multiplier|. */
static float epilogue_normalize(const transom_epilogue *given, const float *y, float *to, uint8_t *quantized, int32_t n,
                                float shift, float factor) {
  const transom_epilogue copy = *given, *then = &copy;
  vector largest = vector_zero(), by = vector_set(shift), times = vector_set(factor);
  int32_t column = 0;
  for (; column + LANES <= n; column += LANES)
    largest = vector_max(
        largest, epilogue_normalize_vector(then, y, to, quantized, column, LANES, 1, by, times));
  if (column < n)
    largest = vector_max(
        largest, epilogue_normalize_vector(then, y, to, quantized, column, n - column, 0, by, times));
  return vector_largest(largest);
}

/* quantized = y [* multiplier] * inverse. */
static void epilogue_quantize_row(const transom_epilogue *then, const float *y, uint8_t *quantized, int32_t n,
                                  float inverse) {
  const float *multiplier = then->multiplier;
  int32_t column = 0, zero_point = then->zero_point;
  vector factor = vector_set(inverse);
  for (; column + LANES <= n; column += LANES) {
    vector x = vector_load(y + column);
    if (multiplier) x = vector_mul(x, vector_load(multiplier + column));
    vector_store_u8(quantized + column, vector_mul(x, factor), zero_point);
  }
  if (column < n) {
    vector x = vector_load_part(y + column, n - column);
    if (multiplier) x = vector_mul(x, vector_load_part(multiplier + column, n - column));
    vector_store_u8_part(quantized + column, vector_mul(x, factor), zero_point, n - column);
  }
}

/* y += residual, copied to sum where there is one. Here it is read along its row; by the columns of a tile it would be
 * waited for. */
static void epilogue_add(float *y, const float *residual, float *sum, int32_t n) {
  for (int32_t column = 0; column < n; column += LANES) {
    int32_t lanes = n - column < LANES ? n - column : LANES;
    int whole = lanes == LANES;
    vector x = EPILOGUE_LOAD(y + column);
    if (residual) x = vector_add(x, EPILOGUE_LOAD(residual + column));
    EPILOGUE_STORE(y + column, x);
    if (sum) EPILOGUE_STORE(sum + column, x);
  }
}

/* Residual, norm, out, and quantised form of a row whose columns all went through epilogue_columns. */
static void epilogue_row_rest(const transom_epilogue *then, const transom_run *run, int64_t row, int32_t n, float *y) {
  float *out = transom_slot(run, then->out), *row_scale = transom_slot(run, then->row_scale);
  float *residual = transom_slot(run, then->residual), *sum = transom_slot(run, then->sum);
  uint8_t *quantized = transom_slot(run, then->quantized);
  float shift = 0.0f, factor = 1.0f;
  if (residual || sum) epilogue_add(y, residual ? residual + row * n : NULL, sum ? sum + row * n : NULL, n);
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
  uint8_t *bytes = quantized ? quantized + row * n : NULL;
  float largest = epilogue_normalize(then, y, to, row_scale ? NULL : bytes, n, shift, factor);
  if (!row_scale) return;
  float scale = largest / 127.0f;
  row_scale[row] = scale;
  if (!bytes) return;
  epilogue_quantize_row(then, to, bytes, n, scale > 1e-37f ? 1.0f / scale : 0.0f); /* the inverse of less is infinite */
}

/* A whole row y (n), which is overwritten. */
static inline void epilogue_row(const transom_epilogue *then, const transom_run *run, int64_t row, int32_t n,
                                float *y) {
  epilogue_columns(then, run, row, n, 0, n, y);
  if (epilogue_needs_row(then)) epilogue_row_rest(then, run, row, n, y);
}

#undef EPILOGUE_LOAD
#undef EPILOGUE_STORE

#endif
