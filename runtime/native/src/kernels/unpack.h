/* transom_unpack: packed rows given back to padded arrays. */
#ifndef TRANSOM_UNPACK_H
#define TRANSOM_UNPACK_H

#include "rows.h"

typedef struct {
  const transom_unpack *unpack;
  const transom_run *run;
  int32_t blocks, positions; /* of a sequence; of a block */
} unpack_context;

/* The first row of a sequence that stands at a position or behind it; columns of a sequence increase. */
static int64_t unpack_row_at(const transom_run *run, int64_t sequence, int32_t position) {
  int64_t low = run->first_row[sequence], high = run->first_row[sequence + 1];
  if (run->column == NULL) return low + position < high ? low + position : high;
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (run->column[middle] < position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

static void unpack_task(void *argument, int32_t index, int32_t thread) {
  const unpack_context *all = argument;
  const transom_unpack *unpack = all->unpack;
  const transom_run *run = all->run;
  (void)thread;
  int64_t sequence = index / all->blocks, length = run->padded_length, last = run->first_row[sequence + 1];
  int32_t position = index % all->blocks * all->positions, end = position + all->positions;
  int32_t heads = unpack->heads > 0 ? unpack->heads : 1, width = unpack->columns / heads;
  const float *in = transom_slot(run, unpack->in);
  float *out = (float *)transom_slot(run, unpack->out) + sequence * length * unpack->columns;
  int64_t row = unpack_row_at(run, sequence, position);
  for (; position < end && position < length; position++) {
    int here = row < last && (run->column == NULL || run->column[row] == position);
    for (int64_t head = 0; head < heads; head++) {
      float *to = out + (head * length + position) * width;
      if (here) {
        memcpy(to, in + row * unpack->stride + unpack->column + head * width, (size_t)width * sizeof *to);
      } else {
        memset(to, 0, (size_t)width * sizeof *to);
      }
    }
    row += here;
  }
}

static void unpack_execute(const transom_unpack *unpack, const transom_run *run, transom_team *team) {
  int64_t length = run->padded_length, sequences = run->rows[TRANSOM_SEQUENCES];
  if (length < 1 || sequences < 1 || unpack->columns < 1) return;
  int64_t positions = (ROWS_OF_A_TASK + unpack->columns - 1) / unpack->columns;
  if (positions > length) positions = length;
  unpack_context all = {unpack, run, (int32_t)((length + positions - 1) / positions), (int32_t)positions};
  transom_parallel(team, (int32_t)(sequences * all.blocks), unpack_task, &all);
}

#endif
