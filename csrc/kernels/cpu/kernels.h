// SPDX-License-Identifier: Apache-2.0
// The algorithms for one instruction set. Each isa_*.cpp includes this file inside its namespace
// and target region, after its simd_*.h. There is no include guard, because the file is compiled
// several times.
//
// Nothing in here may instantiate a template or inline function of another namespace that is not
// already compiled for the baseline (std::min, std::vector, ...). The linker keeps one copy of
// each, and a copy compiled for AVX-512 would then run on machines without it.

#include "vector_math.h"
// Keep this order: the headers below use those above.
#include "dot_tile.h"
// Keep this order: the headers below use those above.
#include "gate.h"
// Keep this order: the headers below use those above.
#include "correction.h"
#include "int4_tile.h"
#include "loss_rows.h"
#if DUALHEAD_NATIVE_BF16
#include "packed_tile.h"
#endif
// Keep this order: the headers below use those above.
#include "vocabulary.h"
