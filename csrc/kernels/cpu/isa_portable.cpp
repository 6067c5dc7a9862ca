// SPDX-License-Identifier: Apache-2.0
// Any machine: what the compiler makes of 16-byte vectors on its baseline.

#include "../loss_math.h"
#include "../weight_format.h"
#include "isa.h"

#define DUALHEAD_ISA portable
#define DUALHEAD_NATIVE_BF16 0

namespace dualhead::cpu::portable {
#include "simd_portable.h"
// The line above comes first: the others use it.
#include "kernels.h"
}  // namespace dualhead::cpu::portable

namespace dualhead::cpu {

namespace {
bool supported() { return true; }
}  // namespace

extern const Kernels portable_kernels{"portable",
                                      &supported,
                                      nullptr,
                                      &portable::project,
                                      &portable::move_hidden,
                                      &portable::attend,
                                      &portable::vocabulary,
                                      &portable::mix_probabilities,
                                      &portable::loss_rows,
                                      &portable::loss_rows_backward};

}  // namespace dualhead::cpu
