// SPDX-License-Identifier: Apache-2.0
// AMX tiles beside all that isa_avx512bf16.cpp uses (Sapphire Rapids and later): every product with
// bf16 hidden states is one of tiles.
#if defined(__x86_64__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../loss_math.h"
#include "../weight_format.h"
#include "isa.h"

#ifndef DUALHEAD_ISA
#define DUALHEAD_ISA amx
#endif
#define DUALHEAD_NATIVE_BF16 1
#define DUALHEAD_TILES 1
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
namespace {
// Linux saves the tiles of a process only after this request, which holds for all its threads. A
// kernel without AMX refuses it.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}
}  // namespace

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         tiles_permitted();
}
}  // namespace dualhead::cpu::DUALHEAD_ISA

#endif  // __x86_64__
