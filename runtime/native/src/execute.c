/* Execute a list of operators with the kernels of one instruction set. */
#include <stddef.h>

#include "dispatch.h"

static int execute_one(const transom_kernels *kernels, const transom_operator *each, const transom_run *run,
                       transom_team *team) {
  switch (each->kind) {
    case TRANSOM_LINEAR: kernels->linear(each->record, run, team); return 1;
    case TRANSOM_ATTENTION: kernels->attention(each->record, run, team); return 1;
    case TRANSOM_EMBED: kernels->embed(each->record, run, team); return 1;
    case TRANSOM_PATCHES_OF: kernels->patches(each->record, run, team); return 1;
    case TRANSOM_PREPEND: kernels->prepend(each->record, run, team); return 1;
    case TRANSOM_SELECT: kernels->select(each->record, run, team); return 1;
    case TRANSOM_POOL: kernels->pool(each->record, run, team); return 1;
    case TRANSOM_UNPACK: kernels->unpack(each->record, run, team); return 1;
    default: return 0;
  }
}

/* The weights of the first product from ``index`` on. */
static const void *weights_from(const transom_operator *operators, int32_t index, int32_t count) {
  for (; index < count; index++)
    if (operators[index].kind == TRANSOM_LINEAR) return ((const transom_linear *)operators[index].record)->matrix.panels;
  return NULL;
}

int32_t transom_execute(int32_t isa, const transom_operator *operators, int32_t count, const transom_run *run) {
  const transom_kernels *kernels = transom_kernels_of(isa);
  if (kernels == NULL) return 1;
  transom_team team = {.threads = run->threads < 1 ? 1 : run->threads};
  for (int32_t index = 0; index < count; index++) {
    if (operators[index].kind == TRANSOM_LINEAR) team.ahead = weights_from(operators, index + 1, count);
    if (!execute_one(kernels, &operators[index], run, &team)) return index + 1;
  }
  return 0;
}
