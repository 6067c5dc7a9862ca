// SPDX-License-Identifier: Apache-2.0
// AVX-512 (Skylake-X and later): bf16 weights are widened to fp32.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../loss_math.h"
#include "../weight_format.h"
#include "isa.h"

#define DUALHEAD_ISA avx512
#define DUALHEAD_NATIVE_BF16 0

// The headers of GCC 12 trigger this warning themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")

namespace dualhead::cpu::avx512 {
#include "simd_avx512.h"
// Keep this order: the headers below use those above.
#include "kernels.h"
}  // namespace dualhead::cpu::avx512

#pragma GCC pop_options

namespace dualhead::cpu {

namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace

extern const Kernels avx512_kernels{"avx512",
                                    &supported,
                                    nullptr,
                                    &avx512::project,
                                    &avx512::move_hidden,
                                    &avx512::attend,
                                    &avx512::vocabulary,
                                    &avx512::mix_probabilities,
                                    &avx512::loss_rows,
                                    &avx512::loss_rows_backward};

}  // namespace dualhead::cpu

#endif  // __x86_64__
