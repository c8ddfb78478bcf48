/* What each instruction set brings: one table of kernels, all made of the same sources in kernels/. */
#ifndef TRANSOM_KERNELS_H
#define TRANSOM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "threads.h"
#include "transom.h"

/* Small functions between a kernel's loop and its instructions: a call there would cost registers and time. */
#define TRANSOM_INLINE static inline __attribute__((always_inline))

typedef struct {
  void (*linear)(const transom_linear *record, const transom_run *run, transom_team *team);
  void (*attention)(const transom_attention *record, const transom_run *run, transom_team *team);
  void (*embed)(const transom_embed *record, const transom_run *run, transom_team *team);
  void (*patches)(const transom_patches *record, const transom_run *run, transom_team *team);
  void (*prepend)(const transom_prepend *record, const transom_run *run, transom_team *team);
  void (*select)(const transom_select *record, const transom_run *run, transom_team *team);
  void (*pool)(const transom_pool *record, const transom_run *run, transom_team *team);
  void (*unpack)(const transom_unpack *record, const transom_run *run, transom_team *team);
  int64_t (*packed_bytes)(int32_t dtype, int32_t k, int32_t n);
  void (*pack)(int32_t dtype, int32_t k, int32_t n, int32_t column, int32_t n_part, const void *source,
               int32_t source_dtype, int64_t stride, int32_t transposed, void *panels, int32_t *column_sum);
  int64_t (*attention_scratch)(const transom_attention *record, int32_t keys);
} transom_kernels;

extern const transom_kernels transom_plain_kernels;
#if defined(__x86_64__) || defined(TRANSOM_SIMDE)
extern const transom_kernels transom_avx2_kernels, transom_avx512_vnni_kernels, transom_avx512_bf16_kernels;
#endif

/* The memory of a slot, NULL for TRANSOM_NONE. */
TRANSOM_INLINE void *transom_slot(const transom_run *run, int32_t slot) {
  return slot == TRANSOM_NONE ? NULL : run->slots[slot];
}

#endif
