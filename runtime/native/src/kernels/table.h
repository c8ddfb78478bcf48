/* Included once by each isa_*.c, after it said which vectors it has (TRANSOM_VECTOR_AVX2, or TRANSOM_VECTOR_AVX512
 * and perhaps TRANSOM_BF16, or none) and what its table is called (TRANSOM_TABLE). All of a kernel is static, so that
 * each instruction set has a copy of its own. */
#include "attention.h"
#include "embed.h"
#include "linear.h"
#include "patches.h"
#include "pool.h"
#include "prepend.h"
#include "select.h"
#include "unpack.h"

const transom_kernels TRANSOM_TABLE = {
    .linear = linear,
    .attention = attention,
    .embed = embed_execute,
    .patches = patches_execute,
    .prepend = prepend_execute,
    .select = select_execute,
    .pool = pool_execute,
    .unpack = unpack_execute,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .attention_scratch = attention_scratch,
};
