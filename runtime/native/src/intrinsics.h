/* The intrinsics of x86: the compiler's own, or SIMDe's in their place, which compute the same on any processor. */
#ifndef TRANSOM_INTRINSICS_H
#define TRANSOM_INTRINSICS_H

#if defined(TRANSOM_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include "simde_missing.h"
#else
#include <immintrin.h>
#endif

#endif
