// SPDX-License-Identifier: Apache-2.0
// One decode step on the CPU, from params to outputs, in phases that threads share.
#pragma once

#include <cstdint>

#include "../params.h"
#include "isa.h"

namespace dualhead::cpu {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Runs body over [0, count) in ranges of at least `grain`, on as many threads as the caller wants,
// and returns when all are done. The body throws nothing.
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeFunction body, void* context);

// Scratch that decode_step needs; any contents, 64-byte aligned.
int64_t workspace_bytes(const DecodeParams& params);

// The whole step. Params are valid (the binding has checked them) and dtype is fp32 or bf16.
void decode_step(const DecodeParams& params, const Kernels& kernels, void* workspace,
                 ParallelFor parallel);

}  // namespace dualhead::cpu
