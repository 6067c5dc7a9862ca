// SPDX-License-Identifier: Apache-2.0
// Arrays of numbers whose dtype is an argument and not a type: one copy of the code serves all of
// them, and where the caller knows the dtype, its branches are gone once inlined.
#pragma once

#include "../params.h"
#include "primitives.cuh"

namespace dualhead {
namespace cuda {

struct Numbers {
  const void* data;
  DType dtype;

  __device__ __forceinline__ float operator()(int64_t i) const {
    switch (dtype) {
      case DType::kFloat32:
        return static_cast<const float*>(data)[i];
      case DType::kBFloat16:
        return to_float(static_cast<const BFloat16*>(data)[i]);
      default:
        return to_float(static_cast<const Float16*>(data)[i]);
    }
  }

  // Eight from i on; 16 divides their address.
  __device__ __forceinline__ void eight(int64_t i, float (&out)[8]) const {
    switch (dtype) {
      case DType::kFloat32:
        return load_eight(static_cast<const float*>(data) + i, out);
      case DType::kBFloat16:
        return load_eight(static_cast<const BFloat16*>(data) + i, out);
      default:
        return load_eight(static_cast<const Float16*>(data) + i, out);
    }
  }

  __device__ __forceinline__ Numbers from(int64_t i) const {
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    return Numbers{static_cast<const unsigned char*>(data) + i * bytes, dtype};
  }
};

__device__ __forceinline__ void store_number(void* data, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[i] = x;
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(x);
      break;
    default:
      static_cast<Float16*>(data)[i] = from_float<Float16>(x);
  }
}

}  // namespace cuda
}  // namespace dualhead
