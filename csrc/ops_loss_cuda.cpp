// SPDX-License-Identifier: Apache-2.0
// The training loss's operators on CUDA: one launch on torch's current stream. Not yet run on a GPU
// (kernels/cuda/loss.h).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/loss.h"
#include "loss_binding.h"

namespace dualhead {
namespace {

void launch_rows(const char* op, int (*kernel)(const LossRowsParams&, int, CUstream_st*),
                 const LossRowsParams& p, const Tensor& like) {
  const auto device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = kernel(p, device, static_cast<CUstream_st*>(stream));
  if (error != 0) {
    fail(op, "the kernel must start on CUDA device " + std::to_string(device) + ", got " +
                 cuda::error_text(error));
  }
}

void loss_rows_cuda(const LossRowsParams& p, const Tensor& like) {
  launch_rows("loss_rows", cuda::loss_rows, p, like);
}

void loss_rows_backward_cuda(const LossRowsParams& p, const Tensor& like) {
  launch_rows("loss_rows_backward_", cuda::loss_rows_backward, p, like);
}

}  // namespace
}  // namespace dualhead

STABLE_TORCH_LIBRARY_IMPL(dualhead, CUDA, m) {
  m.impl("loss_rows", TORCH_BOX(&dualhead::loss_rows<dualhead::loss_rows_cuda>));
  m.impl("loss_rows_backward_",
         TORCH_BOX(&dualhead::loss_rows_backward<dualhead::loss_rows_backward_cuda>));
}
