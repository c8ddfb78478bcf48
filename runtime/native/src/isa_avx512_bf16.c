/* Kernels for AVX-512 with VNNI and BF16. */
#define TRANSOM_TABLE transom_avx512_bf16_kernels
#include "kernels.h"
#if defined(__x86_64__) || defined(TRANSOM_SIMDE)
#define TRANSOM_VECTOR_AVX512 1
#define TRANSOM_BF16 1
#include "intrinsics.h"
#if defined(TRANSOM_SIMDE)
/* no target: what the intrinsics mean is plain C there */
#elif defined(__clang__)
#pragma clang attribute push(\
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#endif
#include "kernels/table.h"
#if defined(__clang__) && !defined(TRANSOM_SIMDE)
#pragma clang attribute pop
#endif
#endif
