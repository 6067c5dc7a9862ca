// SPDX-License-Identifier: Apache-2.0
// Any machine: 16-byte vectors, compiled for the baseline instruction set.

#include "../loss_math.h"
#include "../weight_format.h"
#include "isa.h"

#define DUALHEAD_ISA portable
#define DUALHEAD_NATIVE_BF16 0
#define DUALHEAD_TILES 0
#define DUALHEAD_GEMM_BATCH 32

namespace dualhead::cpu::DUALHEAD_ISA {
#include "simd_portable.h"
// Keep this order: the headers below use those above.
#include "kernels.h"
}  // namespace dualhead::cpu::DUALHEAD_ISA

namespace dualhead::cpu::DUALHEAD_ISA {
bool supported() { return true; }
}  // namespace dualhead::cpu::DUALHEAD_ISA
