// SPDX-License-Identifier: Apache-2.0
// The elementwise middle of the training loss on CUDA, as the binding and the tests call it. Not
// yet run on a GPU: it compiles for sm_80, sm_90a and sm_100, and the same source is tested on the
// host backend (csrc/testing).
#pragma once

#include "../params.h"

struct CUstream_st;  // what the toolkit's cudaStream_t points to; its headers are not needed here

namespace dualhead {
namespace cuda {

// Launch on `stream` of `device`, a block per row, without synchronising; no rows launch nothing.
// Return a cudaError_t, 0 if the launch was accepted (decode.h has its text).
int loss_rows(const LossRowsParams& params, int device, CUstream_st* stream);
int loss_rows_backward(const LossRowsParams& params, int device, CUstream_st* stream);

}  // namespace cuda
}  // namespace dualhead
