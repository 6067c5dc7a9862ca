// SPDX-License-Identifier: Apache-2.0
// AVX-512 with AVX512_BF16 and AVX512_VBMI (Zen 4, Sapphire Rapids and later; Cooper Lake lacks
// VBMI): bf16 products in one instruction, and table look-ups for weights of one byte.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../loss_math.h"
#include "../weight_format.h"
#include "isa.h"

#define DUALHEAD_ISA avx512bf16
#define DUALHEAD_NATIVE_BF16 1

// The headers of GCC 12 trigger this warning themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma")

namespace dualhead::cpu::avx512bf16 {
#include "simd_avx512.h"
// Keep this order: the headers below use those above.
#include "kernels.h"
}  // namespace dualhead::cpu::avx512bf16

#pragma GCC pop_options

namespace dualhead::cpu {

namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace

extern const Kernels avx512bf16_kernels{"avx512bf16",
                                        &supported,
                                        &avx512bf16::pack_hidden,
                                        &avx512bf16::project,
                                        &avx512bf16::move_hidden,
                                        &avx512bf16::attend,
                                        &avx512bf16::vocabulary,
                                        &avx512bf16::mix_probabilities,
                                        &avx512bf16::loss_rows,
                                        &avx512bf16::loss_rows_backward};

}  // namespace dualhead::cpu

#endif  // __x86_64__
