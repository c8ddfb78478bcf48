/* uint8 rows times an int8 weight, and the epilogue of its rows: exact sums in int32, then float32.
 *
 *   y = (x - zero_point) W * scale [* row_scale[row]]
 *
 * The sums start at -zero_point * column_sum, so that they are those of x - zero_point. Weights lie in panels of
 * U8S8_PANEL columns; tile_u8s8_*.h has the inner loop of an instruction set and the order of a panel's bytes:
 *
 *   U8S8_ROWS                                     rows of a tile, at most
 *   U8S8_GROUP                                    k is padded to a multiple of it, with zeros
 *   u8s8_offset(k, index, column)                 where an element stands in its panel; k as padded. It is the sum of
 *                                                 those of (k, index, 0) and (k, 0, column)
 *   u8s8_pack_group(from, stride, transposed, k, index, panel, sums)
 *                                                 packs U8S8_GROUP rows of all columns, and adds them to sums
 *   u8s8_tile(rows, x, k, panel, next, start, y)  y (rows, U8S8_PANEL) = start (U8S8_PANEL) + x (rows, k) panel
 */
#ifndef TRANSOM_LINEAR_U8S8_H
#define TRANSOM_LINEAR_U8S8_H

#include "epilogue.h"
#include "finish_rows.h"
#include "linear_plan.h"

#define U8S8_PANEL 64

#if defined(TRANSOM_VECTOR_AVX512)
#include "tile_u8s8_vnni.h"
#elif defined(TRANSOM_VECTOR_AVX2)
#include "tile_u8s8_avx2.h"
#else
#include "tile_u8s8_plain.h"
#endif

TRANSOM_INLINE int64_t u8s8_padded(int32_t k) { return ((int64_t)k + U8S8_GROUP - 1) / U8S8_GROUP * U8S8_GROUP; }

static int64_t packed_bytes_u8s8(int32_t k, int32_t n) {
  return u8s8_padded(k) * linear_divide_up(n, U8S8_PANEL) * U8S8_PANEL;
}

/* See transom_pack. What pads k, and the columns past n, is written as zero. */
static void pack_u8s8(int32_t k, int32_t n, int32_t column, int32_t n_part, const int8_t *source, int64_t stride,
                      int32_t transposed, int8_t *panels, int32_t *column_sum) {
  int64_t padded = u8s8_padded(k);
  int32_t end = column + n_part, last = end == n ? linear_divide_up(n, U8S8_PANEL) * U8S8_PANEL : end;
  for (int32_t first = column; first < last;) {
    int32_t in_panel = first % U8S8_PANEL, count = U8S8_PANEL - in_panel;
    if (count > last - first) count = last - first;
    int32_t real = first >= end ? 0 : count < end - first ? count : end - first;
    int8_t *panel = panels + (int64_t)(first / U8S8_PANEL) * U8S8_PANEL * padded;
    int32_t sums[U8S8_PANEL] = {0};
    int64_t place[U8S8_PANEL];
    for (int32_t each = 0; each < count; each++) place[each] = u8s8_offset(padded, 0, in_panel + each);
    int64_t row = 0, across = transposed ? stride : 1, down = transposed ? 1 : stride;
    const int8_t *start = source + (first - column) * across;
    for (; real == U8S8_PANEL && row + U8S8_GROUP <= k; row += U8S8_GROUP)
      u8s8_pack_group((const uint8_t *)start + row * down, stride, transposed, padded, row, panel, sums);
    for (; row < padded; row++) {
      int8_t *to = panel + u8s8_offset(padded, row, 0);
      const int8_t *from = start + row * down;
      int32_t here = row < k ? real : 0;
      for (int32_t each = 0; each < here; each++) {
        int8_t value = from[each * across];
        to[place[each]] = value;
        sums[each] += value;
      }
      for (int32_t each = here; each < count; each++) to[place[each]] = 0;
    }
    memcpy(column_sum + first, sums, (size_t)real * sizeof *sums);
    first += count;
  }
}

typedef struct {
  const transom_linear *record;
  const transom_run *run;
  linear_plan plan;
  int32_t threads;
  const int8_t *ahead; /* the weights of the next operator, or NULL */
} linear_u8s8_job;

/* One panel of a chunk of rows: tiles of about as many rows each, finished as they come. ``next`` is the panel after it,
 * or NULL. */
static void linear_u8s8_panel(const linear_u8s8_job *job, const linear_task *task, int32_t panel, const int8_t *next) {
  const transom_linear *record = job->record;
  const transom_matrix *matrix = &record->matrix;
  int32_t k = matrix->k, n = matrix->n, column = panel * U8S8_PANEL;
  int32_t count = n - column < U8S8_PANEL ? n - column : U8S8_PANEL;
  int64_t bytes = u8s8_padded(k) * U8S8_PANEL;
  const int8_t *weights = (const int8_t *)matrix->panels + panel * bytes;
  const uint8_t *x = transom_slot(job->run, record->in);
  const float *row_scale = transom_slot(job->run, record->row_scale);
  float *out = transom_slot(job->run, record->then.out);

  int32_t start[U8S8_PANEL] __attribute__((aligned(64))) = {0};
  for (int32_t each = 0; each < count; each++)
    start[each] = (int32_t)(0u - (uint32_t)record->zero_point * (uint32_t)matrix->column_sum[column + each]);

  int32_t sums[U8S8_ROWS][U8S8_PANEL] __attribute__((aligned(64)));
  int64_t rows = task->row_end - task->row;
  int64_t tiles = linear_divide_up(rows, U8S8_ROWS);
  for (int64_t tile = 0; tile < tiles; tile++) {
    int64_t first = task->row + rows * tile / tiles, end = task->row + rows * (tile + 1) / tiles;
    u8s8_tile((int32_t)(end - first), x + first * k, k, weights, next, (int32_t)tile, (int32_t)tiles, start, sums[0]);
    epilogue_block block = {
        .rows = (int32_t)(end - first), .columns = count, .n = n,
        .y = (const float *)(const void *)sums[0], .y_stride = U8S8_PANEL,
        .scale = matrix->scale + column, .row_factor = row_scale ? row_scale + first : NULL,
        .out = out ? out + first * n + column : NULL, .out_stride = n,
    };
    epilogue_columns_of(&record->then, job->run, first, column, &block);
  }
}

static void linear_u8s8_task(void *context, int32_t index, int32_t thread) {
  const linear_u8s8_job *job = context;
  linear_task task = linear_task_of(&job->plan, index);
  (void)thread;
  const transom_matrix *matrix = &job->record->matrix;
  int64_t bytes = u8s8_padded(matrix->k) * U8S8_PANEL;
  /* This thread's next task is about as many further as there are threads; past the last one it is another operator. */
  int32_t later = index + job->threads < job->plan.row_chunks * job->plan.panel_chunks ? index + job->threads : -1;
  for (int32_t panel = task.panel; panel < task.panel_end; panel++) {
    int32_t following = panel + 1 < task.panel_end ? panel + 1 : later < 0 ? -1 : linear_task_of(&job->plan, later).panel;
    linear_u8s8_panel(job, &task, panel,
                      following < 0 ? job->ahead : (const int8_t *)matrix->panels + following * bytes);
  }
  const transom_epilogue *then = &job->record->then;
  if (job->plan.panel_chunks > 1 || !epilogue_needs_row(then)) return;
  int32_t n = job->record->matrix.n;
  float *out = transom_slot(job->run, then->out);
  for (int64_t row = task.row; row < task.row_end; row++) epilogue_row_rest(then, job->run, row, n, out + row * n);
}

static void linear_u8s8(const transom_linear *record, const transom_run *run, transom_team *team) {
  int needs_row = epilogue_needs_row(&record->then);
  int64_t rows = run->rows[record->rows];
  int32_t panels = linear_divide_up(record->matrix.n, U8S8_PANEL);
  linear_u8s8_job job = {record, run, linear_plan_of(rows, panels, team->threads, needs_row), team->threads, team->ahead};
  transom_parallel(team, job.plan.row_chunks * job.plan.panel_chunks, linear_u8s8_task, &job);
  if (needs_row && job.plan.panel_chunks > 1)
    finish_rows(&record->then, run, team, rows, record->matrix.n);
}

#endif
