#ifndef TRANSOM_DISPATCH_H
#define TRANSOM_DISPATCH_H

#include "kernels.h"

/* The kernels of an instruction set; NULL where the library has none. */
const transom_kernels *transom_kernels_of(int32_t isa);

#endif
