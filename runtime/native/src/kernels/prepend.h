/* transom_prepend: a row before the patches of each image, and positions added. */
#ifndef TRANSOM_PREPEND_H
#define TRANSOM_PREPEND_H

#include "rows.h"

static void prepend_row(const void *record, const transom_run *run, int64_t row, int32_t column, int32_t count,
                        float *y) {
  const transom_prepend *prepend = record;
  int64_t before = prepend->first != NULL, tokens = prepend->patches + before, n = prepend->columns;
  int64_t image = row / tokens, token = row % tokens;
  const float *patches = transom_slot(run, prepend->in);
  const float *from =
      (token < before ? prepend->first : patches + (image * prepend->patches + token - before) * n) + column;
  if (prepend->position == NULL) {
    memcpy(y, from, (size_t)count * sizeof *y);
    return;
  }
  const float *position = prepend->position + token * n + column;
  for (int32_t each = 0; each < count; each++) y[each] = from[each] + position[each];
}

static void prepend_execute(const transom_prepend *prepend, const transom_run *run, transom_team *team) {
  rows_execute(prepend, run, team, &prepend->then, prepend_row, run->rows[TRANSOM_TOKENS], prepend->columns, 2);
}

#endif
