/* Kernels for AVX-512 (F, BW, VL, DQ) with VNNI. */
#define TRANSOM_TABLE transom_avx512_vnni_kernels
#include "kernels.h"
#if defined(__x86_64__) || defined(TRANSOM_SIMDE)
#define TRANSOM_VECTOR_AVX512 1
#include "intrinsics.h"
#if defined(TRANSOM_SIMDE)
/* no target: what the intrinsics mean is plain C there */
#elif defined(__clang__)
#pragma clang attribute push(\
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#include "kernels/table.h"
#if defined(__clang__) && !defined(TRANSOM_SIMDE)
#pragma clang attribute pop
#endif
#endif
