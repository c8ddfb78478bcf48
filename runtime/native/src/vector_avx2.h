/* 8 floats: AVX2 with FMA and F16C. See vector.h. */
#include "intrinsics.h"

#define LANES 8
typedef __m256 vector;

TRANSOM_INLINE vector vector_zero(void) { return _mm256_setzero_ps(); }
TRANSOM_INLINE vector vector_set(float x) { return _mm256_set1_ps(x); }
TRANSOM_INLINE vector vector_add(vector a, vector b) { return _mm256_add_ps(a, b); }
TRANSOM_INLINE vector vector_sub(vector a, vector b) { return _mm256_sub_ps(a, b); }
TRANSOM_INLINE vector vector_mul(vector a, vector b) { return _mm256_mul_ps(a, b); }
TRANSOM_INLINE vector vector_div(vector a, vector b) { return _mm256_div_ps(a, b); }
TRANSOM_INLINE vector vector_min(vector a, vector b) { return _mm256_min_ps(a, b); }
TRANSOM_INLINE vector vector_max(vector a, vector b) { return _mm256_max_ps(a, b); }
TRANSOM_INLINE vector vector_sqrt(vector a) { return _mm256_sqrt_ps(a); }
TRANSOM_INLINE vector vector_abs(vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
TRANSOM_INLINE vector vector_fma(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
TRANSOM_INLINE vector vector_fnma(vector a, vector b, vector c) { return _mm256_fnmadd_ps(a, b, c); }
TRANSOM_INLINE vector vector_round(vector a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TRANSOM_INLINE vector vector_scale(vector x, vector n) {
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(
                            _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}
TRANSOM_INLINE vector vector_raise(vector x, vector n) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
TRANSOM_INLINE vector vector_less(vector a, vector b, vector x, vector y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
/* All bits set in the first n lanes. */
TRANSOM_INLINE __m256i vector_mask(int32_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TRANSOM_INLINE vector vector_keep(vector x, int32_t n) { return _mm256_and_ps(x, _mm256_castsi256_ps(vector_mask(n))); }

/* Halves are added until one float is left: the order is the same in every call. */
TRANSOM_INLINE float vector_sum(vector a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
TRANSOM_INLINE float vector_largest(vector a) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

TRANSOM_INLINE vector vector_load(const float *from) { return _mm256_loadu_ps(from); }
TRANSOM_INLINE void vector_store(float *to, vector x) { _mm256_storeu_ps(to, x); }
TRANSOM_INLINE vector vector_load_u8(const uint8_t *from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)from)));
}
TRANSOM_INLINE vector vector_load_s32(const int32_t *from) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(const void *)from));
}
TRANSOM_INLINE vector vector_load_f16(const uint16_t *from) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)from));
}
/* Clamped as floats, which is exact: the bounds are whole, and a conversion of what is too large would not saturate. */
TRANSOM_INLINE void vector_store_u8(uint8_t *to, vector x, int32_t zero_point) {
  x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps((float)(255 - zero_point))), _mm256_set1_ps((float)-zero_point));
  __m256i eight = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(zero_point));
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  _mm_storel_epi64((__m128i *)(void *)to, _mm_packus_epi16(words, words));
}

#include "vector_part.h"
