/* Plain C: a panel is (k, 64 columns). A product of uint8 and int8 fits 16 bits. See linear_u8s8.h. */
#define U8S8_ROWS 4
#define U8S8_GROUP 1

TRANSOM_INLINE int64_t u8s8_offset(int64_t k, int64_t index, int32_t column) {
  (void)k;
  return index * U8S8_PANEL + column;
}

/* See linear_u8s8.h. */
TRANSOM_INLINE void u8s8_pack_group(const uint8_t *from, int64_t stride, int transposed, int64_t k, int64_t index,
                                    int8_t *panel, int32_t *sums) {
  int8_t *to = panel + u8s8_offset(k, index, 0);
  if (transposed)
    for (int32_t each = 0; each < U8S8_PANEL; each++) to[each] = (int8_t)from[each * stride];
  else
    memcpy(to, from, U8S8_PANEL);
  for (int32_t each = 0; each < U8S8_PANEL; each++) sums[each] += to[each];
}

static void u8s8_tile(int32_t rows, const uint8_t *x, int32_t k, const int8_t *panel, const int8_t *next, int32_t tile,
                      int32_t tiles, const int32_t *start, int32_t *y) {
  (void)next, (void)tile, (void)tiles;
  for (int32_t row = 0; row < rows; row++) {
    int32_t *sums = y + row * U8S8_PANEL;
    memcpy(sums, start, U8S8_PANEL * sizeof *sums);
    for (int32_t index = 0; index < k; index++) {
      const int8_t *weights = panel + (int64_t)index * U8S8_PANEL;
      int16_t activation = x[(int64_t)row * k + index];
      for (int32_t column = 0; column < U8S8_PANEL; column++)
        sums[column] += (int16_t)(activation * weights[column]);
    }
  }
}
