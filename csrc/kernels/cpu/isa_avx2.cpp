// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA (Haswell, Zen 1 and later): bf16 weights are widened to fp32.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../loss_math.h"
#include "../weight_format.h"
#include "isa.h"

#define DUALHEAD_ISA avx2
#define DUALHEAD_NATIVE_BF16 0

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace dualhead::cpu::avx2 {
#include "simd_avx2.h"
// Keep this order: the headers below use those above.
#include "kernels.h"
}  // namespace dualhead::cpu::avx2

#pragma GCC pop_options

namespace dualhead::cpu {

namespace {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
}  // namespace

extern const Kernels avx2_kernels{"avx2",
                                  &supported,
                                  nullptr,
                                  &avx2::project,
                                  &avx2::move_hidden,
                                  &avx2::attend,
                                  &avx2::vocabulary,
                                  &avx2::mix_probabilities,
                                  &avx2::loss_rows,
                                  &avx2::loss_rows_backward};

}  // namespace dualhead::cpu

#endif  // __x86_64__
