/* The product of rows and a packed weight, and the packing, by the weight's dtype. */
#ifndef TRANSOM_KERNEL_LINEAR_H
#define TRANSOM_KERNEL_LINEAR_H

#include "linear_f32.h"
#include "linear_u8s8.h"
#include "pack_f32.h"

static void linear(const transom_linear *record, const transom_run *run, transom_team *team) {
  if (record->matrix.dtype == TRANSOM_S8) linear_u8s8(record, run, team);
  else linear_f32(record, run, team);
}

static int64_t packed_bytes(int32_t dtype, int32_t k, int32_t n) {
  return dtype == TRANSOM_S8 ? packed_bytes_u8s8(k, n) : packed_bytes_f32(k, n);
}

static void pack(int32_t dtype, int32_t k, int32_t n, int32_t column, int32_t n_part, const void *source,
                 int32_t source_dtype, int64_t stride, int32_t transposed, void *panels, int32_t *column_sum) {
  if (dtype == TRANSOM_S8) pack_u8s8(k, n, column, n_part, source, stride, transposed, panels, column_sum);
  else pack_f32(k, n, column, n_part, source, source_dtype, stride, transposed, panels);
}

#endif
