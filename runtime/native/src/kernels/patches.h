/* transom_patches: images cut into patches that do not overlap, each one row. */
#ifndef TRANSOM_PATCHES_H
#define TRANSOM_PATCHES_H

#include "rows.h"

static void patches_row(const void *record, const transom_run *run, int64_t row, int32_t column, int32_t count,
                        float *y) {
  const transom_patches *patches = record;
  int32_t across = patches->width / patches->patch_width, down = patches->height / patches->patch_height;
  int64_t image = row / ((int64_t)across * down), patch = row % ((int64_t)across * down);
  int64_t top = patch / across * patches->patch_height, left = patch % across * patches->patch_width;
  const float *pixels = transom_slot(run, patches->in);
  for (int32_t end = column + count; column < end;) {
    int32_t x = column % patches->patch_width, line = column / patches->patch_width;
    int32_t part = patches->patch_width - x < end - column ? patches->patch_width - x : end - column;
    int64_t channel = image * patches->channels + line / patches->patch_height;
    int64_t from = (channel * patches->height + top + line % patches->patch_height) * patches->width + left + x;
    memcpy(y, pixels + from, (size_t)part * sizeof *y);
    y += part;
    column += part;
  }
}

static void patches_execute(const transom_patches *patches, const transom_run *run, transom_team *team) {
  int32_t columns = patches->channels * patches->patch_height * patches->patch_width;
  rows_execute(patches, run, team, &patches->then, patches_row, run->rows[TRANSOM_PATCHES], columns, 1);
}

#endif
