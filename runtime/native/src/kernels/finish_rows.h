/* The second part of an operator whose epilogue needs whole rows: norm, and what follows it, of rows in ``out``. */
#ifndef TRANSOM_FINISH_ROWS_H
#define TRANSOM_FINISH_ROWS_H

#include "epilogue.h"

#define FINISH_LEAST_ROWS 8 /* of a task: fewer would cost more to share than to compute */

typedef struct {
  const transom_epilogue *then;
  const transom_run *run;
  int64_t rows, task_rows;
  int32_t n;
} finish_work;

static void finish_task(void *context, int32_t index, int32_t thread) {
  const finish_work *work = context;
  (void)thread;
  float *out = transom_slot(work->run, work->then->out);
  int64_t end = (index + 1) * work->task_rows < work->rows ? (index + 1) * work->task_rows : work->rows;
  for (int64_t row = index * work->task_rows; row < end; row++)
    epilogue_row_rest(work->then, work->run, row, work->n, out + row * work->n);
}

/* Rows (rows, n) of ``out`` all of whose columns went through epilogue_columns. */
static void finish_rows(const transom_epilogue *then, const transom_run *run, transom_team *team, int64_t rows,
                        int32_t n) {
  int64_t share = rows / (3 * (int64_t)team->threads);
  finish_work work = {then, run, rows, share < FINISH_LEAST_ROWS ? FINISH_LEAST_ROWS : share, n};
  transom_parallel(team, (int32_t)((rows + work.task_rows - 1) / work.task_rows), finish_task, &work);
}

#endif
