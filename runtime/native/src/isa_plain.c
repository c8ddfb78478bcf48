/* Kernels for any processor: the reference, and what runs where nothing faster does. */
#define TRANSOM_TABLE transom_plain_kernels
#include "kernels.h"
#include "kernels/table.h"
