/* Share the tasks of a kernel among the threads of one pool that all callers of the process use. */
#ifndef TRANSOM_THREADS_H
#define TRANSOM_THREADS_H

#include <stdint.h>

#define TRANSOM_MOST_THREADS 256 /* of one run, the caller's own among them; more are not used */

/* What one call of transom_execute has: at most so many threads, the caller's own among them. */
typedef struct {
  int32_t threads;
  const void *ahead; /* packed weights that the next product will read, or NULL: fetched while the last ones are used */
} transom_team;

/* One task of many: ``index`` counts from 0, ``thread`` is below the team's threads and no other task that runs at the
 * same time has it: working memory may be kept by it. */
typedef void (*transom_task)(void *context, int32_t index, int32_t thread);

/* Do tasks 0 .. tasks - 1, taken in this order by the caller and by those workers that are idle; return when all are
 * done, and everything that they wrote can be read. A task must not call this itself. */
void transom_parallel(transom_team *team, int32_t tasks, transom_task task, void *context);

#endif
