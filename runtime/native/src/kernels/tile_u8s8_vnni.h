/* vpdpbusd: four products of uint8 and int8 added to an int32, exact. A panel is (k / 4, 64 columns, 4). See
 * linear_u8s8.h. */
#define U8S8_ROWS 6 /* 24 sums, 4 vectors of weights, 1 of activations: of 32 registers */
#define U8S8_GROUP 4

TRANSOM_INLINE int64_t u8s8_offset(int64_t k, int64_t index, int32_t column) {
  (void)k;
  return index / 4 * (4 * U8S8_PANEL) + column * 4 + index % 4;
}

/* See linear_u8s8.h. x86 has the first byte of a word in its lowest bits. */
TRANSOM_INLINE void u8s8_pack_group(const uint8_t *from, int64_t stride, int transposed, int64_t k, int64_t index,
                                    int8_t *panel, int32_t *sums) {
  uint32_t words[U8S8_PANEL];
  (void)k;
  if (transposed)
    for (int32_t each = 0; each < U8S8_PANEL; each++) memcpy(words + each, from + each * stride, sizeof *words);
  else
    for (int32_t each = 0; each < U8S8_PANEL; each++)
      words[each] = from[each] | (uint32_t)from[stride + each] << 8 | (uint32_t)from[2 * stride + each] << 16 |
                    (uint32_t)from[3 * stride + each] << 24;
  memcpy(panel + index * U8S8_PANEL, words, sizeof words);
  for (int32_t each = 0; each < U8S8_PANEL; each++)
    sums[each] += (int8_t)words[each] + (int8_t)(words[each] >> 8) + (int8_t)(words[each] >> 16) +
                  (int8_t)(words[each] >> 24);
}

/* Written as assembly: around the intrinsic GCC 12 spills sums and moves them between registers. */
TRANSOM_INLINE __m512i u8s8_dot(__m512i sum, __m512i activations, __m512i weights) {
#if defined(TRANSOM_SIMDE)
  return _mm512_dpbusd_epi32(sum, activations, weights);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(activations), "v"(weights));
  return sum;
#endif
}

TRANSOM_INLINE int32_t u8s8_four(const uint8_t *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return four;
}

/* The last group of a row, which has 1 .. 3 elements: none past them is read. */
TRANSOM_INLINE int32_t u8s8_last(const uint8_t *x, int32_t count) {
  uint32_t four = 0;
  memcpy(&four, x, (size_t)count);
  return (int32_t)four;
}

#define U8S8_STEP(load)                                                                  \
  do {                                                                                   \
    __m512i w0 = _mm512_loadu_si512(panel), w1 = _mm512_loadu_si512(panel + 64);         \
    __m512i w2 = _mm512_loadu_si512(panel + 128), w3 = _mm512_loadu_si512(panel + 192);  \
    _Pragma("GCC unroll 6") for (int32_t row = 0; row < rows; row++) {                   \
      __m512i four = _mm512_set1_epi32(load);                                            \
      sums[row][0] = u8s8_dot(sums[row][0], four, w0);                                   \
      sums[row][1] = u8s8_dot(sums[row][1], four, w1);                                   \
      sums[row][2] = u8s8_dot(sums[row][2], four, w2);                                   \
      sums[row][3] = u8s8_dot(sums[row][3], four, w3);                                   \
    }                                                                                    \
    panel += 256;                                                                        \
  } while (0)

TRANSOM_INLINE void u8s8_tile_of(const int32_t rows, int ahead, const uint8_t *x, int32_t k, const int8_t *panel,
                                 const int8_t *next, const int32_t *start, int32_t *y) {
  __m512i sums[U8S8_ROWS][4];
  _Pragma("GCC unroll 6") for (int32_t row = 0; row < rows; row++)
    _Pragma("GCC unroll 4") for (int32_t part = 0; part < 4; part++)
      sums[row][part] = _mm512_loadu_si512(start + 16 * part);
  int32_t last[U8S8_ROWS] = {0}, index = 0;
  for (int32_t row = 0; row < rows && k % 4; row++) last[row] = u8s8_last(x + (int64_t)row * k + k / 4 * 4, k % 4);
  for (; index + 4 <= k; index += 4) {
    if (ahead == 1) {
      _mm_prefetch((const char *)next, _MM_HINT_T1);
      next += 64;
    } else if (ahead == 4) {
      _Pragma("GCC unroll 4") for (int line = 0; line < 4; line++)
        _mm_prefetch((const char *)next + 64 * line, _MM_HINT_T1);
      next += 256;
    }
    U8S8_STEP(u8s8_four(x + (int64_t)row * k + index));
  }
  if (index < k) U8S8_STEP(last[row]);
  _Pragma("GCC unroll 6") for (int32_t row = 0; row < rows; row++)
    _Pragma("GCC unroll 4") for (int32_t part = 0; part < 4; part++)
      _mm512_storeu_si512(y + row * U8S8_PANEL + 16 * part, sums[row][part]);
}

/* A function for each number of rows and lines ahead, so that the compiler keeps its sums in registers. */
typedef void u8s8_tile_of_rows(const uint8_t *x, int32_t k, const int8_t *panel, const int8_t *next,
                               const int32_t *start, int32_t *y);
#define U8S8_TILE(rows, ahead)                                                                               \
  static __attribute__((noinline)) void u8s8_tile_##rows##_##ahead(const uint8_t *x, int32_t k,              \
                                                                   const int8_t *panel, const int8_t *next,  \
                                                                   const int32_t *start, int32_t *y) {       \
    u8s8_tile_of(rows, ahead, x, k, panel, next, start, y);                                                  \
  }
#define U8S8_TILES(ahead) \
  U8S8_TILE(1, ahead) U8S8_TILE(2, ahead) U8S8_TILE(3, ahead) U8S8_TILE(4, ahead) U8S8_TILE(5, ahead) \
  U8S8_TILE(6, ahead)
U8S8_TILES(0)
U8S8_TILES(1)
U8S8_TILES(4)
#define U8S8_NAMES(ahead)                                                                                     \
  {u8s8_tile_1_##ahead, u8s8_tile_2_##ahead, u8s8_tile_3_##ahead, u8s8_tile_4_##ahead, u8s8_tile_5_##ahead,   \
   u8s8_tile_6_##ahead}
static u8s8_tile_of_rows *const u8s8_tiles[3][U8S8_ROWS] = {U8S8_NAMES(0), U8S8_NAMES(1), U8S8_NAMES(4)};

/* The next panel is fetched into the L2 cache meanwhile: a quarter of it by each of the first four tiles, or all of it by
 * the first, where there are fewer. */
static void u8s8_tile(int32_t rows, const uint8_t *x, int32_t k, const int8_t *panel, const int8_t *next, int32_t tile,
                      int32_t tiles, const int32_t *start, int32_t *y) {
  int ahead = next == NULL ? 0 : tiles < 4 ? (tile == 0 ? 2 : 0) : tile < 4 ? 1 : 0;
  if (ahead == 1) next += (int64_t)tile * (k / 4) * 64;
  u8s8_tiles[ahead][rows - 1](x, k, panel, next, start, y);
}

#undef U8S8_STEP
#undef U8S8_TILE
#undef U8S8_TILES
#undef U8S8_NAMES
