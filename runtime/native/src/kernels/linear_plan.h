/* How a linear operator is cut into tasks: chunks of rows times chunks of panels (blocks of columns of the weight).
 *
 * Rows are cut where there are enough of them: a task then has all columns of its rows, and finishes them while they are
 * in its cache. Else panels are cut, and rows that are needed as a whole are finished by a second round of tasks.
 */
#ifndef TRANSOM_LINEAR_PLAN_H
#define TRANSOM_LINEAR_PLAN_H

#include "../kernels.h"

#define LINEAR_MOST_ROWS 64      /* of a task: with K = 3072 they and a panel of 64 columns take 400 KB of the L2 cache */
#define LINEAR_FEWEST_ROWS 16    /* of a task, where rows are cut: fewer read the weight too often */
#define LINEAR_TASKS_PER_THREAD 4 /* where panels are cut: what one thread is late by, others take over */

typedef struct {
  int64_t rows;
  int32_t panels;
  int32_t row_chunks, panel_chunks; /* tasks = row_chunks * panel_chunks */
} linear_plan;

typedef struct {
  int64_t row, row_end;
  int32_t panel, panel_end;
} linear_task;

static inline int32_t linear_divide_up(int64_t a, int64_t b) { return (int32_t)((a + b - 1) / b); }

/* needs_row: the epilogue needs whole rows. */
static inline linear_plan linear_plan_of(int64_t rows, int32_t panels, int32_t threads, int needs_row) {
  linear_plan plan = {rows, panels, linear_divide_up(rows, LINEAR_MOST_ROWS), 1};
  if (threads == 1 || rows == 0) return plan;
  if (rows >= (int64_t)threads * (needs_row ? LINEAR_FEWEST_ROWS : 2 * LINEAR_FEWEST_ROWS)) {
    plan.row_chunks = linear_divide_up(plan.row_chunks, threads) * threads;
  } else {
    int32_t wanted = linear_divide_up((int64_t)threads * LINEAR_TASKS_PER_THREAD, plan.row_chunks);
    plan.panel_chunks = wanted < panels ? wanted : panels;
  }
  return plan;
}

/* Chunks differ by one at most. */
static inline linear_task linear_task_of(const linear_plan *plan, int32_t index) {
  int32_t rows = index / plan->panel_chunks, panels = index % plan->panel_chunks;
  return (linear_task){
      .row = plan->rows * rows / plan->row_chunks,
      .row_end = plan->rows * (rows + 1) / plan->row_chunks,
      .panel = (int32_t)((int64_t)plan->panels * panels / plan->panel_chunks),
      .panel_end = (int32_t)((int64_t)plan->panels * (panels + 1) / plan->panel_chunks),
  };
}

#endif
