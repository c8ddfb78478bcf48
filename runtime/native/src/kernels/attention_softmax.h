/* Softmax of one row of scores, which come times log2(e): powers of two stand for exponentials. */
#ifndef TRANSOM_ATTENTION_SOFTMAX_H
#define TRANSOM_ATTENTION_SOFTMAX_H

#include <math.h>

#include "attention_pack.h"

/* 2^x for x <= 0, within 2e-7 of it; 0 below -126.5. A polynomial of degree 6 for 2^r, |r| <= 1/2 (minimax, 2e-9). */
TRANSOM_INLINE vector attention_power(vector x) {
  x = vector_max(x, vector_set(-127.0f)); /* whose power vector_scale takes as 0 */
  vector n = vector_round(x), r = vector_sub(x, n);
  vector p = vector_set(0.00015353361959569156f);
  p = vector_fma(p, r, vector_set(0.0013398875016719103f));
  p = vector_fma(p, r, vector_set(0.00961843691766262f));
  p = vector_fma(p, r, vector_set(0.055503323674201965f));
  p = vector_fma(p, r, vector_set(0.24022647738456726f));
  p = vector_fma(p, r, vector_set(0.6931471824645996f));
  p = vector_fma(p, r, vector_set(1.0f));
  return vector_scale(p, n);
}

/* Scores from a position on, minus infinity from ``limit`` on and where the mask (keys; 0 or minus infinity) says so. */
TRANSOM_INLINE vector attention_scores(const float *scores, const float *mask, int32_t at, int32_t limit) {
  static const float lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vector x = vector_load(scores + at);
  if (mask) x = vector_add(x, vector_load(mask + at));
  if (limit - at < LANES) x = vector_less(vector_load(lanes), vector_set((float)(limit - at)), x, vector_set(-INFINITY));
  return x;
}

/* Replace scores (limit) by the powers of their differences to the largest one, and fill up with zeros to ``width``; in
 * BF16, width is a multiple of 2 LANES, and pairs take half the place. Returns 1 / the sum of them: 0, and zeros, where
 * there are no scores or all are masked. */
TRANSOM_INLINE float attention_softmax(int bf16, float *scores, const float *mask, int32_t limit, int32_t width) {
  vector largest = vector_set(-INFINITY), sum = vector_zero();
  for (int32_t at = 0; at < limit; at += LANES)
    largest = vector_max(largest, attention_scores(scores, mask, at, limit));
  float top = vector_largest(largest);
  if (top == -INFINITY) limit = 0;
  vector shift = vector_set(top);
  int32_t step = bf16 ? 2 * LANES : LANES;
  for (int32_t at = 0; at < width; at += step) {
    vector low = vector_zero(), high = vector_zero();
    if (at < limit) {
      low = attention_power(vector_sub(attention_scores(scores, mask, at, limit), shift));
      sum = vector_add(sum, low);
    }
    if (bf16 && at + LANES < limit) {
      high = attention_power(vector_sub(attention_scores(scores, mask, at + LANES, limit), shift));
      sum = vector_add(sum, high);
    }
#if defined(TRANSOM_BF16)
    if (bf16) {
      vector_store(scores + at / 2, bf16_in_order(low, high));
      continue;
    }
#else
    (void)high;
#endif
    vector_store(scores + at, low);
  }
  return limit > 0 ? 1.0f / vector_sum(sum) : 0.0f;
}

#endif
