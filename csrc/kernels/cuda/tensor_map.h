// SPDX-License-Identifier: Apache-2.0
// Creates the tensor maps that the copy engine reads (primitives.cuh), on the host before a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "primitives.cuh"
#if defined(__CUDACC__)
#include <cudaTypedefs.h>
#endif

namespace dualhead {
namespace cuda {

// A matrix of planes x rows x row_bytes bytes. base and the strides, in bytes, are multiples of 16.
struct Rows3 {
  const void* base;
  int64_t row_bytes, rows, row_stride, planes, plane_stride;
};

#if defined(__CUDACC__)

// The driver's function, looked up through the runtime: this library does not link the driver.
inline cudaError_t find_encode(PFN_cuTensorMapEncodeTiled_v12000* encode) {
  static void* found = nullptr;
  static const cudaError_t error = [] {
    cudaDriverEntryPointQueryResult result;
    const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                              12000, cudaEnableDefault, &result);
    if (code != cudaSuccess) return code;
    return result == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported;
  }();
  *encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  return error;
}

inline cudaError_t encode_map(const Rows3& matrix, int box_rows, TensorMap* map) {
  PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  const cudaError_t error = find_encode(&encode);
  if (error != cudaSuccess) return error;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(matrix.row_bytes),
                               static_cast<cuuint64_t>(matrix.rows),
                               static_cast<cuuint64_t>(matrix.planes)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(matrix.row_stride),
                                 static_cast<cuuint64_t>(matrix.plane_stride)};
  const cuuint32_t box[3] = {kBlockBytes, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t every[3] = {1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(matrix.base), sizes, strides,
             box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#else

inline cudaError_t encode_map(const Rows3& matrix, int box_rows, TensorMap* map) {
  return host_cuda::encode_map(matrix.base, matrix.row_bytes, matrix.rows, matrix.row_stride,
                               matrix.planes, matrix.plane_stride, box_rows, map)
             ? cudaSuccess
             : cudaErrorInvalidValue;
}

#endif

}  // namespace cuda
}  // namespace dualhead
