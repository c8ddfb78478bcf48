/* transom_select: rows of an activation by index, or all of them. */
#ifndef TRANSOM_SELECT_H
#define TRANSOM_SELECT_H

#include "rows.h"

static void select_row(const void *record, const transom_run *run, int64_t row, int32_t column, int32_t count,
                       float *y) {
  const transom_select *select = record;
  const int32_t *index = transom_slot(run, select->index);
  const float *in = transom_slot(run, select->in);
  /* Source and target are one place where all rows are normalised in place. */
  memmove(y, in + (index ? index[row] : row) * select->columns + column, (size_t)count * sizeof *y);
}

static void select_execute(const transom_select *select, const transom_run *run, transom_team *team) {
  rows_execute(select, run, team, &select->then, select_row, run->rows[select->rows], select->columns, 1);
}

#endif
