/* Rows that are fetched into the second cache while products keep the processor busy, a few at each of them.
 *
 * Rows of one head lie far apart in a projection of all heads: no processor guesses them, and packing them would wait
 * for each. First come the values of the task at hand, which follow the first scores, then keys, values and queries of
 * the task that this thread takes next where all threads keep step.
 */
#ifndef TRANSOM_ATTENTION_AHEAD_H
#define TRANSOM_ATTENTION_AHEAD_H

#include "attention_work.h"

#define ATTENTION_STREAMS 3

typedef struct {
  const float *from[ATTENTION_STREAMS]; /* NULL: no more of them */
  int64_t stride[ATTENTION_STREAMS];
  int32_t rows, row, each, columns; /* all rows, the next one, how many at a time, floats of each */
} attention_ahead;

static void attention_fetch_ahead(attention_ahead *ahead) {
  int32_t end = ahead->rows - ahead->row < ahead->each ? ahead->rows : ahead->row + ahead->each;
  for (; ahead->row < end; ahead->row++)
    for (int32_t i = 0; i < ATTENTION_STREAMS && ahead->from[i]; i++)
      attention_fetch(ahead->from[i] + ahead->row * ahead->stride[i], ahead->columns);
}

/* Values of a task, all of them fetched by the end of the scores of its first tile. */
static attention_ahead attention_ahead_of_values(const attention_work *work, const attention_source *source, int keep) {
  attention_ahead ahead = {.columns = work->record->head_dim};
  if (!keep) return ahead;
  ahead.from[0] = source->values;
  ahead.stride[0] = source->value_stride;
  ahead.rows = source->count;
  ahead.each = ATTENTION_PANEL;
  return ahead;
}

/* What a thread probably computes after the task ``index``, whose tiles have ``rows`` rows in all. */
static attention_ahead attention_ahead_of_task(const attention_work *work, int32_t index, int32_t rows) {
  const transom_attention *record = work->record;
  attention_ahead ahead = {.columns = record->head_dim};
  if (work->cached || record->cross_key != TRANSOM_NONE || index + work->threads >= work->tasks) return ahead;
  attention_part next = attention_part_of(work, index + work->threads);
  if (next.start >= next.end) return ahead;
  attention_source source = attention_source_of(work, next.sequence, next.head);
  ahead.from[0] = source.keys;
  ahead.from[1] = source.values;
  ahead.from[2] = attention_query(work, next.sequence, next.head, 0);
  ahead.stride[0] = source.key_stride;
  ahead.stride[1] = source.value_stride;
  ahead.stride[2] = record->query_stride;
  ahead.rows = source.count;
  /* A tile has a product for each panel of keys, and some for the values. */
  int32_t products = (rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS * (source.count / ATTENTION_PANEL + 1);
  ahead.each = ahead.rows / products + 1;
  return ahead;
}

#endif
