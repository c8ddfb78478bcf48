/* The interface of the native library: operators of a Transformer as plain records, executed in order.
 *
 * Python fills these records (transom.runtime.native.records mirrors them, and transom_layout proves that it does),
 * validates everything in them, and calls transom_execute once per run. Activations are named by slots: a slot is an
 * index into the table of pointers that a run brings, so that the records are made once and no run changes them.
 * Rows are packed: the token rows of all sequences lie one after the other, without padding between them.
 */
#ifndef TRANSOM_H
#define TRANSOM_H

#include <stdint.h>

#define TRANSOM_ABI 1 /* another number whenever a record or the meaning of a field changes */
#define TRANSOM_NONE (-1) /* no slot */
#define TRANSOM_TABLES 4 /* of one embedding, at most */

#if defined(__GNUC__)
#define TRANSOM_API __attribute__((visibility("default")))
#else
#define TRANSOM_API
#endif

enum transom_isa { TRANSOM_PLAIN, TRANSOM_AVX2, TRANSOM_AVX512_VNNI, TRANSOM_AVX512_BF16, TRANSOM_ISAS };

/* What the rows of an activation are; a run says how many there are of each. */
enum transom_rows { TRANSOM_TOKENS, TRANSOM_SEQUENCES, TRANSOM_POSITIONS, TRANSOM_PATCHES, TRANSOM_ROW_KINDS };

enum transom_activation {
  TRANSOM_IDENTITY,
  TRANSOM_RELU,
  TRANSOM_GELU,       /* x * (1 + erf(x / sqrt(2))) / 2 */
  TRANSOM_GELU_TANH,  /* its tanh approximation */
  TRANSOM_QUICK_GELU, /* x * sigmoid(1.702 * x) */
  TRANSOM_SILU,
  TRANSOM_TANH,
  TRANSOM_ACTIVATIONS
};

enum transom_norm { TRANSOM_NO_NORM, TRANSOM_LAYER_NORM, TRANSOM_RMS_NORM, TRANSOM_L2_NORM, TRANSOM_NORMS };
enum transom_dtype { TRANSOM_F32, TRANSOM_F16, TRANSOM_U8, TRANSOM_S8, TRANSOM_DTYPES };
enum transom_arithmetic { TRANSOM_IN_F32, TRANSOM_IN_BF16 }; /* of attention's two products; sums are float32 */

/* A weight (k, n), packed for one instruction set by transom_pack: y = x (rows, k) times the weight. */
typedef struct {
  int32_t k, n;
  int32_t dtype;             /* TRANSOM_F32 or TRANSOM_S8 */
  int32_t reserved;
  const void *panels;        /* transom_packed_bytes of them, aligned to 64 bytes */
  const float *scale;        /* S8: (n) scale of each column, times the input's scale where that is static */
  const int32_t *column_sum; /* S8: (n) sums of each column over k */
} transom_matrix;

/* What happens to each finished row y (n), in this order. Fields that are absent are NULL or TRANSOM_NONE.
 *
 *   y += bias;  y = activation(y);  y += residual;  sum = y;  y = norm(y);  out = y;
 *   quantized = clamp(round_half_even(y * inverse_scale) + zero_point, 0, 255)
 *
 * A row is quantised with inverse_scale (n), or by its own largest absolute value where row_scale is a slot: then
 * y *= multiplier first (where there is one), row_scale[row] = max|y| / 127, and inverse_scale is its inverse (a row of
 * zeros has scale 0 and is all zero_point).
 *
 * Where there is a norm or a row_scale, rows are collected before they are finished: ``out`` is a slot then, and not
 * that of the residual.
 */
typedef struct {
  const float *bias;
  int32_t activation;
  int32_t residual;           /* slot, float32 (rows, n) */
  int32_t norm;
  float epsilon;              /* layer and RMS norm: added to the variance; L2: the smallest norm that divides */
  const float *norm_weight, *norm_bias;
  int32_t sum;                /* slot, float32 (rows, n) */
  int32_t out;                /* slot, float32 (rows, n) */
  int32_t quantized;          /* slot, uint8 (rows, n) */
  int32_t row_scale;          /* slot, float32 (rows) */
  const float *inverse_scale;
  const float *multiplier;
  int32_t zero_point;
  int32_t reserved;
} transom_epilogue;

/* x times a packed weight. x is uint8 where the weight is S8: y = (x - zero_point) W * scale [* row_scale[row]]. */
typedef struct {
  int32_t rows;      /* transom_rows */
  int32_t in;        /* slot, (rows, k) */
  int32_t row_scale; /* slot, float32 (rows), or TRANSOM_NONE */
  int32_t zero_point;
  transom_matrix matrix;
  transom_epilogue then;
} transom_linear;

/* softmax(scale * q k^T) v for each head. Query head h reads key head h / (heads / key_heads).
 *
 * The rows of a sequence attend to that sequence alone:
 *   - without caches: to its own token rows, in key and value, those with key_valid != 0 (run), and where causal to no
 *     later one;
 *   - with key_cache: its rows of key and value are written to the caches (sequences, key_heads, capacity, head_dim) at
 *     past[sequence] onwards, and each row attends to all positions of the cache up to its own;
 *   - with cross_key: to cross_key and cross_value (sequences, key_heads, cross_length, head_dim), where cross_valid
 *     (sequences, cross_length) != 0; key and value are TRANSOM_NONE.
 * A row that has nothing to attend to is zero. ``then`` has n = heads * head_dim, no bias, activation, residual, norm.
 */
typedef struct {
  int32_t query, key, value; /* slots, float32, with strides in floats from row to row and a first column */
  int32_t query_stride, key_stride, value_stride;
  int32_t query_column, key_column, value_column;
  int32_t heads, key_heads, head_dim;
  float scale;
  int32_t causal;
  int32_t key_cache, value_cache;
  int32_t cross_key, cross_value;
  int32_t arithmetic;
  int32_t scores; /* slot of float32 working memory, transom_attention_scratch bytes for each thread of the run */
  transom_epilogue then;
} transom_attention;

/* Sum of rows of tables, in order: y = scale[0] * table[0][ids[0]] + scale[1] * table[1][ids[1]] + ... */
typedef struct {
  int32_t count, columns;
  const void *table[TRANSOM_TABLES];
  int32_t dtype[TRANSOM_TABLES]; /* TRANSOM_F32 or TRANSOM_F16 */
  int32_t ids[TRANSOM_TABLES];   /* slots, int32 (tokens) */
  float scale[TRANSOM_TABLES];
  transom_epilogue then;
} transom_embed;

/* Cut images (sequences, channels, height, width) into patches: rows (patches, channels * patch_height * patch_width),
 * in the order of a convolution's weight (channel, row, column), patches row by row. */
typedef struct {
  int32_t in; /* slot, float32 */
  int32_t channels, height, width, patch_height, patch_width;
  transom_epilogue then;
} transom_patches;

/* Put ``first`` (n) before the patches of each image, where there is one, and add position (tokens of an image, n). */
typedef struct {
  int32_t in; /* slot, float32 (patches, n) */
  int32_t columns;
  int32_t patches; /* of one image */
  int32_t reserved;
  const float *first;    /* or NULL */
  const float *position; /* or NULL */
  transom_epilogue then;
} transom_prepend;

/* y = in[index], or the rows as they are: normalises, quantises or copies them, as ``then`` says. */
typedef struct {
  int32_t rows;    /* transom_rows, of the result */
  int32_t in;      /* slot, float32 (any, stride) */
  int32_t index;   /* slot, int32 (rows): rows of in; or TRANSOM_NONE */
  int32_t columns;
  transom_epilogue then;
} transom_select;

/* y = mean of the rows of each sequence that have key_valid != 0; zero where there are none. */
typedef struct {
  int32_t in; /* slot, float32 (tokens, columns) */
  int32_t columns;
  transom_epilogue then; /* of (sequences, columns) */
} transom_pool;

/* Give token rows back to the arrays that callers read: out[sequence, column_of_row] = in[row], zero where no row is.
 * With heads, out is (sequences, heads, padded_length, head_dim), else (sequences, padded_length, columns). */
typedef struct {
  int32_t in; /* slot, float32 (tokens, stride), from its column */
  int32_t stride, column, columns;
  int32_t heads; /* 0: no heads */
  int32_t out;   /* slot, float32 */
} transom_unpack;

enum transom_kind {
  TRANSOM_LINEAR,
  TRANSOM_ATTENTION,
  TRANSOM_EMBED,
  TRANSOM_PATCHES_OF,
  TRANSOM_PREPEND,
  TRANSOM_SELECT,
  TRANSOM_POOL,
  TRANSOM_UNPACK,
  TRANSOM_KINDS
};

typedef struct {
  int32_t kind;
  int32_t reserved;
  const void *record; /* of the type that kind names */
} transom_operator;

/* What differs from run to run. */
typedef struct {
  void *const *slots;
  int64_t rows[TRANSOM_ROW_KINDS];
  const int32_t *first_row;   /* (sequences + 1): first token row of each sequence */
  const int32_t *column;      /* (tokens): where a row stands in its padded sequence, increasing; NULL: in order */
  const uint8_t *key_valid;   /* (tokens): rows that others attend to; NULL: all */
  const int32_t *past;        /* (sequences): positions that the caches hold; NULL: without caches */
  const uint8_t *cross_valid; /* (sequences, cross_length); NULL: all */
  int32_t capacity;           /* positions that the caches have room for */
  int32_t cross_length;
  int32_t padded_length;      /* of the arrays that transom_unpack writes */
  int32_t threads;            /* at most so many, the caller's own among them */
} transom_run;

/* Execute operators in order. Callable from any number of threads at once: they share one pool. Returns 0, or 1 + the
 * index of an operator of an unknown kind, before which all others were executed. */
TRANSOM_API int32_t transom_execute(int32_t isa, const transom_operator *operators, int32_t count,
                                    const transom_run *run);

/* Bytes of a packed weight (k, n) of a dtype, and packing it from row-major source (k, n) with ``stride`` elements from
 * row to row, or (n, k) where transposed, into columns [column, column + n_part) of panels that hold n columns in all.
 * float32 weights may come as float16 (source_dtype). Column sums of S8 are written beside. */
TRANSOM_API int64_t transom_packed_bytes(int32_t isa, int32_t dtype, int32_t k, int32_t n);
TRANSOM_API void transom_pack(int32_t isa, int32_t dtype, int32_t k, int32_t n, int32_t column, int32_t n_part,
                              const void *source, int32_t source_dtype, int64_t stride, int32_t transposed,
                              void *panels, int32_t *column_sum);

/* Bytes of attention's working memory for one thread, for up to so many keys. */
TRANSOM_API int64_t transom_attention_scratch(int32_t isa, const transom_attention *attention, int32_t keys);

TRANSOM_API int32_t transom_abi(void);
/* The compiler's name and version, and a hash of the sources (empty where the build did not say). */
TRANSOM_API const char *transom_compiler(void);
TRANSOM_API const char *transom_sources(void);
/* sizeof each record in the order linear, attention, embed, patches, prepend, select, pool, unpack, operator, run. */
TRANSOM_API void transom_layout(int32_t sizes[10]);
/* 1 where the library has kernels of an instruction set and this processor says that it executes them. */
TRANSOM_API int32_t transom_supports(int32_t isa);

#endif
