/* Numbers of 16 bits (bfloat16, rounded half to even) and their products: for AVX512-BF16. */
#ifndef TRANSOM_ATTENTION_BF16_H
#define TRANSOM_ATTENTION_BF16_H

#include "../vector.h"

/* Pairs of them in the place of floats: sum + the two products of each pair. */
TRANSOM_INLINE vector bf16_product(vector a, vector b, vector sum) {
  __m512bh x, y;
  memcpy(&x, &a, sizeof x);
  memcpy(&y, &b, sizeof y);
#if defined(TRANSOM_SIMDE)
  return simde_mm512_dpbf16_ps(sum, x, y);
#else
  return _mm512_dpbf16_ps(sum, x, y);
#endif
}

TRANSOM_INLINE vector bf16_ones(void) {
  const uint32_t pair = 0x3f803f80;
  float as_float;
  memcpy(&as_float, &pair, sizeof as_float);
  return vector_set(as_float);
}

#if defined(TRANSOM_SIMDE) /* which has no conversion */
TRANSOM_INLINE uint32_t bf16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#endif

/* Pairs (low[0], low[1]), ..., (high[0], high[1]), ...: 32 numbers in their order. */
TRANSOM_INLINE vector bf16_in_order(vector low, vector high) {
  vector pairs;
#if defined(TRANSOM_SIMDE)
  float numbers[2 * LANES];
  uint32_t words[LANES];
  vector_store(numbers, low);
  vector_store(numbers + LANES, high);
  for (int i = 0; i < LANES; i++) words[i] = bf16_bits(numbers[2 * i]) | bf16_bits(numbers[2 * i + 1]) << 16;
  memcpy(&pairs, words, sizeof pairs);
#else
  __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  memcpy(&pairs, &both, sizeof pairs);
#endif
  return pairs;
}

/* Pairs (low[0], high[0]), (low[1], high[1]), ... */
TRANSOM_INLINE vector bf16_side_by_side(vector low, vector high) {
#if defined(TRANSOM_SIMDE)
  float first[LANES], second[LANES];
  uint32_t words[LANES];
  vector pairs;
  vector_store(first, low);
  vector_store(second, high);
  for (int i = 0; i < LANES; i++) words[i] = bf16_bits(first[i]) | bf16_bits(second[i]) << 16;
  memcpy(&pairs, words, sizeof pairs);
  return pairs;
#else
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  vector pairs = bf16_in_order(low, high);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(pairs)));
#endif
}

#endif
