/* How fast this machine reads memory right now: every thread adds up its own part of a buffer that fits in no cache.
   Threads of its own, so that the OpenMP pool of whatever else lives in the process stays out of it. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define LANES 32 /* 256 bytes a step: four cache lines, and enough sums for the compiler to fill its vectors */
#define MAX_THREADS 256

typedef struct {
    const uint64_t *words;
    size_t count;
    uint64_t sum;
} part;

static void *add_up(void *argument) {
    part *mine = argument;
    uint64_t sums[LANES] = {0};
    for (size_t i = 0; i + LANES <= mine->count; i += LANES) {
#if defined(__GNUC__)
        for (int line = 0; line < LANES; line += 8) __builtin_prefetch(mine->words + i + 512 + line);
#endif
        for (int lane = 0; lane < LANES; lane++) sums[lane] += mine->words[i + lane];
    }
    for (int lane = 0; lane < LANES; lane++) mine->sum += sums[lane];
    return NULL;
}

/* A buffer whose pages are all present, large ones where the system has them; NULL if there is no memory for it. */
void *allocate(size_t bytes) {
    void *buffer = NULL;
    if (posix_memalign(&buffer, 1 << 21, bytes)) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(buffer, bytes, MADV_HUGEPAGE);
#endif
    memset(buffer, 1, bytes);
    return buffer;
}

/* Bytes per second of one pass over the buffer, 0 if the threads could not be started. */
double read_once(const void *buffer, size_t bytes, int threads) {
    pthread_t handles[MAX_THREADS];
    part parts[MAX_THREADS];
    struct timespec start, end;
    if (threads < 1 || threads > MAX_THREADS) return 0;
    size_t count = bytes / sizeof(uint64_t) / threads;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int i = 0; i < threads; i++) {
        parts[i] = (part){(const uint64_t *)buffer + i * count, count, 0};
        if (i && pthread_create(&handles[i], NULL, add_up, &parts[i])) return 0;
    }
    add_up(&parts[0]);
    for (int i = 1; i < threads; i++) pthread_join(handles[i], NULL);
    clock_gettime(CLOCK_MONOTONIC, &end);
    volatile uint64_t total = 0; /* the sums are used, so no pass is left out */
    for (int i = 0; i < threads; i++) total += parts[i].sum;
    return bytes / ((end.tv_sec - start.tv_sec) + (end.tv_nsec - start.tv_nsec) * 1e-9);
}
