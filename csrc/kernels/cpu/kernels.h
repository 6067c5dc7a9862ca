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
#include "hidden.h"
// Keep this order: the headers below use those above.
#include "dot_tile.h"
// Keep this order: the headers below use those above.
#include "int4_tile.h"
#if DUALHEAD_NATIVE_BF16
#include "packed_tile.h"
#endif
#if DUALHEAD_TILES
#include "tile_amx.h"
// Keep this order: the headers below use those above.
#include "tile_product.h"
#endif
// Keep this order: the headers below use those above.
#include "gate.h"
// Keep this order: the headers below use those above.
#include "correction.h"
#include "loss_rows.h"
// Keep this order: the headers below use those above.
#include "vocabulary.h"

#if !DUALHEAD_NATIVE_BF16
constexpr void (*pack_requests)(const Step&) = nullptr;
constexpr void (*pack_hidden)(const Step&) = nullptr;
#endif

bool supported();  // compiled for the baseline

#define DUALHEAD_TEXT(name) #name
#define DUALHEAD_NAME(name) DUALHEAD_TEXT(name)
extern const Kernels kernels{DUALHEAD_NAME(DUALHEAD_ISA),
                             &supported,
                             DUALHEAD_GEMM_BATCH,
                             pack_requests,
                             project,
                             pack_hidden,
                             move_hidden,
                             attend,
                             vocabulary,
                             mix_products,
                             mix_probabilities,
                             loss_rows,
                             loss_rows_backward};
