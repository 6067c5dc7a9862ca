// SPDX-License-Identifier: Apache-2.0
// One decode step on the CPU, from params to outputs, in phases whose work is divided among
// threads.
#pragma once

#include <cstdint>

#include "../params.h"
#include "isa.h"

namespace dualhead::cpu {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Runs body over [0, count) in ranges of at least `grain`, on any number of threads, and returns
// when all are done. The body must not throw.
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeFunction body, void* context);

// Whether the caller should supply lm_product and reward_product, computed by GEMMs of torch. The
// results then depend on the GEMM's choices, and so on the batch. They repeat from run to run.
bool wants_products(const DecodeParams& params, const Kernels& kernels);

// Bytes of scratch memory that decode_step needs: 64-byte aligned, with any contents.
int64_t workspace_bytes(const DecodeParams& params);

// Runs the whole step. The binding has checked the params; dtype is fp32 or bf16.
void decode_step(const DecodeParams& params, const Kernels& kernels, void* workspace,
                 ParallelFor parallel);

}  // namespace dualhead::cpu
