// SPDX-License-Identifier: Apache-2.0
// The kernels for bf16 products of AVX-512 and for AMX, compiled with emulated instructions: they
// run on any machine.
#pragma once

#include "../../kernels/cpu/isa.h"

namespace dualhead::cpu {

namespace emulated_avx512bf16 {
extern const Kernels kernels;
}
namespace emulated_amx {
extern const Kernels kernels;
}

inline const Kernels* const kEmulatedLevels[] = {&emulated_avx512bf16::kernels,
                                                 &emulated_amx::kernels};

}  // namespace dualhead::cpu
