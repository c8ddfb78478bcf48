/* Rows that are made and finished one by one: what the kernels without products have in common. */
#ifndef TRANSOM_ROWS_H
#define TRANSOM_ROWS_H

#include "epilogue.h"

#define ROWS_BLOCK 512        /* columns that are made at once: 2 KiB, on the stack */
#define ROWS_OF_A_TASK 16384 /* floats that are worth another thread: some microseconds of memory traffic */

/* Write columns [column, column + count) of a row to y. */
typedef void (*rows_make)(const void *record, const transom_run *run, int64_t row, int32_t column, int32_t count,
                          float *y);

typedef struct {
  const void *record;
  const transom_run *run;
  const transom_epilogue *then;
  rows_make make;
  int64_t rows, rows_of_a_task;
  int32_t n;
} rows_context;

static void rows_task(void *argument, int32_t index, int32_t thread) {
  const rows_context *all = argument;
  (void)thread;
  int64_t row = index * all->rows_of_a_task, end = row + all->rows_of_a_task;
  float *out = transom_slot(all->run, all->then->out);
  for (end = end < all->rows ? end : all->rows; row < end; row++) {
    if (epilogue_needs_row(all->then)) {
      float *y = out + row * all->n;
      all->make(all->record, all->run, row, 0, all->n, y);
      epilogue_row(all->then, all->run, row, all->n, y);
      continue;
    }
    /* Not in place: out may be the residual, which is read after the row is made. */
    for (int32_t column = 0; column < all->n; column += ROWS_BLOCK) {
      float y[ROWS_BLOCK];
      int32_t count = all->n - column < ROWS_BLOCK ? all->n - column : ROWS_BLOCK;
      all->make(all->record, all->run, row, column, count, y);
      epilogue_columns(all->then, all->run, row, all->n, column, count, y);
    }
  }
}

/* Make and finish ``rows`` rows of n columns, each of which reads ``depth`` floats for each that it writes. */
static void rows_execute(const void *record, const transom_run *run, transom_team *team, const transom_epilogue *then,
                         rows_make make, int64_t rows, int32_t n, int64_t depth) {
  int64_t floats = (int64_t)n * (depth < 1 ? 1 : depth);
  int64_t each = floats < 1 ? rows : (ROWS_OF_A_TASK + floats - 1) / floats;
  if (rows / (each < 1 ? 1 : each) > 64 * (int64_t)team->threads) each = rows / (64 * (int64_t)team->threads);
  rows_context all = {record, run, then, make, rows, each < 1 ? 1 : each, n};
  transom_parallel(team, (int32_t)((rows + all.rows_of_a_task - 1) / all.rows_of_a_task), rows_task, &all);
}

#endif
