// SPDX-License-Identifier: Apache-2.0
// AVX-512 with AVX512_BF16 and AVX512_VBMI (Zen 4, Sapphire Rapids and later; Cooper Lake lacks
// VBMI): bf16 products in one instruction, and table look-ups for weights of one byte.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../loss_math.h"
#include "../weight_format.h"
#include "isa.h"

#ifndef DUALHEAD_ISA
#define DUALHEAD_ISA avx512bf16
#endif
#define DUALHEAD_NATIVE_BF16 1
#define DUALHEAD_TILES 0
#define DUALHEAD_GEMM_BATCH 0

// The headers of GCC 12 trigger this warning themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#ifndef DUALHEAD_EMULATED
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma")
#endif

namespace dualhead::cpu::DUALHEAD_ISA {
#include "simd_avx512.h"
// Keep this order: the headers below use those above.
#include "kernels.h"
}  // namespace dualhead::cpu::DUALHEAD_ISA

#ifndef DUALHEAD_EMULATED
#pragma GCC pop_options
#endif

namespace dualhead::cpu::DUALHEAD_ISA {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace dualhead::cpu::DUALHEAD_ISA

#endif  // __x86_64__
