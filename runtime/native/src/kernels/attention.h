/* softmax(scale * q k^T) v of all heads: transom_attention, in all its forms.
 *
 * A task has rows of one sequence and one key head, those of all query heads that share it, and works on a tile of
 * ATTENTION_ROWS of them at a time: all scores of the tile, their softmax, then the sum of values. Keys are packed for
 * the first tile, and kept where others follow. All sums are chains in ascending order of columns or of keys: the bits
 * of a row depend neither on the rows beside it, nor on the tile it is in, nor on threads: a row of a decoder has the
 * same ones whether it is computed with others or alone after them.
 */
#ifndef TRANSOM_KERNEL_ATTENTION_H
#define TRANSOM_KERNEL_ATTENTION_H

#include "attention_ahead.h"
#include "finish_rows.h"

#define LOG2_OF_E 1.44269504088896341f

/* Queries of rows [first, first + rows) of a sequence and head, times scale * log2(e); the tile's other rows are 0.
 * Those of the next tile, up to the row ``end``, are fetched ahead. */
TRANSOM_INLINE void attention_queries_as(int bf16, int whole, const attention_work *work, int64_t sequence,
                                         int32_t head, int32_t first, int32_t rows, int32_t end, float *to) {
  const transom_attention *record = work->record;
  int32_t dim = record->head_dim, depth = attention_depth(bf16, dim);
  int64_t stride = work->layout.query_stride;
  vector factor = vector_set(record->scale * LOG2_OF_E);
  for (int32_t i = 0; i < rows; i++, to += stride) {
    const float *from = attention_query(work, sequence, head, first + i);
    if (first + i + ATTENTION_ROWS < end)
      attention_fetch(attention_query(work, sequence, head, first + i + ATTENTION_ROWS), dim);
    for (int32_t at = 0; at < depth; at += LANES) {
#if defined(TRANSOM_BF16)
      if (bf16) {
        vector low = whole ? vector_load(from + 2 * at) : attention_load(from, 2 * at, dim);
        vector high = whole ? vector_load(from + 2 * at + LANES) : attention_load(from, 2 * at + LANES, dim);
        vector_store(to + at, bf16_in_order(vector_mul(low, factor), vector_mul(high, factor)));
        continue;
      }
#endif
      vector_store(to + at, vector_mul(whole ? vector_load(from + at) : attention_load(from, at, dim), factor));
    }
  }
  for (int32_t i = rows; i < ATTENTION_ROWS; i++, to += stride) memset(to, 0, (size_t)stride * sizeof *to);
}

static void attention_queries(const attention_work *work, int64_t sequence, int32_t head, int32_t first, int32_t rows,
                              int32_t end, float *to) {
  int whole = attention_whole(work->bf16, work->record->head_dim);
  if (work->bf16 && whole) attention_queries_as(1, 1, work, sequence, head, first, rows, end, to);
  else if (work->bf16) attention_queries_as(1, 0, work, sequence, head, first, rows, end, to);
  else if (whole) attention_queries_as(0, 1, work, sequence, head, first, rows, end, to);
  else attention_queries_as(0, 0, work, sequence, head, first, rows, end, to);
}

/* Scores of a tile and the first ``limit`` keys. Keys from ``packed`` on are packed; without ``keep`` each chunk takes
 * the place of the one before. Returns how many are packed. */
static int32_t attention_score(const attention_work *work, const attention_source *source, attention_ahead *ahead,
                               float *memory, int32_t rows, int32_t limit, int32_t packed, int keep) {
  const attention_layout *layout = &work->layout;
  int32_t dim = work->record->head_dim, depth = attention_depth(work->bf16, dim);
  for (int32_t start = 0; start < limit; start += ATTENTION_KEYS) {
    float *chunk = memory + layout->keys + (keep ? (int64_t)start * depth : 0);
    int32_t end = keep ? source->count : limit;
    int32_t count = end - start < ATTENTION_KEYS ? end - start : ATTENTION_KEYS;
    if (start >= packed) {
      attention_pack_keys(work->bf16, source->keys + start * source->key_stride, source->key_stride, count, end - start,
                          dim, chunk);
      packed = start + count;
    }
    int32_t wanted = limit - start < count ? limit - start : count;
    for (int32_t key = 0; key < wanted; key += ATTENTION_PANEL) {
      attention_fetch_ahead(ahead);
      attention_multiply(rows, wanted - key > LANES ? 2 : 1, work->bf16, depth, memory, layout->query_stride,
                         chunk + (int64_t)(key / ATTENTION_PANEL) * depth * ATTENTION_PANEL, ATTENTION_PANEL,
                         memory + layout->scores + start + key, layout->score_stride, 1);
    }
  }
  return packed;
}

/* The sums of a tile: weights (rows, limit) times values, which are packed as keys are. */
static int32_t attention_sum(const attention_work *work, const attention_source *source, attention_ahead *ahead,
                             float *memory, int32_t rows, int32_t limit, int32_t packed, int keep) {
  const attention_layout *layout = &work->layout;
  int32_t dim = work->record->head_dim;
  for (int32_t start = 0; start < limit; start += ATTENTION_KEYS) {
    const float *values = source->values + start * source->value_stride;
    int64_t stride = source->value_stride;
    int32_t end = keep ? source->count : limit;
    int32_t count = end - start < ATTENTION_KEYS ? end - start : ATTENTION_KEYS;
    int32_t wanted = limit - start < count ? limit - start : count;
    if (work->pack_values) {
      int64_t at = keep ? (int64_t)attention_depth(work->bf16, start) * layout->width : 0;
      float *chunk = memory + layout->values + at;
      if (start >= packed) {
        attention_pack_values(work->bf16, values, stride, count, dim, layout->width, chunk);
        packed = start + count;
      }
      values = chunk;
      stride = layout->width;
      wanted = attention_depth(work->bf16, wanted);
    }
    const float *weights = memory + layout->scores + attention_depth(work->bf16, start);
    for (int32_t column = 0, parts; column < layout->width; column += parts * LANES) {
      int32_t rest = (layout->width - column) / LANES;
      parts = rows <= 2 && !work->bf16 && rest >= ATTENTION_PARTS ? ATTENTION_PARTS : rest > 1 ? 2 : 1;
      attention_fetch_ahead(ahead);
      attention_multiply(rows, parts, work->bf16, wanted, weights, layout->score_stride, values + column, stride,
                         memory + layout->sums + column, layout->sum_stride, start == 0);
    }
  }
  return packed;
}

/* Softmax of all rows of a tile; factor has the inverse of each row's sum. */
TRANSOM_INLINE void attention_weigh_as(int bf16, const attention_work *work, const attention_source *source,
                                       float *scores, const float *mask, int32_t first, int32_t rows, int32_t limit,
                                       float *factor) {
  int32_t limits[ATTENTION_ROWS];
  for (int32_t i = 0; i < rows; i++)
    limits[i] = source->causal ? source->past + (first + i) / work->group + 1 : source->count;
  attention_softmax(bf16, scores, work->layout.score_stride, mask, rows, limits,
                    attention_round_up(limit, bf16 ? 2 * LANES : LANES), factor);
}

static void attention_weigh(const attention_work *work, const attention_source *source, float *memory, int32_t first,
                            int32_t rows, int32_t limit, float *factor) {
  float *scores = memory + work->layout.scores;
  const float *mask = source->valid ? memory + work->layout.mask : NULL;
  if (work->bf16 && mask)
    attention_weigh_as(1, work, source, scores, mask, first, rows, limit, factor);
  else if (work->bf16)
    attention_weigh_as(1, work, source, scores, NULL, first, rows, limit, factor);
  else if (mask)
    attention_weigh_as(0, work, source, scores, mask, first, rows, limit, factor);
  else
    attention_weigh_as(0, work, source, scores, NULL, first, rows, limit, factor);
}

/* Finish the rows of a tile: their columns of this head, times the row's factor, go through the epilogue. */
static void attention_finish(const attention_work *work, int64_t sequence, int32_t head, float *memory, int32_t first,
                             int32_t rows, const float *factor, int empty) {
  const transom_epilogue *then = &work->record->then;
  const attention_layout *layout = &work->layout;
  int32_t dim = work->record->head_dim, n = work->record->heads * dim;
  float *sums = memory + layout->sums;
  if (empty) memset(sums, 0, (size_t)(rows * layout->sum_stride) * sizeof *sums);
  float *out = epilogue_needs_row(then) ? transom_slot(work->run, then->out) : NULL;
  int32_t together = work->group == 1 ? rows : 1; /* rows of the tile that are neighbours in one head */
  for (int32_t i = 0; i < rows; i += together) {
    int64_t row = work->run->first_row[sequence] + (first + i) / work->group;
    int32_t column = (head * work->group + (first + i) % work->group) * dim;
    epilogue_block block = {
        .rows = together, .columns = dim, .n = n, .y = sums + i * layout->sum_stride, .y_stride = layout->sum_stride,
        .row_factor = factor + i, .out = out ? out + row * n + column : NULL, .out_stride = n,
    };
    epilogue_columns_of(then, work->run, row, column, &block);
  }
}

static void attention_task(void *context, int32_t index, int32_t thread) {
  const attention_work *work = context;
  attention_part part = attention_part_of(work, index);
  int64_t sequence = part.sequence;
  int32_t head = part.head, start = part.start, end = part.end;
  if (start >= end) return;
  float *memory = work->memory + thread * work->layout.floats;
  if (work->cached && !work->store_first) attention_store(work, sequence, head);
  attention_source source = attention_source_of(work, sequence, head);
  if (source.valid) {
    float *mask = memory + work->layout.mask;
    int32_t padded = attention_round_up(source.count, LANES);
    for (int32_t key = 0; key < padded; key++) mask[key] = key < source.count && source.valid[key] ? 0.0f : -INFINITY;
  }
  int32_t keys = 0, values = 0;
  int keep = end - start > ATTENTION_ROWS;
  attention_ahead ahead = attention_ahead_of_values(work, &source, keep);
  for (int32_t first = start; first < end; first += ATTENTION_ROWS) {
    int32_t rows = end - first < ATTENTION_ROWS ? end - first : ATTENTION_ROWS;
    int32_t limit = source.causal ? source.past + (first + rows - 1) / work->group + 1 : source.count;
    float factor[ATTENTION_ROWS];
    attention_queries(work, sequence, head, first, rows, end, memory);
    keys = attention_score(work, &source, &ahead, memory, rows, limit, keys, keep);
    attention_weigh(work, &source, memory, first, rows, limit, factor);
    if (first == start) ahead = attention_ahead_of_task(work, index, end - start);
    values = attention_sum(work, &source, &ahead, memory, rows, limit, values, keep);
    attention_finish(work, sequence, head, memory, first, rows, factor, limit == 0);
  }
}

static void attention(const transom_attention *record, const transom_run *run, transom_team *team) {
  attention_work work = {.record = record, .run = run, .bf16 = attention_in_bf16(record)};
  int64_t sequences = run->rows[TRANSOM_SEQUENCES];
  work.cached = record->key_cache != TRANSOM_NONE;
  work.group = record->heads / record->key_heads;
  work.pack_values = work.bf16 || record->head_dim % LANES != 0;
  work.memory = transom_slot(run, record->scores);
  work.threads = team->threads;
  int32_t longest = 0, keys = record->cross_key != TRANSOM_NONE ? run->cross_length : 0;
  for (int64_t sequence = 0; sequence < sequences; sequence++) {
    int32_t length = attention_length(run, sequence), past = work.cached && run->past ? run->past[sequence] : 0;
    longest = length > longest ? length : longest;
    if (record->cross_key == TRANSOM_NONE && past + length > keys) keys = past + length;
  }
  if (longest == 0) return;
  work.layout = attention_layout_of(record, keys);
  /* The rows of a sequence and head are one task, unless there are too few of these for all threads. */
  int64_t heads = sequences * record->key_heads, rows = (int64_t)longest * work.group;
  int64_t wanted = team->threads > 1 && heads < 3 * team->threads ? (3 * team->threads + heads - 1) / heads : 1;
  int64_t tiles = (rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
  int64_t block_tiles = (tiles + wanted - 1) / wanted;
  work.block_rows = (int32_t)(block_tiles * ATTENTION_ROWS);
  work.blocks = (int32_t)((tiles + block_tiles - 1) / block_tiles);
  work.store_first = work.cached && work.blocks > 1;
  if (work.store_first) transom_parallel(team, (int32_t)heads, attention_store_task, &work);
  work.tasks = (int32_t)(heads * work.blocks);
  transom_parallel(team, work.tasks, attention_task, &work);
  if (epilogue_needs_row(&record->then))
    finish_rows(&record->then, run, team, run->rows[TRANSOM_TOKENS], record->heads * record->head_dim);
}

#endif
