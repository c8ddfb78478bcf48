/* The vector of floats of an instruction set: kernels that use these functions alone are written once for all.
 *
 * A file isa_*.c sets its target, defines TRANSOM_VECTOR_AVX512 or TRANSOM_VECTOR_AVX2 or neither, and includes this.
 * LANES floats make a ``vector``. Functions ``..._part`` take the first n lanes, 0 <= n <= LANES, touch no memory past
 * them, and read the others as zero. Sums over lanes have a fixed order.
 *
 *   vector_zero vector_set                    0 and x in all lanes
 *   vector_load vector_store                  and _part; any alignment
 *   vector_load_u8 vector_load_s32 vector_load_f16      and _part; converted to float
 *   vector_store_u8                           and _part; clamp(round_half_even(x) + zero_point, 0, 255)
 *   vector_add vector_sub vector_mul vector_div vector_sqrt vector_abs
 *   vector_min vector_max                     the second where one is NaN
 *   vector_fma(a, b, c) vector_fnma(a, b, c)  a * b + c and c - a * b (rounded once where the set has FMA)
 *   vector_round                              half to even, for |x| < 2^22
 *   vector_scale(x, n)                        x * 2^n for whole n, -126 <= n <= 127
 *   vector_raise(x, n + 1.5 * 2^23)           the same for 1 <= x < 2, and 0 for x = 1, n = -127
 *   vector_less(a, b, x, y)                   x where a < b, else y
 *   vector_keep(x, n)                         the first n lanes of x, the others zero
 *   vector_sum vector_largest                 over the lanes
 */
#ifndef TRANSOM_VECTOR_H
#define TRANSOM_VECTOR_H

#include <string.h>

#include "kernels.h"

#if defined(TRANSOM_VECTOR_AVX512)
#include "vector_avx512.h"
#elif defined(TRANSOM_VECTOR_AVX2)
#include "vector_avx2.h"
#else
#include "vector_plain.h"
#endif

#include "vector_math.h"

#endif
