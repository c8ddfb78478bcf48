/* Softmax of one row of scores, which come times log2(e): powers of two stand for exponentials. */
#ifndef TRANSOM_ATTENTION_SOFTMAX_H
#define TRANSOM_ATTENTION_SOFTMAX_H

#include <math.h>

#include "attention_pack.h"

#define ATTENTION_WHOLE 12582912.0f /* 1.5 * 2^23: floats from here on are whole, so that adding it rounds */

/* 2^x for x <= 0, and 0 for minus infinity: by a polynomial (minimax) for 2^r, |r| <= 1/2, within 2e-7 of it; in BF16,
 * where it is rounded to 8 bits, within 1e-4. */
TRANSOM_INLINE vector attention_power(int bf16, vector x) {
  x = vector_max(x, vector_set(-127.0f));
  vector whole = vector_add(x, vector_set(ATTENTION_WHOLE));
  vector r = vector_sub(x, vector_sub(whole, vector_set(ATTENTION_WHOLE)));
  vector p;
  if (bf16) {
    p = vector_fma(vector_set(0.05500893294811249f), r, vector_set(0.2422109693288803f));
    p = vector_fma(p, r, vector_set(0.6932829022407532f));
  } else {
    p = vector_fma(vector_set(0.00015353361959569156f), r, vector_set(0.0013398875016719103f));
    p = vector_fma(p, r, vector_set(0.00961843691766262f));
    p = vector_fma(p, r, vector_set(0.055503323674201965f));
    p = vector_fma(p, r, vector_set(0.24022647738456726f));
    p = vector_fma(p, r, vector_set(0.6931471824645996f));
  }
  return vector_raise(vector_fma(p, r, vector_set(1.0f)), whole);
}

/* Scores from a position on; minus infinity from ``limit`` on, and where the mask (keys; 0 or that) has it. */
TRANSOM_INLINE vector attention_scores(const float *scores, const float *mask, int32_t at, int32_t limit) {
  static const float lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vector x = vector_load(scores + at);
  if (mask) x = vector_add(x, vector_load(mask + at));
  if (limit - at < LANES)
    x = vector_less(vector_load(lanes), vector_set((float)(limit - at)), x, vector_set(-INFINITY));
  return x;
}

/* The powers of LANES scores less the largest one, added to the sum; zeros from ``limit`` on. */
TRANSOM_INLINE vector attention_powers(int bf16, const float *scores, const float *mask, int32_t at, int32_t limit,
                                       vector largest, vector *sum) {
  if (at >= limit) return vector_zero();
  vector power = attention_power(bf16, vector_sub(attention_scores(scores, mask, at, limit), largest));
  *sum = vector_add(*sum, power);
  return power;
}

TRANSOM_INLINE void attention_store_powers(int bf16, float *scores, int32_t at, vector low, vector high) {
#if defined(TRANSOM_BF16)
  if (bf16) {
    vector_store(scores + at / 2, bf16_in_order(low, high));
    return;
  }
#else
  (void)bf16;
  (void)high;
#endif
  vector_store(scores + at, low);
}

/* Replace scores (limit) by the powers of their differences to the largest one, and fill up with zeros to ``width``; in
 * BF16, width is a multiple of 2 LANES, and pairs take half the place. Returns 1 / the sum of them: 0, and zeros, where
 * there are no scores or all are masked. */
TRANSOM_INLINE float attention_softmax(int bf16, float *scores, const float *mask, int32_t limit, int32_t width) {
  vector largest = vector_set(-INFINITY), sum = vector_zero();
  int32_t step = bf16 ? 2 * LANES : LANES, whole = limit / LANES * LANES, at = 0;
  for (; at < whole; at += LANES) largest = vector_max(largest, attention_scores(scores, mask, at, at + LANES));
  if (at < limit) largest = vector_max(largest, attention_scores(scores, mask, at, limit));
  float top = vector_largest(largest);
  if (top == -INFINITY) limit = 0;
  largest = vector_set(top);
  whole = limit / step * step;
  for (at = 0; at < whole; at += step) { /* no part of a vector is outside */
    vector low = attention_powers(bf16, scores, mask, at, at + LANES, largest, &sum), high = low;
    if (bf16) high = attention_powers(bf16, scores, mask, at + LANES, at + 2 * LANES, largest, &sum);
    attention_store_powers(bf16, scores, at, low, high);
  }
  for (; at < width; at += step) {
    vector low = attention_powers(bf16, scores, mask, at, limit, largest, &sum), high = low;
    if (bf16) high = attention_powers(bf16, scores, mask, at + LANES, limit, largest, &sum);
    attention_store_powers(bf16, scores, at, low, high);
  }
  return limit > 0 ? 1.0f / vector_sum(sum) : 0.0f;
}

#endif
