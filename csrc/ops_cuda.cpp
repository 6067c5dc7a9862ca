// SPDX-License-Identifier: Apache-2.0
// The operators on CUDA: check, allocate, launch on torch's current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

#include "decode_binding.h"
#include "head_products.h"
#include "kernels/cuda/decode.h"

namespace dualhead {
namespace {

// The workspace comes from torch's caching allocator for this call only. The allocator reuses it in
// the order of this stream, or keeps it for the graph under capture. So streams, threads and graphs
// never share scratch memory, and nothing is cached here.
DecodeResult decode_step_cuda(DecodeArguments&& arguments) {
  BoundDecode bound = bind_decode_step(std::move(arguments),
                                       {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  DecodeParams& params = bound.params;
  const Tensor& hidden = bound.arguments.hidden;
  const auto device = hidden.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  HeadProducts products;  // must live until the kernel is launched on the stream
  if (cuda::decode_wants_products(params)) {
    products = head_products(bound.arguments, bound.logits);
    params.lm_product = pointer<const float>(products.lm);
    params.reward_product = pointer<const float>(products.reward);
  }
  const int64_t bytes = static_cast<int64_t>(cuda::decode_workspace_bytes(params));
  const Tensor workspace = allocate<1>({bytes}, ScalarType::Byte, hidden);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error =
      cuda::decode_step(params, workspace.data_ptr(), device, static_cast<CUstream_st*>(stream));
  if (error != 0) {
    fail(kDecodeStep, "cooperative kernel launch failed on CUDA device " + std::to_string(device) +
                          ": " + cuda::error_text(error));
  }
  return std::move(bound.result);
}

}  // namespace
}  // namespace dualhead

STABLE_TORCH_LIBRARY_IMPL(dualhead, CUDA, m) {
  m.impl("decode_step", TORCH_BOX(&dualhead::decode_step_entry<dualhead::decode_step_cuda>));
}
