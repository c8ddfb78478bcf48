/* Functions of vectors, by polynomials fitted for float32 (weighted least squares towards the least largest error).
 * Largest errors over all floats, with FMA: exp 1e-7 relative (0 below -87), sigmoid and tanh 2e-7 relative, GELU and
 * its tanh form 1e-6 of the largest of |x| and 1. A NaN stays one: it comes second where a minimum is taken. */

#define EXP_LOWEST -87.0f  /* below, exp(x) is 0: its value, 1.6e-38, is all but subnormal */
#define EXP_HIGHEST 88.0f  /* above, exp(88) = 1.65e38 stands for it */
#define LOG2_E 1.44269504088896341f
#define LN2_HIGH 0.693145751953125f /* 16 bits: n * LN2_HIGH is exact */
#define LN2_LOW 1.42860682030941723e-6f

/* n and exp(r) - 1 with x = n ln 2 + r, |r| <= ln 2 / 2. */
TRANSOM_INLINE vector vector_exp_parts(vector x, vector *n) {
  *n = vector_round(vector_mul(x, vector_set(LOG2_E)));
  vector r = vector_fnma(*n, vector_set(LN2_LOW), vector_fnma(*n, vector_set(LN2_HIGH), x));
  vector q = vector_set(0.0013814433477818966f);
  q = vector_fma(q, r, vector_set(0.008368796668946743f));
  q = vector_fma(q, r, vector_set(0.041668396443128586f));
  q = vector_fma(q, r, vector_set(0.1666651964187622f));
  q = vector_fma(q, r, vector_set(0.4999999403953552f));
  return vector_fma(vector_mul(q, r), r, r);
}

TRANSOM_INLINE vector vector_exp(vector x) {
  vector n, lowest = vector_set(EXP_LOWEST);
  vector clamped = vector_max(lowest, vector_min(vector_set(EXP_HIGHEST), x));
  vector less_one = vector_exp_parts(clamped, &n);
  return vector_less(x, lowest, vector_zero(), vector_scale(vector_add(less_one, vector_set(1.0f)), n));
}

TRANSOM_INLINE vector vector_sigmoid(vector x) {
  return vector_div(vector_set(1.0f), vector_add(vector_set(1.0f), vector_exp(vector_sub(vector_zero(), x))));
}

/* (exp(2x) - 1) / (exp(2x) + 1), exp(2x) - 1 without cancellation: right for small x too. */
TRANSOM_INLINE vector vector_tanh(vector x) {
  vector n, bound = vector_set(18.1f); /* tanh(9.05) is 1 in float32 */
  vector twice = vector_max(vector_sub(vector_zero(), bound), vector_min(bound, vector_add(x, x)));
  vector less_one = vector_exp_parts(twice, &n);
  vector power = vector_scale(vector_set(1.0f), n);
  vector numerator = vector_fma(less_one, power, vector_sub(power, vector_set(1.0f)));
  return vector_div(numerator, vector_add(numerator, vector_set(2.0f)));
}

#if defined(TRANSOM_VECTOR_AVX512)
#include "gelu_avx512.h"
#else
/* x (1 + erf(x / sqrt(2))) / 2, erf as x P(x^2) / Q(x^2) up to 4 sqrt(2), where it is 1 within 2e-8. Below -5.2 the
 * value is smaller than 6e-7 and taken as 0: what rounding leaves of 1 + erf must not grow with x. */
TRANSOM_INLINE vector vector_gelu(vector x) {
  vector bound = vector_set(5.656854249492381f);
  vector z = vector_max(vector_min(x, bound), vector_sub(vector_zero(), bound));
  vector u = vector_mul(z, z);
  vector p = vector_set(4.289956834213626e-08f), q = vector_set(1.1807771806520643e-06f);
  p = vector_fma(p, u, vector_set(1.3267651411297265e-05f));
  q = vector_fma(q, u, vector_set(8.251614053733647e-05f));
  p = vector_fma(p, u, vector_set(0.0003892570093739778f));
  q = vector_fma(q, u, vector_set(0.0020284352358430624f));
  p = vector_fma(p, u, vector_set(0.009664826095104218f));
  q = vector_fma(q, u, vector_set(0.03005003184080124f));
  p = vector_fma(p, u, vector_set(0.0725453719496727f));
  q = vector_fma(q, u, vector_set(0.2575843334197998f));
  p = vector_fma(p, u, vector_set(0.7978836894035339f));
  q = vector_fma(q, u, vector_set(1.0f));
  vector half = vector_mul(x, vector_set(0.5f));
  vector y = vector_fma(half, vector_div(vector_mul(z, p), q), half);
  return vector_less(x, vector_set(-5.2f), vector_zero(), y);
}

/* x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)). */
TRANSOM_INLINE vector vector_gelu_tanh(vector x) {
  vector inner = vector_fma(vector_mul(x, x), vector_set(0.07135481627f), vector_set(1.5957691216f));
  return vector_mul(x, vector_sigmoid(vector_mul(x, inner)));
}

TRANSOM_INLINE vector vector_silu(vector x) { return vector_mul(x, vector_sigmoid(x)); }

TRANSOM_INLINE vector vector_quick_gelu(vector x) {
  return vector_mul(x, vector_sigmoid(vector_mul(x, vector_set(1.702f))));
}
#endif
