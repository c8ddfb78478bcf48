/* Which instruction sets the library has kernels of, and which this processor says that it executes. */
#include <stddef.h>

#include "dispatch.h"

const transom_kernels *transom_kernels_of(int32_t isa) {
  switch (isa) {
    case TRANSOM_PLAIN: return &transom_plain_kernels;
#if defined(__x86_64__) || defined(TRANSOM_SIMDE)
    case TRANSOM_AVX2: return &transom_avx2_kernels;
    case TRANSOM_AVX512_VNNI: return &transom_avx512_vnni_kernels;
    case TRANSOM_AVX512_BF16: return &transom_avx512_bf16_kernels;
#endif
    default: return NULL;
  }
}

/* The processor and the system: __builtin_cpu_supports looks at the registers that the system saves, too. */
#if defined(__x86_64__) && !defined(TRANSOM_SIMDE)
static int has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static int has_avx512_vnni(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

static int has_avx512_bf16(void) { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

int32_t transom_supports(int32_t isa) {
  if (transom_kernels_of(isa) == NULL) return 0;
#if defined(__x86_64__) && !defined(TRANSOM_SIMDE)
  __builtin_cpu_init();
  if (isa == TRANSOM_AVX2) return has_avx2();
  if (isa == TRANSOM_AVX512_VNNI) return has_avx512_vnni();
  if (isa == TRANSOM_AVX512_BF16) return has_avx512_bf16();
#endif
  return 1;
}

int64_t transom_packed_bytes(int32_t isa, int32_t dtype, int32_t k, int32_t n) {
  return transom_kernels_of(isa)->packed_bytes(dtype, k, n);
}

void transom_pack(int32_t isa, int32_t dtype, int32_t k, int32_t n, int32_t column, int32_t n_part, const void *source,
                  int32_t source_dtype, int64_t stride, int32_t transposed, void *panels, int32_t *column_sum) {
  transom_kernels_of(isa)->pack(dtype, k, n, column, n_part, source, source_dtype, stride, transposed, panels,
                                column_sum);
}

int64_t transom_attention_scratch(int32_t isa, const transom_attention *attention, int32_t keys) {
  return transom_kernels_of(isa)->attention_scratch(attention, keys);
}

int32_t transom_abi(void) { return TRANSOM_ABI; }

#ifndef TRANSOM_SOURCES
#define TRANSOM_SOURCES ""
#endif
#if defined(__clang__) || !defined(__GNUC__)
#define TRANSOM_COMPILER __VERSION__
#else
#define TRANSOM_COMPILER "GCC " __VERSION__
#endif

const char *transom_compiler(void) { return TRANSOM_COMPILER; }

const char *transom_sources(void) { return TRANSOM_SOURCES; }

void transom_layout(int32_t sizes[10]) {
  const size_t all[10] = {sizeof(transom_linear), sizeof(transom_attention), sizeof(transom_embed),
                          sizeof(transom_patches), sizeof(transom_prepend), sizeof(transom_select),
                          sizeof(transom_pool), sizeof(transom_unpack), sizeof(transom_operator), sizeof(transom_run)};
  for (int32_t index = 0; index < 10; index++) sizes[index] = (int32_t)all[index];
}
