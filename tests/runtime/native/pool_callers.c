/* Many callers share the pool at once, for the thread sanitizer: `make native-sanitize` compiles it with threads.c.
 *
 * Each task must be done once, and no two tasks of a call may have the same thread number at the same time. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "threads.h"

#define CALLERS 8
#define CALLS 3000
#define TASKS 37
#define THREADS 5

typedef struct {
  int32_t done[TASKS];
  int32_t of_thread[THREADS]; /* written without atomics: what is shared by mistake is a race */
  _Atomic int32_t busy[THREADS];
} call;

static void task(void *context, int32_t index, int32_t thread) {
  call *each = context;
  if (atomic_exchange(&each->busy[thread], 1)) {
    fprintf(stderr, "two tasks at once have thread %d\n", (int)thread);
    exit(1);
  }
  each->done[index]++;
  each->of_thread[thread]++;
  atomic_store(&each->busy[thread], 0);
}

static void *caller(void *argument) {
  uintptr_t number = (uintptr_t)argument;
  for (int32_t turn = 0; turn < CALLS; turn++) {
    call each = {0};
    transom_team team = {.threads = 1 + (int32_t)((number + (uintptr_t)turn) % THREADS)};
    int32_t tasks = turn % (TASKS + 1), sum = 0;
    transom_parallel(&team, tasks, task, &each);
    for (int32_t index = 0; index < TASKS; index++) {
      if (each.done[index] == (index < tasks)) continue;
      fprintf(stderr, "task %d of %d was done %d times\n", (int)index, (int)tasks, (int)each.done[index]);
      exit(1);
    }
    for (int32_t thread = 0; thread < THREADS; thread++) sum += each.of_thread[thread];
    if (sum != tasks) exit(1);
  }
  return NULL;
}

int main(void) {
  pthread_t callers[CALLERS];
  for (uintptr_t each = 0; each < CALLERS; each++) pthread_create(&callers[each], NULL, caller, (void *)each);
  for (int32_t each = 0; each < CALLERS; each++) pthread_join(callers[each], NULL);
  puts("every task was done once");
  return 0;
}
