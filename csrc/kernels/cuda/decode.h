// SPDX-License-Identifier: Apache-2.0
// The interface of the CUDA decode step for the binding and the tests: one cooperative launch from
// hidden states to tokens. docs/cuda.md says what has run on which GPU. The same source is tested
// on the host backend (csrc/testing).
#pragma once

#include <cstddef>

#include "../params.h"

struct CUstream_st;  // the target of the toolkit's cudaStream_t; its headers are not needed here

namespace dualhead {
namespace cuda {

// The number of blocks and of threads per block. blocks = 0: as many as the work needs and the
// device can hold at once. threads = 0: the largest supported number. The results depend on
// neither. The streaming path has a fixed number of threads and takes only 0.
struct LaunchShape {
  int blocks;
  int threads;
};

// Whether the step takes the streaming path, which runs at memory bandwidth. Otherwise it takes the
// plain path (stream_plan.h).
bool decode_streams(const DecodeParams& params);

// Whether the caller should supply lm_product and reward_product, computed by GEMMs, which read the
// weights once for any batch: true if the batch has more rows than can share one pass over the
// weights. The results then depend on the GEMM's choices, and so on the batch. They repeat from run
// to run.
bool decode_wants_products(const DecodeParams& params);

// Bytes of scratch memory that decode_step needs: aligned to 256, with any contents.
size_t decode_workspace_bytes(const DecodeParams& params);

// Launches the step on `stream` of `device` without synchronising. An empty batch launches nothing.
// Returns a cudaError_t, 0 if the launch was accepted. Among the errors:
//
//   cudaErrorNotSupported               the device has no cooperative launch
//   cudaErrorCooperativeLaunchTooLarge  the grid does not fit on the device at once
//   cudaErrorInvalidValue               shape.threads is not a multiple of 32 up to 256, or not 0
//                                       on the streaming path
//   cudaErrorNoKernelImageForDevice     the library was compiled for other architectures
int decode_step(const DecodeParams& params, void* workspace, int device, CUstream_st* stream,
                LaunchShape shape = {0, 0});

// Error text such as "cudaErrorNotSupported: operation not supported". If no code fits the current
// device, it also lists the architectures that were compiled.
const char* error_text(int error);

}  // namespace cuda
}  // namespace dualhead
