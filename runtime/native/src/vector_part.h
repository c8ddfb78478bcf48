/* Loads and stores of the first n lanes through a buffer, for sets that have no masks for them. See vector.h. */

TRANSOM_INLINE vector vector_load_part(const float *from, int32_t n) {
  float lanes[LANES] = {0};
  memcpy(lanes, from, (size_t)n * sizeof *lanes);
  return vector_load(lanes);
}
TRANSOM_INLINE void vector_store_part(float *to, vector x, int32_t n) {
  float lanes[LANES];
  vector_store(lanes, x);
  memcpy(to, lanes, (size_t)n * sizeof *lanes);
}
TRANSOM_INLINE vector vector_load_u8_part(const uint8_t *from, int32_t n) {
  uint8_t lanes[LANES] = {0};
  memcpy(lanes, from, (size_t)n);
  return vector_load_u8(lanes);
}
TRANSOM_INLINE vector vector_load_s32_part(const int32_t *from, int32_t n) {
  int32_t lanes[LANES] = {0};
  memcpy(lanes, from, (size_t)n * sizeof *lanes);
  return vector_load_s32(lanes);
}
TRANSOM_INLINE vector vector_load_f16_part(const uint16_t *from, int32_t n) {
  uint16_t lanes[LANES] = {0};
  memcpy(lanes, from, (size_t)n * sizeof *lanes);
  return vector_load_f16(lanes);
}
TRANSOM_INLINE void vector_store_u8_part(uint8_t *to, vector x, int32_t zero_point, int32_t n) {
  uint8_t lanes[LANES];
  vector_store_u8(lanes, x, zero_point);
  memcpy(to, lanes, (size_t)n);
}
