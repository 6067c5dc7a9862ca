// SPDX-License-Identifier: Apache-2.0
// Arrays whose dtype is a run-time argument instead of a type, so that one copy of the code serves
// all dtypes. If the caller knows the dtype, its branches disappear after inlining.
#pragma once

#include <type_traits>

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

  // Eight values from i on, aligned to 16 bytes.
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

  // Four values from i on, of which the first `left` exist; the others are 0. kFours: `left` is a
  // multiple of 4, and the address is aligned to 16 bytes, or for 16-bit types to 8.
  template <bool kFours>
  __device__ __forceinline__ Four four(int64_t i, int64_t left) const {
    Four out = {};
    if constexpr (kFours) {
      if (left <= 0) return out;
      if (dtype == DType::kFloat32) {
        const float4 all = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
        return Four{{all.x, all.y, all.z, all.w}};
      }
      const uint2 all = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint16_t bits = static_cast<uint16_t>((j < 2 ? all.x : all.y) >> 16 * (j % 2));
        out.x[j] = dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < left) out.x[j] = (*this)(i + j);
      }
    }
    return out;
  }

  __device__ __forceinline__ Numbers from(int64_t i) const {
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    return Numbers{static_cast<const unsigned char*>(data) + i * bytes, dtype};
  }
};

// Eight adjacent values as stored, so that many can be loaded before the first is widened.
template <DType kDType>
struct Eight {
  static constexpr bool kSingle = kDType == DType::kFloat32;
  Words words[kSingle ? 2 : 1];

  // Loads the values from i on, of which the first `left` exist; the others are 0. kWide: `left` is
  // a multiple of 8 and the address is aligned to 16 bytes.
  template <bool kWide>
  __device__ __forceinline__ void load(const void* data, int64_t i, int64_t left) {
    using T = std::conditional_t<kSingle, uint32_t, uint16_t>;
    const T* from = static_cast<const T*>(data) + i;
#pragma unroll
    for (int half = 0; half < (kSingle ? 2 : 1); ++half) {
      words[half] = Words{};
      if constexpr (kWide) {
        if (left > 0) words[half] = load_words(from + 4 * half);
      }
    }
    if constexpr (!kWide) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (n >= left) continue;
        if constexpr (kSingle) {
          words[n / 4].x[n % 4] = from[n];
        } else {
          words[0].x[n / 2] |= static_cast<uint32_t>(from[n]) << 16 * (n % 2);
        }
      }
    }
  }

  __device__ __forceinline__ float number(int n) const {
    if constexpr (kSingle) {
      return bits_float(words[n / 4].x[n % 4]);
    } else {
      const uint16_t bits = static_cast<uint16_t>(words[0].x[n / 2] >> 16 * (n % 2));
      return kDType == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
    }
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
