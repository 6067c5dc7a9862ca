// SPDX-License-Identifier: Apache-2.0
// The streaming path of full reward heads.
#include "stream.cuh"

namespace dualhead {
namespace cuda {

cudaError_t launch_stream(const DecodeParams& p, const Workspace& ws, int device,
                          cudaStream_t stream, int blocks) {
  return launch_stream_of<false>(p, ws, device, stream, blocks);
}

}  // namespace cuda
}  // namespace dualhead
