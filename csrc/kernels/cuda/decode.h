// SPDX-License-Identifier: Apache-2.0
// The decode step on CUDA, as the binding and the tests call it: one cooperative launch from hidden
// states to tokens (docs/cuda.md, which says what has run on which GPU). The same source is tested
// on the host backend (csrc/testing).
#pragma once

#include <cstddef>

#include "../params.h"

struct CUstream_st;  // what the toolkit's cudaStream_t points to; its headers are not needed here

namespace dualhead {
namespace cuda {

// How many blocks of how many threads; 0 = as many as the work fills and the device holds at once,
// of the largest size. Results do not depend on either. The streaming path has one number of
// threads and takes no other than 0.
struct LaunchShape {
  int blocks;
  int threads;
};

// Whether the step takes the streaming path, at the speed of memory; else the plain one
// (stream_plan.h).
bool decode_streams(const DecodeParams& params);

// Whether the step should be given lm_product and reward_product, from GEMMs, which read the
// weights once for any batch: it has more rows than the kernels share one pass among. Results then
// depend on the GEMM's choices, so on the batch; run after run they are the same.
bool decode_wants_products(const DecodeParams& params);

// Bytes of scratch that decode_step needs, aligned to 256; its contents may be anything.
size_t decode_workspace_bytes(const DecodeParams& params);

// Launches the step on `stream` of `device`, without synchronising; an empty batch launches
// nothing. Returns a cudaError_t, 0 if the launch was accepted. Among the errors:
// cudaErrorNotSupported, the device has no cooperative launch; cudaErrorCooperativeLaunchTooLarge,
// the grid does not fit on the device at once; cudaErrorInvalidValue, shape.threads is no multiple
// of 32 up to 256; cudaErrorNoKernelImageForDevice, the library was compiled for others.
int decode_step(const DecodeParams& params, void* workspace, int device, CUstream_st* stream,
                LaunchShape shape = {0, 0});

// "cudaErrorNotSupported: operation not supported", for the caller's message; where no code fits
// the current device, also which devices there is code for.
const char* error_text(int error);

}  // namespace cuda
}  // namespace dualhead
