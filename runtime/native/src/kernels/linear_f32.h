/* float32 rows times a packed float32 weight.
 *
 * A weight (k, n) lies in panels of F32_COLUMNS columns, the last one filled with zeros: panel p holds row after row
 * (k, F32_COLUMNS). A task has some rows and some panels. It goes through k in blocks, so that a block of its panels
 * stays in the second cache while all its rows pass, and through the rows in tiles, whose sums lie in registers. Rows
 * of a tile that lie multiples of 4096 bytes apart are copied side by side before: they would push each other out of
 * the first cache. An element is one chain of products over k in ascending order, however the work is split: its bits
 * depend neither on the number of threads nor on the rows beside it, and a row alone has the same ones.
 */
#ifndef TRANSOM_LINEAR_F32_H
#define TRANSOM_LINEAR_F32_H

#include "finish_rows.h"

#if defined(TRANSOM_VECTOR_AVX512)
#define F32_ROWS 12 /* a tile: 24 sums, and 2 vectors of the weight, of 32 registers */
#define F32_VECTORS 2
#define F32_DEPTH 384 /* rows of a weight in a block */
#elif defined(TRANSOM_VECTOR_AVX2)
#define F32_ROWS 6 /* 12 sums of 16 registers */
#define F32_VECTORS 2
#define F32_DEPTH 192 /* the tile's rows stay in the first cache */
#else
#define F32_ROWS 4
#define F32_VECTORS 1
#define F32_DEPTH 192
#endif
#define F32_COLUMNS (F32_VECTORS * LANES)
#define F32_TILE_STRIDE (F32_DEPTH + 16)            /* floats from row to row of a tile's copy */
#define F32_ALIASED 1024                            /* floats between rows that have the same place in the cache */
#define F32_TASK_ROWS (F32_ROWS * (132 / F32_ROWS)) /* at most, of a task: its sums stay in the second cache */
#define F32_TASK_PANELS (192 / F32_COLUMNS)
#define F32_SUM_STRIDE (F32_TASK_PANELS * F32_COLUMNS + 16)
#define F32_STEP 4                                  /* rows of a weight between lines that are fetched ahead */

TRANSOM_INLINE int32_t f32_parts(int64_t whole, int64_t part) { return (int32_t)((whole + part - 1) / part); }

/* Products of ``rows`` rows of x and ``depth`` rows of a panel, added to sums (rows, F32_COLUMNS), which start at zero
 * where ``first``. ``lines`` of ``ahead`` are fetched into the second cache every F32_STEP rows of the panel. */
TRANSOM_INLINE void f32_tile(int32_t rows, int32_t depth, const float *x, int64_t stride, const float *panel,
                             float *sums, int64_t sum_stride, int first, const float *ahead, int32_t lines) {
  vector sum[F32_ROWS][F32_VECTORS];
#pragma GCC unroll 12
  for (int32_t row = 0; row < rows; row++)
#pragma GCC unroll 2
    for (int32_t part = 0; part < F32_VECTORS; part++)
      sum[row][part] = first ? vector_zero() : vector_load(sums + row * sum_stride + part * LANES);
  int32_t step = 0;
  for (; step + F32_STEP <= depth; step += F32_STEP) {
    for (int32_t line = 0; line < lines; line++)
      __builtin_prefetch(ahead + (step / F32_STEP * lines + line) * 16, 0, 2);
#pragma GCC unroll 4
    for (int32_t k = 0; k < F32_STEP; k++) {
      vector weight[F32_VECTORS];
#pragma GCC unroll 2
      for (int32_t part = 0; part < F32_VECTORS; part++)
        weight[part] = vector_load(panel + (step + k) * F32_COLUMNS + part * LANES);
#pragma GCC unroll 12
      for (int32_t row = 0; row < rows; row++) {
        vector factor = vector_set(x[row * stride + step + k]);
#pragma GCC unroll 2
        for (int32_t part = 0; part < F32_VECTORS; part++)
          sum[row][part] = vector_fma(factor, weight[part], sum[row][part]);
      }
    }
  }
  for (; step < depth; step++) {
#pragma GCC unroll 12
    for (int32_t row = 0; row < rows; row++)
#pragma GCC unroll 2
      for (int32_t part = 0; part < F32_VECTORS; part++)
        sum[row][part] = vector_fma(vector_set(x[row * stride + step]),
                                    vector_load(panel + step * F32_COLUMNS + part * LANES), sum[row][part]);
  }
#pragma GCC unroll 12
  for (int32_t row = 0; row < rows; row++)
#pragma GCC unroll 2
    for (int32_t part = 0; part < F32_VECTORS; part++)
      vector_store(sums + row * sum_stride + part * LANES, sum[row][part]);
}

/* A function for each number of rows, so that the compiler keeps its sums in registers. */
typedef void f32_tile_of_rows(int32_t depth, const float *x, int64_t stride, const float *panel, float *sums,
                              int64_t sum_stride, int first, const float *ahead, int32_t lines);
#define F32_TILE(rows)                                                                                                \
  static __attribute__((noinline)) void f32_tile_##rows(int32_t depth, const float *x, int64_t stride,                \
                                                        const float *panel, float *sums, int64_t sum_stride,          \
                                                        int first, const float *ahead, int32_t lines) {               \
    f32_tile(rows, depth, x, stride, panel, sums, sum_stride, first, ahead, lines);                                   \
  }
F32_TILE(1)
F32_TILE(2)
F32_TILE(3)
F32_TILE(4)
#if F32_ROWS > 4
F32_TILE(5)
F32_TILE(6)
#endif
#if F32_ROWS > 6
F32_TILE(7)
F32_TILE(8)
F32_TILE(9)
F32_TILE(10)
F32_TILE(11)
F32_TILE(12)
#endif
static f32_tile_of_rows *const f32_tiles[F32_ROWS] = {
    f32_tile_1, f32_tile_2,  f32_tile_3,  f32_tile_4,
#if F32_ROWS > 4
    f32_tile_5, f32_tile_6,
#endif
#if F32_ROWS > 6
    f32_tile_7, f32_tile_8, f32_tile_9, f32_tile_10, f32_tile_11, f32_tile_12,
#endif
};

typedef struct {
  const transom_linear *record;
  const transom_run *run;
  const float *x;
  int32_t panels, task_panels, row_tasks;
  int64_t rows, task_rows;
} f32_work;

/* Sums of rows [row, row + rows) and panels [panel, panel + panels), with the columns' part of the epilogue. */
static void f32_block(const f32_work *work, int64_t row, int32_t rows, int32_t panel, int32_t panels) {
  const transom_linear *record = work->record;
  const transom_epilogue *then = &record->then;
  int32_t k = record->matrix.k, n = record->matrix.n;
  const float *weight = (const float *)record->matrix.panels + (int64_t)panel * k * F32_COLUMNS;
  const float *x = work->x + row * k;
  _Alignas(64) float sums[F32_TASK_ROWS * F32_SUM_STRIDE];
  _Alignas(64) float copy[F32_ROWS * F32_TILE_STRIDE];
  /* A tile alone is multiplied by each panel from end to end. */
  int copied = rows > F32_ROWS / 4 && k % F32_ALIASED == 0, blocked = copied || rows > F32_ROWS;
  int32_t most = blocked ? F32_DEPTH : k, tiles = f32_parts(rows, F32_ROWS);
  int32_t lines = blocked ? f32_parts(F32_STEP * F32_COLUMNS / 16, tiles) : 0;
  for (int32_t start = 0; start < k; start += most) {
    int32_t depth = k - start < most ? k - start : most;
    for (int32_t first = 0; first < rows; first += F32_ROWS) {
      int32_t tile = rows - first < F32_ROWS ? rows - first : F32_ROWS;
      const float *from = x + (int64_t)first * k + start;
      int64_t stride = k;
      if (copied) {
        for (int32_t i = 0; i < tile; i++)
          memcpy(copy + i * F32_TILE_STRIDE, from + (int64_t)i * k, (size_t)depth * sizeof *copy);
        from = copy;
        stride = F32_TILE_STRIDE;
      }
      /* The next block of each panel, a part of it with each tile. */
      int64_t ahead = (int64_t)depth * F32_COLUMNS + (int64_t)(first / F32_ROWS) * (depth / F32_STEP) * 16 * lines;
      for (int32_t i = 0; i < panels; i++) {
        const float *block = weight + ((int64_t)i * k + start) * F32_COLUMNS;
        f32_tiles[tile - 1](depth, from, stride, block, sums + first * F32_SUM_STRIDE + i * F32_COLUMNS,
                            F32_SUM_STRIDE, start == 0, block + ahead, lines);
      }
    }
  }
  int32_t column = panel * F32_COLUMNS;
  int32_t columns = n - column < panels * F32_COLUMNS ? n - column : panels * F32_COLUMNS;
  float *out = epilogue_needs_row(then) ? transom_slot(work->run, then->out) : NULL;
  for (int32_t first = 0; first < rows; first += F32_ROWS) {
    epilogue_block block = {
        .rows = rows - first < F32_ROWS ? rows - first : F32_ROWS, .columns = columns, .n = n,
        .y = sums + first * F32_SUM_STRIDE, .y_stride = F32_SUM_STRIDE,
        .out = out ? out + (row + first) * n + column : NULL, .out_stride = n,
    };
    epilogue_columns_of(then, work->run, row + first, column, &block);
  }
}

static void f32_task(void *context, int32_t index, int32_t thread) {
  const f32_work *work = context;
  (void)thread;
  int64_t row = index % work->row_tasks * work->task_rows;
  int32_t panel = index / work->row_tasks * work->task_panels;
  int64_t rows = work->rows - row < work->task_rows ? work->rows - row : work->task_rows;
  int32_t panels = work->panels - panel < work->task_panels ? work->panels - panel : work->task_panels;
  f32_block(work, row, (int32_t)rows, panel, panels);
}

static void linear_f32(const transom_linear *record, const transom_run *run, transom_team *team) {
  f32_work work = {.record = record, .run = run, .x = transom_slot(run, record->in), .rows = run->rows[record->rows]};
  if (work.rows <= 0) return;
  work.panels = f32_parts(record->matrix.n, F32_COLUMNS);
  /* Few, large tasks read memory least; each thread gets three or more, so that they end together. */
  int64_t wanted = team->threads > 1 ? 3 * team->threads : 1;
  work.task_rows = f32_parts(work.rows, f32_parts(work.rows, F32_TASK_ROWS));
  work.task_panels = F32_TASK_PANELS;
  work.row_tasks = f32_parts(work.rows, work.task_rows);
  while (work.task_panels > 2 && work.row_tasks * f32_parts(work.panels, work.task_panels) < wanted) work.task_panels--;
  while (work.task_rows > 2 * F32_ROWS && work.row_tasks * f32_parts(work.panels, work.task_panels) < wanted) {
    work.task_rows = f32_parts(work.task_rows, 2);
    work.row_tasks = f32_parts(work.rows, work.task_rows);
  }
  int32_t tasks = work.row_tasks * f32_parts(work.panels, work.task_panels);
  transom_parallel(team, tasks, f32_task, &work);
  if (epilogue_needs_row(&record->then)) finish_rows(&record->then, run, team, work.rows, record->matrix.n);
}

#endif
