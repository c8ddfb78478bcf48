/* transom_embed: sums of rows of tables. */
#ifndef TRANSOM_EMBED_H
#define TRANSOM_EMBED_H

#include "rows.h"

/* y = scale * from, or y += scale * from where it is not the first. */
TRANSOM_INLINE void embed_add(const void *from, int32_t dtype, int64_t at, float scale, int first, int32_t count,
                              float *y) {
  for (int32_t column = 0; column < count; column += LANES) {
    int32_t lanes = count - column < LANES ? count - column : LANES;
    vector x = dtype == TRANSOM_F16 ? vector_load_f16_part((const uint16_t *)from + at + column, lanes)
                                    : vector_load_part((const float *)from + at + column, lanes);
    if (first) {
      x = vector_mul(x, vector_set(scale));
    } else {
      x = vector_fma(x, vector_set(scale), vector_load_part(y + column, lanes));
    }
    vector_store_part(y + column, x, lanes);
  }
}

static void embed_row(const void *record, const transom_run *run, int64_t row, int32_t column, int32_t count,
                      float *y) {
  const transom_embed *embed = record;
  for (int32_t table = 0; table < embed->count; table++) {
    const int32_t *ids = transom_slot(run, embed->ids[table]);
    int64_t at = (int64_t)ids[row] * embed->columns + column;
    if (embed->dtype[table] == TRANSOM_F16) {
      embed_add(embed->table[table], TRANSOM_F16, at, embed->scale[table], table == 0, count, y);
    } else {
      embed_add(embed->table[table], TRANSOM_F32, at, embed->scale[table], table == 0, count, y);
    }
  }
}

static void embed_execute(const transom_embed *embed, const transom_run *run, transom_team *team) {
  rows_execute(embed, run, team, &embed->then, embed_row, run->rows[TRANSOM_TOKENS], embed->columns, embed->count);
}

#endif
