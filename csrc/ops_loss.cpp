// SPDX-License-Identifier: Apache-2.0
// The training loss's operators on the CPU: the rows are divided among torch's threads.
#include "kernels/cpu/isa.h"
#include "loss_binding.h"

namespace dualhead {
namespace {

void share_rows(const LossRowsParams& p, void (*kernel)(const LossRowsParams&, int64_t, int64_t)) {
  torch::stable::parallel_for(0, p.n, 1,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void loss_rows_cpu(const LossRowsParams& p, const Tensor&) {
  share_rows(p, cpu::chosen_kernels().loss_rows);
}

void loss_rows_backward_cpu(const LossRowsParams& p, const Tensor&) {
  share_rows(p, cpu::chosen_kernels().loss_rows_backward);
}

}  // namespace
}  // namespace dualhead

STABLE_TORCH_LIBRARY_IMPL(dualhead, CPU, m) {
  m.impl("loss_rows", TORCH_BOX(&dualhead::loss_rows<dualhead::loss_rows_cpu>));
  m.impl("loss_rows_backward_",
         TORCH_BOX(&dualhead::loss_rows_backward<dualhead::loss_rows_backward_cpu>));
}
