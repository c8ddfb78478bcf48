/* Intrinsics that our kernels use and SIMDe 0.7.4 lacks; where a later one has them, its own are used. */
#ifndef TRANSOM_SIMDE_MISSING_H
#define TRANSOM_SIMDE_MISSING_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(_MM_FROUND_NO_EXC)
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif
#if !defined(_MM_FROUND_TO_NEAREST_INT)
#define _MM_FROUND_TO_NEAREST_INT SIMDE_MM_FROUND_TO_NEAREST_INT
#endif
#define __mmask16 simde__mmask16

#if !defined(_mm512_cvtps_epi32)
#define _mm512_cvtps_epi32 missing_cvtps_epi32
static inline __m512i missing_cvtps_epi32(__m512 from) {
  float x[16];
  int32_t whole[16];
  __m512i to;
  memcpy(x, &from, sizeof x);
  for (int i = 0; i < 16; i++)
    whole[i] = x[i] >= -2147483648.0f && x[i] < 2147483648.0f ? (int32_t)nearbyintf(x[i]) : INT32_MIN;
  memcpy(&to, whole, sizeof to);
  return to;
}
#endif

#if !defined(_mm512_cvtepi32_ps)
#define _mm512_cvtepi32_ps missing_cvtepi32_ps
static inline __m512 missing_cvtepi32_ps(__m512i from) {
  float x[16];
  int32_t whole[16];
  __m512 to;
  memcpy(whole, &from, sizeof whole);
  for (int i = 0; i < 16; i++) x[i] = (float)whole[i];
  memcpy(&to, x, sizeof to);
  return to;
}
#endif

#if !defined(_mm512_cvtepu8_epi32)
#define _mm512_cvtepu8_epi32 missing_cvtepu8_epi32
static inline __m512i missing_cvtepu8_epi32(__m128i from) {
  uint8_t bytes[16];
  int32_t whole[16];
  __m512i to;
  memcpy(bytes, &from, sizeof bytes);
  for (int i = 0; i < 16; i++) whole[i] = bytes[i];
  memcpy(&to, whole, sizeof to);
  return to;
}
#endif

#if !defined(_mm512_cvtepi32_epi8)
#define _mm512_cvtepi32_epi8 missing_cvtepi32_epi8
static inline __m128i missing_cvtepi32_epi8(__m512i from) {
  uint8_t bytes[16];
  int32_t whole[16];
  __m128i to;
  memcpy(whole, &from, sizeof whole);
  for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)(uint32_t)whole[i];
  memcpy(&to, bytes, sizeof to);
  return to;
}
#endif

#if !defined(_mm512_cvtph_ps)
#define _mm512_cvtph_ps missing_cvtph_ps
static inline __m512 missing_cvtph_ps(__m256i from) {
  __m128i half[2];
  __m256 eight[2];
  __m512 to;
  memcpy(half, &from, sizeof half);
  eight[0] = _mm256_cvtph_ps(half[0]);
  eight[1] = _mm256_cvtph_ps(half[1]);
  memcpy(&to, eight, sizeof to);
  return to;
}
#endif

#if !defined(_mm512_extractf32x8_ps)
#define _mm512_extractf32x8_ps missing_extractf32x8_ps
static inline __m256 missing_extractf32x8_ps(__m512 from, int half) {
  __m256 eight[2];
  memcpy(eight, &from, sizeof eight);
  return eight[half & 1];
}
#endif

#if !defined(_mm512_shuffle_f32x4)
#define _mm512_shuffle_f32x4 missing_shuffle_f32x4
static inline __m512 missing_shuffle_f32x4(__m512 a, __m512 b, int control) {
  __m128 from[2][4], quarters[4];
  __m512 to;
  memcpy(from[0], &a, sizeof a);
  memcpy(from[1], &b, sizeof b);
  for (int i = 0; i < 4; i++) quarters[i] = from[i / 2][control >> (2 * i) & 3];
  memcpy(&to, quarters, sizeof to);
  return to;
}
#endif

#if !defined(_mm512_reduce_ps)
#define _mm512_reduce_ps missing_reduce_ps
static inline __m512 missing_reduce_ps(__m512 from, int control) { /* to the next lower whole number alone */
  float x[16];
  memcpy(x, &from, sizeof x);
  (void)control;
  for (int i = 0; i < 16; i++) x[i] = isinf(x[i]) ? 0.0f : x[i] - floorf(x[i]);
  memcpy(&from, x, sizeof x);
  return from;
}
#endif

#endif
