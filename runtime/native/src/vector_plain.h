/* 8 floats in the compiler's own vectors: any processor. See vector.h. */
#include <math.h>

#define LANES 8
typedef float vector __attribute__((vector_size(32)));
typedef int32_t vector_ints __attribute__((vector_size(32)));
typedef uint8_t vector_bytes __attribute__((vector_size(8)));

TRANSOM_INLINE vector vector_zero(void) { return (vector){0}; }
TRANSOM_INLINE vector vector_set(float x) { return (vector){x, x, x, x, x, x, x, x}; }
TRANSOM_INLINE vector vector_add(vector a, vector b) { return a + b; }
TRANSOM_INLINE vector vector_sub(vector a, vector b) { return a - b; }
TRANSOM_INLINE vector vector_mul(vector a, vector b) { return a * b; }
TRANSOM_INLINE vector vector_div(vector a, vector b) { return a / b; }
TRANSOM_INLINE vector vector_fma(vector a, vector b, vector c) { return a * b + c; }
TRANSOM_INLINE vector vector_fnma(vector a, vector b, vector c) { return c - a * b; }
TRANSOM_INLINE vector vector_choose(vector_ints mask, vector x, vector y) {
  return (vector)((mask & (vector_ints)x) | (~mask & (vector_ints)y));
}
TRANSOM_INLINE vector vector_raise(vector x, vector n) {
  typedef uint32_t bits __attribute__((vector_size(32)));
  return (vector)((bits)x + ((bits)n << 23));
}
TRANSOM_INLINE vector vector_less(vector a, vector b, vector x, vector y) { return vector_choose(a < b, x, y); }
TRANSOM_INLINE vector vector_min(vector a, vector b) { return vector_choose(a < b, a, b); }
TRANSOM_INLINE vector vector_max(vector a, vector b) { return vector_choose(a > b, a, b); }
TRANSOM_INLINE vector vector_sqrt(vector a) {
  for (int i = 0; i < LANES; i++) a[i] = sqrtf(a[i]);
  return a;
}
TRANSOM_INLINE vector vector_abs(vector a) { return (vector)((vector_ints)a & 0x7fffffff); }
/* At 1.5 * 2^23 floats are whole, so the sum is rounded, half to even. */
TRANSOM_INLINE vector vector_round(vector a) { return (a + 12582912.0f) - 12582912.0f; }
TRANSOM_INLINE vector vector_scale(vector x, vector n) {
  return x * (vector)((__builtin_convertvector(n, vector_ints) + 127) << 23);
}
TRANSOM_INLINE vector vector_keep(vector x, int32_t n) {
  return (vector)((vector_ints)x & ((vector_ints){0, 1, 2, 3, 4, 5, 6, 7} < n));
}

/* Halves are added until one float is left: the order is the same in every call. */
TRANSOM_INLINE float vector_sum(vector a) {
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}
TRANSOM_INLINE float vector_largest(vector a) {
  float largest = a[0];
  for (int i = 1; i < LANES; i++) largest = a[i] > largest ? a[i] : largest;
  return largest;
}

TRANSOM_INLINE vector vector_load(const float *from) {
  vector x;
  memcpy(&x, from, sizeof x);
  return x;
}
TRANSOM_INLINE void vector_store(float *to, vector x) { memcpy(to, &x, sizeof x); }
TRANSOM_INLINE vector vector_load_u8(const uint8_t *from) {
  vector_bytes x;
  memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, vector);
}
TRANSOM_INLINE vector vector_load_s32(const int32_t *from) {
  vector_ints x;
  memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, vector);
}
/* Exponent and fraction move to their places in a float, whose exponent is then too small by 112: a product with 2^112
 * mends that for normal and subnormal numbers; infinities and NaNs get the largest exponent. */
TRANSOM_INLINE vector vector_load_f16(const uint16_t *from) {
  vector_ints bits;
  for (int i = 0; i < LANES; i++) bits[i] = from[i];
  vector_ints magnitude = (bits & 0x7fff) << 13;
  vector_ints not_finite = magnitude >= 0x0f800000;
  vector finite = (vector)magnitude * 5192296858534827628530496329220096.0f;
  vector_ints result = (not_finite & (magnitude | 0x7f800000)) | (~not_finite & (vector_ints)finite);
  return (vector)(result | ((bits & 0x8000) << 16));
}
/* Clamped as floats, which is exact: the bounds are whole, and a conversion of what is too large has no meaning. */
TRANSOM_INLINE void vector_store_u8(uint8_t *to, vector x, int32_t zero_point) {
  x = vector_max(vector_min(x, vector_set((float)(255 - zero_point))), vector_set((float)-zero_point));
  vector_ints whole = __builtin_convertvector(vector_round(x), vector_ints) + zero_point;
  vector_bytes bytes = __builtin_convertvector(whole, vector_bytes);
  memcpy(to, &bytes, sizeof bytes);
}

#include "vector_part.h"
