/* What the tasks of attention share: their working memory, and where the rows of a sequence and head lie. */
#ifndef TRANSOM_ATTENTION_WORK_H
#define TRANSOM_ATTENTION_WORK_H

#include "attention_softmax.h"
#include "epilogue.h"

/* Working memory of a thread: floats from its beginning to each part, and in all. */
typedef struct {
  int64_t query_stride, sum_stride, score_stride; /* of rows; queries lie at the beginning */
  int64_t sums, mask, scores, keys, values, floats;
  int32_t width; /* columns of packed values and of sums: head_dim, rounded up to vectors */
} attention_layout;

typedef struct {
  const transom_attention *record;
  const transom_run *run;
  attention_layout layout;
  float *memory;
  int32_t group, blocks, block_rows; /* query heads of a key head; tasks of a sequence and head, rows of each */
  int32_t tasks, threads;
  int bf16, pack_values, cached, store_first;
} attention_work;

/* Keys and values of one sequence and head. */
typedef struct {
  const float *keys, *values;
  int64_t key_stride, value_stride;
  const uint8_t *valid;
  int32_t count, past, causal; /* where causal, row i attends to the first past + i + 1 keys */
} attention_source;

static int attention_in_bf16(const transom_attention *record) {
#if defined(TRANSOM_BF16)
  return record->arithmetic == TRANSOM_IN_BF16;
#else
  (void)record;
  return 0;
#endif
}

/* 16 floats more than a row takes: rows at distances of 4096 bytes would push each other out of the cache. */
static attention_layout attention_layout_of(const transom_attention *record, int32_t keys) {
  int bf16 = attention_in_bf16(record);
  int64_t room = attention_round_up(keys > 0 ? keys : 1, ATTENTION_KEYS);
  attention_layout layout = {.width = attention_round_up(record->head_dim, LANES)};
  int64_t depth = attention_round_up(attention_depth(bf16, record->head_dim), 16);
  layout.query_stride = depth + 16;
  layout.sum_stride = attention_round_up(layout.width, 16) + 16;
  layout.score_stride = room + 16;
  layout.sums = ATTENTION_ROWS * layout.query_stride;
  layout.mask = layout.sums + ATTENTION_ROWS * layout.sum_stride;
  layout.scores = layout.mask + room;
  layout.keys = layout.scores + ATTENTION_ROWS * layout.score_stride;
  layout.values = layout.keys + room * depth;
  int packs = bf16 || record->head_dim % LANES != 0;
  layout.floats = layout.values + (packs ? attention_depth(bf16, (int32_t)room) * (int64_t)layout.width : 0);
  layout.floats = (layout.floats + 15) / 16 * 16;
  return layout;
}

static int64_t attention_scratch(const transom_attention *record, int32_t keys) {
  return attention_layout_of(record, keys).floats * (int64_t)sizeof(float);
}

static int32_t attention_length(const transom_run *run, int64_t sequence) {
  return run->first_row[sequence + 1] - run->first_row[sequence];
}

static attention_source attention_source_of(const attention_work *work, int64_t sequence, int32_t head) {
  const transom_attention *record = work->record;
  const transom_run *run = work->run;
  int32_t dim = record->head_dim;
  int64_t at = sequence * record->key_heads + head;
  attention_source source = {.key_stride = dim, .value_stride = dim};
  if (work->cached) {
    source.past = run->past ? run->past[sequence] : 0;
    source.count = source.past + attention_length(run, sequence);
    source.causal = 1;
    source.keys = (const float *)run->slots[record->key_cache] + at * run->capacity * dim;
    source.values = (const float *)run->slots[record->value_cache] + at * run->capacity * dim;
  } else if (record->cross_key != TRANSOM_NONE) {
    source.count = run->cross_length;
    source.valid = run->cross_valid ? run->cross_valid + sequence * run->cross_length : NULL;
    source.keys = (const float *)run->slots[record->cross_key] + at * run->cross_length * dim;
    source.values = (const float *)run->slots[record->cross_value] + at * run->cross_length * dim;
  } else {
    int64_t first = run->first_row[sequence];
    source.count = attention_length(run, sequence);
    source.causal = record->causal;
    source.valid = run->key_valid ? run->key_valid + first : NULL;
    source.key_stride = record->key_stride;
    source.value_stride = record->value_stride;
    source.keys = (const float *)run->slots[record->key] + first * record->key_stride + record->key_column +
                  (int64_t)head * dim;
    source.values = (const float *)run->slots[record->value] + first * record->value_stride + record->value_column +
                    (int64_t)head * dim;
  }
  return source;
}

/* Rows [start, end) of one sequence and key head: what a task computes. */
typedef struct {
  int64_t sequence;
  int32_t head, start, end;
} attention_part;

static attention_part attention_part_of(const attention_work *work, int32_t index) {
  int32_t block = index / work->record->key_heads;
  attention_part part = {.sequence = block / work->blocks, .head = index % work->record->key_heads};
  part.start = block % work->blocks * work->block_rows;
  part.end = attention_length(work->run, part.sequence) * work->group;
  if (part.end - part.start > work->block_rows) part.end = part.start + work->block_rows;
  return part;
}

/* Write the new rows of one sequence and head to the caches. */
static void attention_store(const attention_work *work, int64_t sequence, int32_t head) {
  const transom_attention *record = work->record;
  const transom_run *run = work->run;
  int32_t dim = record->head_dim;
  int64_t past = run->past ? run->past[sequence] : 0;
  int64_t to = ((sequence * record->key_heads + head) * run->capacity + past) * dim;
  float *keys = (float *)run->slots[record->key_cache] + to, *values = (float *)run->slots[record->value_cache] + to;
  for (int64_t row = run->first_row[sequence]; row < run->first_row[sequence + 1]; row++) {
    const float *key = (const float *)run->slots[record->key] + row * record->key_stride + record->key_column;
    const float *value = (const float *)run->slots[record->value] + row * record->value_stride + record->value_column;
    memcpy(keys, key + (int64_t)head * dim, (size_t)dim * sizeof *keys);
    memcpy(values, value + (int64_t)head * dim, (size_t)dim * sizeof *values);
    keys += dim;
    values += dim;
  }
}

static void attention_store_task(void *context, int32_t index, int32_t thread) {
  const attention_work *work = context;
  (void)thread;
  attention_store(work, index / work->record->key_heads, index % work->record->key_heads);
}

/* The query of row ``index`` of a sequence and key head. */
static const float *attention_query(const attention_work *work, int64_t sequence, int32_t head, int32_t index) {
  const transom_attention *record = work->record;
  int64_t row = work->run->first_row[sequence] + index / work->group;
  return (const float *)work->run->slots[record->query] + row * record->query_stride + record->query_column +
         ((int64_t)head * work->group + index % work->group) * record->head_dim;
}

#endif
