#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "transom.h"

#define LINE 64                /* bytes that processors share as one */
#define SPIN_NANOSECONDS 100000 /* that a worker looks for its next call before it sleeps: longer than serial kernels */
#define PAUSES 64              /* between two looks at the clock */
#define PATIENCE 4096          /* pauses of a caller before it lets others have its core */

/* Tasks that are being shared: on the stack of the caller, and gone when it returns. */
typedef struct {
  transom_task task;
  void *context;
  int32_t tasks;
  _Alignas(LINE) _Atomic int32_t next;
} section;

/* A worker is called by one caller at a time, the one that set ``taken``: it sets section and thread, then counts
 * ``calls`` up. When the caller has no task left it takes the section back. The worker says ``inside`` before it reads
 * the section, the caller reads inside after it took the section back, in one order that all threads see: so either the
 * worker finds none, or the caller waits until it has left. A worker that comes late, or never, holds up no one. */
typedef struct {
  _Alignas(LINE) _Atomic int32_t taken;
  _Alignas(LINE) _Atomic uint32_t calls;
  _Atomic(section *) section;
  _Atomic int32_t thread;
  _Atomic int32_t inside;
  _Atomic int32_t asleep;
  pthread_mutex_t mutex;
  pthread_cond_t called;
} worker;

static worker workers[TRANSOM_MOST_THREADS - 1];
static _Atomic int32_t worker_count;
static pthread_mutex_t growing = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t prepared = PTHREAD_ONCE_INIT;

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void take_tasks(section *shared, int32_t thread) {
  for (;;) {
    int32_t index = atomic_fetch_add_explicit(&shared->next, 1, memory_order_relaxed);
    if (index >= shared->tasks) return;
    shared->task(shared->context, index, thread);
  }
}

/* Return the number of calls once it differs from ``served``. */
static uint32_t next_call(worker *self, uint32_t served) {
  int64_t end = nanoseconds() + SPIN_NANOSECONDS;
  for (;;) {
    for (int32_t pause = 0; pause < PAUSES; pause++) {
      uint32_t calls = atomic_load_explicit(&self->calls, memory_order_acquire);
      if (calls != served) return calls;
      relax();
    }
    if (nanoseconds() >= end) break;
  }
  pthread_mutex_lock(&self->mutex);
  atomic_store(&self->asleep, 1);
  uint32_t calls;
  while ((calls = atomic_load(&self->calls)) == served) pthread_cond_wait(&self->called, &self->mutex);
  atomic_store(&self->asleep, 0);
  pthread_mutex_unlock(&self->mutex);
  return calls;
}

static void *work(void *argument) {
  worker *self = argument;
  uint32_t served = 0;
  for (;;) {
    served = next_call(self, served);
    atomic_store(&self->inside, 1);
    section *shared = atomic_load(&self->section);
    if (shared != NULL) take_tasks(shared, atomic_load(&self->thread));
    atomic_store_explicit(&self->inside, 0, memory_order_release);
  }
  return NULL;
}

static void call(worker *each, section *shared, int32_t thread) {
  atomic_store(&each->thread, thread);
  atomic_store(&each->section, shared);
  atomic_fetch_add(&each->calls, 1);
  if (!atomic_load(&each->asleep)) return;
  pthread_mutex_lock(&each->mutex);
  pthread_cond_signal(&each->called);
  pthread_mutex_unlock(&each->mutex);
}

static void take_back(worker *each) {
  atomic_store(&each->section, NULL);
  for (int32_t pauses = 0; atomic_load(&each->inside); pauses++) {
    if (pauses < PATIENCE) {
      relax();
    } else {
      sched_yield();
    }
  }
  atomic_store_explicit(&each->taken, 0, memory_order_release);
}

/* After fork the child has the calling thread alone: workers and their locks are as they were when it was made. */
static void forget(void) {
  atomic_store(&worker_count, 0);
  pthread_mutex_init(&growing, NULL);
}

static void prepare(void) { pthread_atfork(NULL, NULL, forget); }

static int start(worker *fresh) {
  atomic_store(&fresh->taken, 0);
  atomic_store(&fresh->calls, 0);
  atomic_store(&fresh->section, NULL);
  atomic_store(&fresh->inside, 0);
  atomic_store(&fresh->asleep, 0);
  pthread_mutex_init(&fresh->mutex, NULL);
  pthread_cond_init(&fresh->called, NULL);
  sigset_t all, before; /* the program's signals are its own threads' to receive */
  sigfillset(&all);
  pthread_t thread;
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int failed = pthread_create(&thread, NULL, work, fresh);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (failed) return 0;
#if defined(__linux__)
  pthread_setname_np(thread, "transom");
#endif
  pthread_detach(thread);
  return 1;
}

/* Have ``wanted`` workers, or as many as the system allows. */
static void grow(int32_t wanted) {
  pthread_once(&prepared, prepare);
  pthread_mutex_lock(&growing);
  int32_t count = atomic_load(&worker_count);
  while (count < wanted && start(&workers[count])) atomic_store(&worker_count, ++count);
  pthread_mutex_unlock(&growing);
}

void transom_parallel(transom_team *team, int32_t tasks, transom_task task, void *context) {
  int32_t threads = team->threads < tasks ? team->threads : tasks;
  if (threads > TRANSOM_MOST_THREADS) threads = TRANSOM_MOST_THREADS;
  if (threads <= 1) {
    for (int32_t index = 0; index < tasks; index++) task(context, index, 0);
    return;
  }
  section shared = {.task = task, .context = context, .tasks = tasks};
  atomic_init(&shared.next, 0);
  if (atomic_load_explicit(&worker_count, memory_order_acquire) < threads - 1) grow(threads - 1);
  int32_t count = atomic_load_explicit(&worker_count, memory_order_acquire);
  worker *called[TRANSOM_MOST_THREADS - 1];
  int32_t helpers = 0;
  for (int32_t index = 0; index < count && helpers < threads - 1; index++) {
    worker *each = &workers[index];
    if (atomic_load_explicit(&each->taken, memory_order_relaxed)) continue;
    if (atomic_exchange_explicit(&each->taken, 1, memory_order_acquire)) continue;
    called[helpers++] = each;
    call(each, &shared, helpers);
  }
  take_tasks(&shared, 0);
  for (int32_t index = 0; index < helpers; index++) take_back(called[index]);
}
