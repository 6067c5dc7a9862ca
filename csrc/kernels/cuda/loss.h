// SPDX-License-Identifier: Apache-2.0
// The interface of the elementwise part of the training loss on CUDA, for the binding and the
// tests. Not yet run on a GPU: it compiles for sm_80, sm_90a and sm_100, and the same source is
// tested on the host backend (csrc/testing).
#pragma once

#include "../params.h"

struct CUstream_st;  // the target of the toolkit's cudaStream_t; its headers are not needed here

namespace dualhead {
namespace cuda {

// Launch one block per row on `stream` of `device` without synchronising. Without rows they launch
// nothing. They return a cudaError_t, 0 if the launch was accepted (decode.h has its text).
int loss_rows(const LossRowsParams& params, int device, CUstream_st* stream);
int loss_rows_backward(const LossRowsParams& params, int device, CUstream_st* stream);

}  // namespace cuda
}  // namespace dualhead
