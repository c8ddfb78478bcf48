/* transom_pool: the mean of the rows of each sequence that count. */
#ifndef TRANSOM_POOL_H
#define TRANSOM_POOL_H

#include "rows.h"

static void pool_row(const void *record, const transom_run *run, int64_t sequence, int32_t column, int32_t count,
                     float *y) {
  const transom_pool *pool = record;
  const float *in = transom_slot(run, pool->in);
  int32_t rows = 0;
  memset(y, 0, (size_t)count * sizeof *y);
  for (int64_t row = run->first_row[sequence]; row < run->first_row[sequence + 1]; row++) {
    if (run->key_valid != NULL && !run->key_valid[row]) continue;
    const float *from = in + row * pool->columns + column;
    for (int32_t each = 0; each < count; each++) y[each] += from[each];
    rows++;
  }
  if (rows == 0) return;
  for (int32_t each = 0; each < count; each++) y[each] /= (float)rows;
}

static void pool_execute(const transom_pool *pool, const transom_run *run, transom_team *team) {
  int64_t sequences = run->rows[TRANSOM_SEQUENCES], tokens = run->rows[TRANSOM_TOKENS];
  int64_t depth = sequences > 0 ? tokens / sequences : 1;
  rows_execute(pool, run, team, &pool->then, pool_row, sequences, pool->columns, depth);
}

#endif
