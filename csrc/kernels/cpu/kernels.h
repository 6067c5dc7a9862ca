// SPDX-License-Identifier: Apache-2.0
// The algorithms, for one instruction set: included by each isa_*.cpp inside its namespace and
// target region, after its simd_*.h. No guard and no includes: it is meant to be compiled several
// times.
//
// Nothing in here may instantiate a template or inline function of another namespace that is not
// already compiled for the baseline (std::min, std::vector, ...): the linker keeps one copy of
// each, and one made with AVX-512 would then run on machines without it.

#include "vector_math.h"
// The line above comes first: the others use it.
#include "dot_tile.h"
// The line above comes first: the others use it.
#include "gate.h"
// The line above comes first: the others use it.
#include "correction.h"
#include "int4_tile.h"
#include "loss_rows.h"
#if DUALHEAD_NATIVE_BF16
#include "packed_tile.h"
#endif
// The line above comes first: the others use it.
#include "vocabulary.h"
