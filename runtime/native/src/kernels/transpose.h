/* Transpose LANES vectors in registers: lane j of vector i and lane i of vector j change places. */
#ifndef TRANSOM_TRANSPOSE_H
#define TRANSOM_TRANSPOSE_H

#include "../vector.h"

#if defined(TRANSOM_VECTOR_AVX512)
/* Pairs of floats, pairs of pairs, then quarters of 128 bits twice. */
TRANSOM_INLINE void transpose(vector rows[LANES]) {
  vector pairs[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {
    rows[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    rows[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    rows[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    rows[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) { /* rows[4 j + i] has lanes i, i + 4, i + 8, i + 12 of rows 4 j ... 4 j + 3 */
    vector even_low = _mm512_shuffle_f32x4(rows[i], rows[4 + i], 0x88);
    vector odd_low = _mm512_shuffle_f32x4(rows[i], rows[4 + i], 0xdd);
    vector even_high = _mm512_shuffle_f32x4(rows[8 + i], rows[12 + i], 0x88);
    vector odd_high = _mm512_shuffle_f32x4(rows[8 + i], rows[12 + i], 0xdd);
    pairs[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    pairs[8 + i] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    pairs[4 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    pairs[12 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) rows[i] = pairs[i];
}
#elif defined(TRANSOM_VECTOR_AVX2)
TRANSOM_INLINE void transpose(vector rows[LANES]) {
  vector pairs[LANES];
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < LANES; i += 4) {
    rows[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    rows[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    rows[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    rows[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    vector low = _mm256_permute2f128_ps(rows[i], rows[4 + i], 0x20);
    rows[4 + i] = _mm256_permute2f128_ps(rows[i], rows[4 + i], 0x31);
    rows[i] = low;
  }
}
#else
TRANSOM_INLINE void transpose(vector rows[LANES]) {
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < i; j++) {
      float x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
}
#endif

#endif
