/* Softmax of rows of scores, which come times log2(e): powers of two stand for exponentials. */
#ifndef TRANSOM_ATTENTION_SOFTMAX_H
#define TRANSOM_ATTENTION_SOFTMAX_H

#include <float.h>
#include <math.h>

#include "attention_pack.h"

#define ATTENTION_WHOLE 12582912.0f /* 1.5 * 2^23: floats from here on are whole, so that adding it rounds */

/* 2^x for x <= 0, and 0 for minus infinity: by a polynomial (minimax) for the power of a fraction, within 2e-7 of it;
 * in BF16, where it is rounded to 8 bits, within 1e-4. */
#if defined(TRANSOM_VECTOR_AVX512)
TRANSOM_INLINE vector attention_power(int bf16, vector x) {
  vector r = vector_fraction(x), p; /* 0 <= r < 1: what scales by a power of two takes the floor itself */
  if (bf16) {
    p = vector_fma(vector_set(0.07802452147006989f), r, vector_set(0.22606715559959412f));
    p = vector_fma(p, r, vector_set(0.6958335638046265f));
    p = vector_fma(p, r, vector_set(0.9999251961708069f));
  } else {
    p = vector_fma(vector_set(0.0018775766948238015f), r, vector_set(0.00898933969438076f));
    p = vector_fma(p, r, vector_set(0.05582631751894951f));
    p = vector_fma(p, r, vector_set(0.24015361070632935f));
    p = vector_fma(p, r, vector_set(0.6931530833244324f));
    p = vector_fma(p, r, vector_set(0.9999999403953552f));
  }
  return vector_raise_floor(p, x);
}
#else
TRANSOM_INLINE vector attention_power(int bf16, vector x) {
  (void)bf16;
  x = vector_max(x, vector_set(-127.0f));
  vector whole = vector_add(x, vector_set(ATTENTION_WHOLE));
  vector r = vector_sub(x, vector_sub(whole, vector_set(ATTENTION_WHOLE))); /* |r| <= 1/2 */
  vector p = vector_fma(vector_set(0.00015353361959569156f), r, vector_set(0.0013398875016719103f));
  p = vector_fma(p, r, vector_set(0.00961843691766262f));
  p = vector_fma(p, r, vector_set(0.055503323674201965f));
  p = vector_fma(p, r, vector_set(0.24022647738456726f));
  p = vector_fma(p, r, vector_set(0.6931471824645996f));
  return vector_raise(vector_fma(p, r, vector_set(1.0f)), whole);
}
#endif

/* Scores from a position on; minus infinity from ``limit`` on, and where the mask (keys; 0 or that) has it. */
TRANSOM_INLINE vector attention_scores(const float *scores, const float *mask, int32_t at, int32_t limit) {
  static const float lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vector x = vector_load(scores + at);
  if (mask) x = vector_add(x, vector_load(mask + at));
  if (limit - at < LANES)
    x = vector_less(vector_load(lanes), vector_set((float)(limit - at)), x, vector_set(-INFINITY));
  return x;
}

/* The powers of LANES scores less the largest one, zeros from ``limit`` on. */
TRANSOM_INLINE vector attention_powers(int bf16, const float *scores, const float *mask, int32_t at, int32_t limit,
                                       vector largest) {
  if (at >= limit) return vector_zero();
  return attention_power(bf16, vector_sub(attention_scores(scores, mask, at, limit), largest));
}

/* Powers of a step of scores, in the place of the scores, or in BF16 of half of them. Returns the sum with what is
 * stored added to it: in BF16 that is what was rounded, so that the weights of a row add up to 1 as they are used. */
TRANSOM_INLINE vector attention_step(int bf16, float *scores, const float *mask, int32_t at, int32_t low_limit,
                                     int32_t high_limit, vector largest, vector sum) {
  vector low = attention_powers(bf16, scores, mask, at, low_limit, largest);
#if defined(TRANSOM_BF16)
  if (bf16) {
    vector high = attention_powers(bf16, scores, mask, at + LANES, high_limit, largest);
    vector pairs = bf16_in_order(low, high);
    vector_store(scores + at / 2, pairs);
    return bf16_product(pairs, bf16_ones(), sum);
  }
#else
  (void)high_limit;
#endif
  vector_store(scores + at, low);
  return vector_add(sum, low);
}

/* Replace scores (rows, limits[row]) by the powers of their differences to the row's largest one, and fill up with
 * zeros to ``width``; in BF16, width is a multiple of 2 LANES, and pairs take half the place. factor[row] becomes 1
 * / the sum of them: 0, and zeros, where there are no scores or all are masked. Each step is done for all rows before
 * the next: what is left of one row's vectors in the end, lane by lane, would hold up the next row. */
TRANSOM_INLINE void attention_softmax(int bf16, float *scores, int64_t stride, const float *mask, int32_t rows,
                                      const int32_t *limits, int32_t width, float *factor) {
  float top[ATTENTION_ROWS];
  vector sums[ATTENTION_ROWS];
  int32_t step = bf16 ? 2 * LANES : LANES;
  for (int32_t row = 0; row < rows; row++) {
    const float *from = scores + row * stride;
    int32_t limit = limits[row], whole = limit / LANES * LANES, at = 0;
    vector largest = vector_set(-FLT_MAX); /* and no less: infinity less infinity is no number */
    for (; at < whole; at += LANES) largest = vector_max(largest, attention_scores(from, mask, at, at + LANES));
    if (at < limit) largest = vector_max(largest, attention_scores(from, mask, at, limit));
    top[row] = vector_largest(largest);
  }
  for (int32_t row = 0; row < rows; row++) {
    float *to = scores + row * stride;
    int32_t limit = limits[row], whole = limit / step * step, at = 0;
    vector largest = vector_set(top[row]), sum = vector_zero();
    for (; at < whole; at += step) /* no part of a vector is outside */
      sum = attention_step(bf16, to, mask, at, at + LANES, at + 2 * LANES, largest, sum);
    for (; at < width; at += step) sum = attention_step(bf16, to, mask, at, limit, limit, largest, sum);
    sums[row] = sum;
  }
  for (int32_t row = 0; row < rows; row++) {
    float sum = vector_sum(sums[row]);
    factor[row] = sum > 0.0f ? 1.0f / sum : 0.0f;
  }
}

#endif
