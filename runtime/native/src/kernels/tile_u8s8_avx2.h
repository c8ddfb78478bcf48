/* vpmaddwd on weights that are widened to 16 bits as they are read, and activations that are widened before: exact over
 * the whole range of both, where vpmaddubsw saturates. A panel is (4 blocks, k / 2, 16 columns, 2). See linear_u8s8.h. */
#define U8S8_ROWS 6 /* 12 sums, 2 vectors of weights, 1 of activations: of 16 registers; the product takes the last */
#define U8S8_GROUP 2
#define U8S8_BLOCK 16    /* columns */
#define U8S8_WIDENED 2048 /* of k at a time: 24 KB of the stack */
#define U8S8_STRIDE (U8S8_WIDENED + 48) /* at 4096 bytes rows would push each other out of the first cache */

TRANSOM_INLINE int64_t u8s8_offset(int64_t k, int64_t index, int32_t column) {
  return (column / U8S8_BLOCK * (k / 2) + index / 2) * (2 * U8S8_BLOCK) + column % U8S8_BLOCK * 2 + index % 2;
}

/* See linear_u8s8.h. x86 has the first byte of a word in its lowest bits. */
TRANSOM_INLINE void u8s8_pack_group(const uint8_t *from, int64_t stride, int transposed, int64_t k, int64_t index,
                                    int8_t *panel, int32_t *sums) {
  uint16_t pairs[U8S8_PANEL];
  if (transposed)
    for (int32_t each = 0; each < U8S8_PANEL; each++) memcpy(pairs + each, from + each * stride, sizeof *pairs);
  else
    for (int32_t each = 0; each < U8S8_PANEL; each++)
      pairs[each] = (uint16_t)(from[each] | (uint32_t)from[stride + each] << 8);
  for (int32_t each = 0; each < U8S8_PANEL; each += U8S8_BLOCK)
    memcpy(panel + u8s8_offset(k, index, each), pairs + each, 2 * U8S8_BLOCK);
  for (int32_t each = 0; each < U8S8_PANEL; each++) sums[each] += (int8_t)pairs[each] + (int8_t)(pairs[each] >> 8);
}

/* Pairs of elements as 16 bits each, the last one completed by a zero. */
static void u8s8_widen(const uint8_t *x, int32_t count, uint16_t *to) {
  int32_t index = 0;
  for (; index + 16 <= count; index += 16) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(x + index));
    _mm256_storeu_si256((__m256i *)(void *)(to + index), _mm256_cvtepu8_epi16(bytes));
  }
  for (; index < count; index++) to[index] = x[index];
  if (count % 2) to[count] = 0;
}

TRANSOM_INLINE void u8s8_block_of(const int32_t rows, const uint16_t (*x)[U8S8_STRIDE], int32_t pairs,
                                  const int8_t *weights, const int32_t *start, int64_t start_stride, int32_t *y) {
  __m256i sums[U8S8_ROWS][2];
  _Pragma("GCC unroll 6") for (int32_t row = 0; row < rows; row++)
    _Pragma("GCC unroll 2") for (int32_t part = 0; part < 2; part++)
      sums[row][part] = _mm256_loadu_si256((const __m256i *)(const void *)(start + row * start_stride + 8 * part));
  for (int32_t pair = 0; pair < pairs; pair++) {
    __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)weights));
    __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(weights + 16)));
    weights += 32;
    _Pragma("GCC unroll 6") for (int32_t row = 0; row < rows; row++) {
      int32_t two;
      memcpy(&two, &x[row][2 * pair], 4);
      __m256i activations = _mm256_set1_epi32(two);
      sums[row][0] = _mm256_add_epi32(sums[row][0], _mm256_madd_epi16(activations, w0));
      sums[row][1] = _mm256_add_epi32(sums[row][1], _mm256_madd_epi16(activations, w1));
    }
  }
  _Pragma("GCC unroll 6") for (int32_t row = 0; row < rows; row++)
    _Pragma("GCC unroll 2") for (int32_t part = 0; part < 2; part++)
      _mm256_storeu_si256((__m256i *)(void *)(y + row * U8S8_PANEL + 8 * part), sums[row][part]);
}

/* A function for each number of rows, so that the compiler keeps its sums in registers. */
typedef void u8s8_block_of_rows(const uint16_t (*x)[U8S8_STRIDE], int32_t pairs, const int8_t *weights,
                                const int32_t *start, int64_t start_stride, int32_t *y);
#define U8S8_BLOCK_OF(rows)                                                                                      \
  static __attribute__((noinline)) void u8s8_block_##rows(const uint16_t (*x)[U8S8_STRIDE], int32_t pairs,      \
                                                          const int8_t *weights, const int32_t *start,           \
                                                          int64_t start_stride, int32_t *y) {                    \
    u8s8_block_of(rows, x, pairs, weights, start, start_stride, y);                                              \
  }
U8S8_BLOCK_OF(1)
U8S8_BLOCK_OF(2)
U8S8_BLOCK_OF(3)
U8S8_BLOCK_OF(4)
U8S8_BLOCK_OF(5)
U8S8_BLOCK_OF(6)
#undef U8S8_BLOCK_OF
static u8s8_block_of_rows *const u8s8_blocks[U8S8_ROWS] = {u8s8_block_1, u8s8_block_2, u8s8_block_3,
                                                           u8s8_block_4, u8s8_block_5, u8s8_block_6};

static void u8s8_tile(int32_t rows, const uint8_t *x, int32_t k, const int8_t *panel, const int8_t *next, int32_t tile,
                      int32_t tiles, const int32_t *start, int32_t *y) {
  uint16_t widened[U8S8_ROWS][U8S8_STRIDE];
  int64_t padded = ((int64_t)k + 1) / 2 * 2;
  (void)next, (void)tile, (void)tiles;
  for (int32_t first = 0; first < k; first += U8S8_WIDENED) {
    int32_t count = k - first < U8S8_WIDENED ? k - first : U8S8_WIDENED;
    for (int32_t row = 0; row < rows; row++) u8s8_widen(x + (int64_t)row * k + first, count, widened[row]);
    for (int32_t column = 0; column < U8S8_PANEL; column += U8S8_BLOCK) {
      const int8_t *weights = panel + u8s8_offset(padded, first, column);
      const int32_t *from = first ? y + column : start + column;
      u8s8_blocks[rows - 1]((const uint16_t(*)[U8S8_STRIDE])widened, (count + 1) / 2, weights, from,
                            first ? U8S8_PANEL : 0, y + column);
    }
  }
}
