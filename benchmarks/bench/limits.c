/* Measure what a processor can do: operations per second on registers alone, and bytes per second read from memory.
 *
 *     limits SECONDS THREADS KERNEL...      prints one line "KERNEL RATE" each, in 1e9 per second, all threads together
 *
 * A kernel is a loop over 12 independent accumulators, so that latency does not count. A multiply-add is two operations.
 * The best of several rounds is printed: a limit is what was reached once.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROUNDS = 7, INNER = 4096, MEMORY = 512 << 20 };

static volatile int64_t sink;
static unsigned char *memory;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Twelve accumulators in registers: the statement is written out for each, and nothing is stored inside the loop. */
#define TWELVE(S) S(0) S(1) S(2) S(3) S(4) S(5) S(6) S(7) S(8) S(9) S(10) S(11)

#if defined(__x86_64__)
#include <immintrin.h>
#define KEEP(i) __asm__ volatile("" : "+x"(c##i));
#define KEEP512(i) __asm__ volatile("" : "+v"(c##i));

__attribute__((target("avx2,fma"))) static double fp32_avx2(void) {
#define S(i) __m256 c##i = _mm256_setzero_ps();
    TWELVE(S)
#undef S
    __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
    for (int n = 0; n < INNER; n++) {
#define S(i) c##i = _mm256_fmadd_ps(a, b, c##i); KEEP(i)
        TWELVE(S)
#undef S
    }
    return 12.0 * INNER * 16;
}

/* Exact at full range: 8-bit weights widened from memory to 16 bits, products added in pairs in 32 bits. */
__attribute__((target("avx2"))) static double int8_avx2(void) {
    static const signed char weights[192] __attribute__((aligned(64)));
#define S(i) __m256i c##i = _mm256_setzero_si256();
    TWELVE(S)
#undef S
    __m256i a = _mm256_set1_epi16(3);
    const signed char *at = weights;
    for (int n = 0; n < INNER / 6; n++) {
        __asm__ volatile("" : "+r"(at));
        __m256i b0 = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i *)at));
        __m256i b1 = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i *)(at + 16)));
#define S(i) c##i = _mm256_add_epi32(c##i, _mm256_madd_epi16(a, (i) & 1 ? b1 : b0)); KEEP(i)
        TWELVE(S)
#undef S
    }
    return 12.0 * (INNER / 6) * 32;
}

/* Sums of two products in 16 bits: as fast as these instructions get, wrong where they do not fit. */
__attribute__((target("avx2"))) static double int8_saturating_avx2(void) {
#define S(i) __m256i c##i = _mm256_setzero_si256();
    TWELVE(S)
#undef S
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(1), one = _mm256_set1_epi16(1);
    for (int n = 0; n < INNER; n++) {
#define S(i) __asm__ volatile("" : "+x"(a)); \
    c##i = _mm256_add_epi32(c##i, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), one)); KEEP(i)
        TWELVE(S)
#undef S
    }
    return 12.0 * INNER * 64;
}

__attribute__((target("avx512f"))) static double fp32_avx512(void) {
#define S(i) __m512 c##i = _mm512_setzero_ps();
    TWELVE(S)
#undef S
    __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
    for (int n = 0; n < INNER; n++) {
#define S(i) c##i = _mm512_fmadd_ps(a, b, c##i); KEEP512(i)
        TWELVE(S)
#undef S
    }
    return 12.0 * INNER * 32;
}

__attribute__((target("avx512f,avx512vnni"))) static double int8_avx512_vnni(void) {
#define S(i) __m512i c##i = _mm512_setzero_si512();
    TWELVE(S)
#undef S
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1);
    for (int n = 0; n < INNER; n++) {
#define S(i) c##i = _mm512_dpbusd_epi32(c##i, a, b); KEEP512(i)
        TWELVE(S)
#undef S
    }
    return 12.0 * INNER * 128;
}

__attribute__((target("avx512f,avx512bf16"))) static double bf16_avx512(void) {
#define S(i) __m512 c##i = _mm512_setzero_ps();
    TWELVE(S)
#undef S
    __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f)), b = a;
    for (int n = 0; n < INNER; n++) {
#define S(i) c##i = _mm512_dpbf16_ps(c##i, a, b); KEEP512(i)
        TWELVE(S)
#undef S
    }
    return 12.0 * INNER * 64;
}

__attribute__((target("avx2,avxvnni"))) static double int8_avx_vnni(void) {
#define S(i) __m256i c##i = _mm256_setzero_si256();
    TWELVE(S)
#undef S
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(1);
    for (int n = 0; n < INNER; n++) {
#define S(i) c##i = _mm256_dpbusd_avx_epi32(c##i, a, b); KEEP(i)
        TWELVE(S)
#undef S
    }
    return 12.0 * INNER * 64;
}

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

__attribute__((target("amx-tile"))) static void tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t columns[16]; uint8_t rows[16]; } c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < 8; i++) { c.columns[i] = 64; c.rows[i] = 16; }
    syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    _tile_loadconfig(&c);
}

__attribute__((target("amx-tile,amx-int8"))) static double int8_amx(void) {
    tiles();
    for (int n = 0; n < INNER / 16; n++) {
        _tile_dpbusd(0, 4, 6); _tile_dpbusd(1, 4, 7); _tile_dpbusd(2, 5, 6); _tile_dpbusd(3, 5, 7);
    }
    return 4.0 * (INNER / 16) * 2 * 16 * 16 * 64;
}

__attribute__((target("amx-tile,amx-bf16"))) static double bf16_amx(void) {
    tiles();
    for (int n = 0; n < INNER / 16; n++) {
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    return 4.0 * (INNER / 16) * 2 * 16 * 16 * 32;
}
#endif
#endif

#if defined(__aarch64__)
#include <arm_neon.h>
#define KEEP(i) __asm__ volatile("" : "+w"(c##i));

static double fp32_neon(void) {
#define S(i) float32x4_t c##i = vdupq_n_f32(0);
    TWELVE(S)
#undef S
    float32x4_t a = vdupq_n_f32(0.5f), b = vdupq_n_f32(0.25f);
    for (int n = 0; n < INNER; n++) {
#define S(i) c##i = vfmaq_f32(c##i, a, b); KEEP(i)
        TWELVE(S)
#undef S
    }
    return 12.0 * INNER * 8;
}

#define BY_ASSEMBLER(NAME, LINE, OPERATIONS)                                                                  \
    static double NAME(void) {                                                                                \
        int32x4_t c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, a = vdupq_n_s32(0x01010101), b = a;       \
        c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = c8 = c9 = c10 = c11 = vdupq_n_s32(0);                         \
        for (int n = 0; n < INNER; n++) { TWELVE(LINE) }                                                      \
        return 12.0 * INNER * (OPERATIONS);                                                                   \
    }
#define SDOT(i) __asm__ volatile(".arch_extension dotprod\n sdot %0.4s, %1.16b, %2.16b" : "+w"(c##i) : "w"(a), "w"(b));
#define SMMLA(i) __asm__ volatile(".arch_extension i8mm\n smmla %0.4s, %1.16b, %2.16b" : "+w"(c##i) : "w"(a), "w"(b));
#define BFMMLA(i) __asm__ volatile(".arch_extension bf16\n bfmmla %0.4s, %1.8h, %2.8h" : "+w"(c##i) : "w"(a), "w"(b));
BY_ASSEMBLER(int8_sdot, SDOT, 32)
BY_ASSEMBLER(int8_smmla, SMMLA, 64)
BY_ASSEMBLER(bf16_bfmmla, BFMMLA, 32)
#endif

typedef struct { const char *name; double (*run)(void); } kernel;
static const kernel KERNELS[] = {
#if defined(__x86_64__)
    {"fp32_avx2", fp32_avx2}, {"int8_avx2", int8_avx2}, {"int8_saturating_avx2", int8_saturating_avx2},
    {"fp32_avx512", fp32_avx512}, {"int8_avx512_vnni", int8_avx512_vnni}, {"bf16_avx512", bf16_avx512},
    {"int8_avx_vnni", int8_avx_vnni},
#if defined(__linux__)
    {"int8_amx", int8_amx}, {"bf16_amx", bf16_amx},
#endif
#elif defined(__aarch64__)
    {"fp32_neon", fp32_neon}, {"int8_sdot", int8_sdot}, {"int8_smmla", int8_smmla}, {"bf16_bfmmla", bf16_bfmmla},
#endif
    {NULL, NULL},
};

typedef struct { double (*run)(void); double seconds, done; size_t first, length; pthread_barrier_t *start; } job;

static double read_once(const unsigned char *from, size_t length) {
    const uint64_t *at = (const uint64_t *)from;
    uint64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
    for (size_t i = 0; i < length / 8; i += 8) {
        s0 += at[i]; s1 += at[i + 1]; s2 += at[i + 2]; s3 += at[i + 3];
        s4 += at[i + 4]; s5 += at[i + 5]; s6 += at[i + 6]; s7 += at[i + 7];
    }
    sink = (int64_t)(s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7);
    return (double)length;
}

static void *work(void *argument) {
    job *j = argument;
    pthread_barrier_wait(j->start);
    double began = now(), end = began + j->seconds, done = 0;
    do {
        done += j->run ? j->run() : read_once(memory + j->first, j->length);
    } while (now() < end);
    j->done = done / (now() - began);
    return NULL;
}

static double rate(double (*run)(void), double seconds, int threads) {
    double best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        pthread_t ids[threads];
        job jobs[threads];
        pthread_barrier_t start;
        pthread_barrier_init(&start, NULL, (unsigned)threads);
        double sum = 0;
        for (int i = 0; i < threads; i++) {
            size_t part = MEMORY / (size_t)threads / 64 * 64;
            jobs[i] = (job){run, seconds / ROUNDS, 0, part * (size_t)i, part, &start};
            pthread_create(&ids[i], NULL, work, &jobs[i]);
        }
        for (int i = 0; i < threads; i++) { pthread_join(ids[i], NULL); sum += jobs[i].done; }
        pthread_barrier_destroy(&start);
        if (sum > best) best = sum;
    }
    return best / 1e9;
}

int main(int count, char **words) {
    if (count < 4) { fprintf(stderr, "usage: limits SECONDS THREADS KERNEL...\n"); return 2; }
    double seconds = atof(words[1]);
    int threads = atoi(words[2]);
    for (int i = 3; i < count; i++) {
        if (!strcmp(words[i], "read")) {
            memory = aligned_alloc(64, MEMORY);
            if (!memory) { fprintf(stderr, "limits: no memory\n"); return 1; }
            memset(memory, 1, MEMORY);
            printf("read %.2f\n", rate(NULL, seconds, threads));
            free(memory);
            continue;
        }
        const kernel *k = KERNELS;
        while (k->name && strcmp(k->name, words[i])) k++;
        if (!k->name) { fprintf(stderr, "limits: unknown kernel %s\n", words[i]); return 2; }
        printf("%s %.2f\n", k->name, rate(k->run, seconds, threads));
        fflush(stdout);
    }
    return 0;
}
