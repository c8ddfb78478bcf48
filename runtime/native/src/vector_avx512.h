/* 16 floats: AVX-512 F, BW, DQ and VL. See vector.h. */
#include "intrinsics.h"

#define LANES 16
typedef __m512 vector;

TRANSOM_INLINE vector vector_zero(void) { return _mm512_setzero_ps(); }
TRANSOM_INLINE vector vector_set(float x) { return _mm512_set1_ps(x); }
TRANSOM_INLINE vector vector_add(vector a, vector b) { return _mm512_add_ps(a, b); }
TRANSOM_INLINE vector vector_sub(vector a, vector b) { return _mm512_sub_ps(a, b); }
TRANSOM_INLINE vector vector_mul(vector a, vector b) { return _mm512_mul_ps(a, b); }
TRANSOM_INLINE vector vector_div(vector a, vector b) { return _mm512_div_ps(a, b); }
TRANSOM_INLINE vector vector_min(vector a, vector b) { return _mm512_min_ps(a, b); }
TRANSOM_INLINE vector vector_max(vector a, vector b) { return _mm512_max_ps(a, b); }
TRANSOM_INLINE vector vector_sqrt(vector a) { return _mm512_sqrt_ps(a); }
TRANSOM_INLINE vector vector_abs(vector a) { return _mm512_abs_ps(a); }
TRANSOM_INLINE vector vector_fma(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
TRANSOM_INLINE vector vector_fnma(vector a, vector b, vector c) { return _mm512_fnmadd_ps(a, b, c); }
TRANSOM_INLINE vector vector_round(vector a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TRANSOM_INLINE vector vector_scale(vector x, vector n) {
  return _mm512_mul_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(
                            _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23)));
}
TRANSOM_INLINE vector vector_raise(vector x, vector n) {
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
/* x - floor(x), 0 for minus infinity; and x * 2^floor(n), 0 where n is that: attention's powers of two. */
TRANSOM_INLINE vector vector_fraction(vector x) {
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
TRANSOM_INLINE vector vector_raise_floor(vector x, vector n) { return _mm512_scalef_ps(x, n); }
TRANSOM_INLINE vector vector_less(vector a, vector b, vector x, vector y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
TRANSOM_INLINE __mmask16 vector_mask(int32_t n) { return (__mmask16)((1u << n) - 1u); }
TRANSOM_INLINE vector vector_keep(vector x, int32_t n) { return _mm512_maskz_mov_ps(vector_mask(n), x); }

/* Halves are added until one float is left: the order is the same in every call. */
TRANSOM_INLINE float vector_sum(vector a) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
TRANSOM_INLINE float vector_largest(vector a) {
  __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

TRANSOM_INLINE vector vector_load(const float *from) { return _mm512_loadu_ps(from); }
TRANSOM_INLINE void vector_store(float *to, vector x) { _mm512_storeu_ps(to, x); }
TRANSOM_INLINE vector vector_load_u8(const uint8_t *from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)from)));
}
TRANSOM_INLINE vector vector_load_s32(const int32_t *from) {
  return _mm512_cvtepi32_ps(_mm512_loadu_si512((const void *)from));
}
TRANSOM_INLINE vector vector_load_f16(const uint16_t *from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)from));
}
/* Clamped as floats, which is exact: the bounds are whole, and a conversion of what is too large would not saturate. */
TRANSOM_INLINE __m128i vector_to_u8(vector x, int32_t zero_point) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps((float)(255 - zero_point))), _mm512_set1_ps((float)-zero_point));
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(zero_point)));
}
TRANSOM_INLINE void vector_store_u8(uint8_t *to, vector x, int32_t zero_point) {
  _mm_storeu_si128((__m128i *)(void *)to, vector_to_u8(x, zero_point));
}

#if defined(TRANSOM_SIMDE)
#include "vector_part.h" /* SIMDe's masked loads read all lanes */
#else
TRANSOM_INLINE vector vector_load_part(const float *from, int32_t n) {
  return _mm512_maskz_loadu_ps(vector_mask(n), from);
}
TRANSOM_INLINE void vector_store_part(float *to, vector x, int32_t n) {
  _mm512_mask_storeu_ps(to, vector_mask(n), x);
}
TRANSOM_INLINE vector vector_load_u8_part(const uint8_t *from, int32_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(vector_mask(n), from)));
}
TRANSOM_INLINE vector vector_load_s32_part(const int32_t *from, int32_t n) {
  return _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(vector_mask(n), from));
}
TRANSOM_INLINE vector vector_load_f16_part(const uint16_t *from, int32_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(vector_mask(n), from));
}
TRANSOM_INLINE void vector_store_u8_part(uint8_t *to, vector x, int32_t zero_point, int32_t n) {
  _mm_mask_storeu_epi8(to, vector_mask(n), vector_to_u8(x, zero_point));
}
#endif
