// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA (Haswell, Zen 1 and later): bf16 weights are widened to fp32.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../loss_math.h"
#include "../weight_format.h"
#include "isa.h"

#define DUALHEAD_ISA avx2
#define DUALHEAD_NATIVE_BF16 0
#define DUALHEAD_TILES 0
#define DUALHEAD_GEMM_BATCH 0

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace dualhead::cpu::DUALHEAD_ISA {
#include "simd_avx2.h"
// Keep this order: the headers below use those above.
#include "kernels.h"
}  // namespace dualhead::cpu::DUALHEAD_ISA

#pragma GCC pop_options

namespace dualhead::cpu::DUALHEAD_ISA {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
}  // namespace dualhead::cpu::DUALHEAD_ISA

#endif  // __x86_64__
