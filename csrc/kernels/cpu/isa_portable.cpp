// SPDX-License-Identifier: Apache-2.0
// Any machine: 16-byte vectors, compiled for the baseline instruction set.

#include "../loss_math.h"
#include "../weight_format.h"
#include "isa.h"

#define DUALHEAD_ISA portable
#define DUALHEAD_NATIVE_BF16 0

namespace dualhead::cpu::portable {
#include "simd_portable.h"
// Keep this order: the headers below use those above.
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
