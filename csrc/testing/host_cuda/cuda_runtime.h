// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime and language that the kernels use, implemented for the CPU. The
// include path of the test build finds this file instead of the toolkit's. Streams are ignored: a
// launch is complete when it returns.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include "async.h"
#include "grid.h"
#include "order.h"

// --- language ------------------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#if defined(DUALHEAD_ORDERED)
// Each use of a fence or barrier is then a place of its own in the code (orderings(), order.h).
#define __forceinline__ inline __attribute__((always_inline))
#else
#define __forceinline__ inline
#endif
#define __noinline__ inline
#define __launch_bounds__(...)

using dualhead::host_cuda::blockDim;
using dualhead::host_cuda::blockIdx;
using dualhead::host_cuda::gridDim;
using dualhead::host_cuda::threadIdx;

// As on the device, an address that is not aligned to 16 bytes is an error: a fault, and a report
// by UBSan.
struct __attribute__((aligned(16), may_alias)) float4 {
  float x, y, z, w;
};

struct __attribute__((aligned(8), may_alias)) uint2 {
  uint32_t x, y;
};

struct __attribute__((aligned(16), may_alias)) uint4 {
  uint32_t x, y, z, w;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

__forceinline__ void __syncthreads() { ::dualhead::host_cuda::wait_for_block(); }

__forceinline__ void __syncwarp() { ::dualhead::host_cuda::wait_for_warp(); }

inline void __threadfence() {}

inline void __nanosleep(unsigned) { ::dualhead::host_cuda::nap(); }

template <typename T>
T host_cuda_exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move at most 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ::dualhead::host_cuda::exchange(bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Only for whole warps: the mask is ignored.
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return host_cuda_exchange(value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return host_cuda_exchange(value, source % 32);
}

// Atomics are not ordered and do not race, so their accesses are not reported (accesses.cpp).
#define DUALHEAD_ATOMIC __attribute__((no_sanitize("thread")))

template <typename T, typename U>
DUALHEAD_ATOMIC T atomicAdd(T* address, U value) {
  ::dualhead::host_cuda::step_back();
  const T old = *address;
  *address = static_cast<T>(old + static_cast<T>(value));
  return old;
}

template <typename T, typename U>
DUALHEAD_ATOMIC T atomicMax(T* address, U value) {
  ::dualhead::host_cuda::step_back();
  const T old = *address;
  if (static_cast<T>(value) > old) *address = static_cast<T>(value);
  return old;
}

template <typename T>
DUALHEAD_ATOMIC T atomicCAS(T* address, T expected, T value) {
  ::dualhead::host_cuda::step_back();
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// The architectures that nvcc reports to the code.
#define __CUDA_ARCH_LIST__ 800, 900, 1000

// --- runtime -------------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotSupported = 801,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct dim3 : ::dualhead::host_cuda::Index3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Index3{x, y, z} {}  // NOLINT
};

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared_bytes);

namespace dualhead {
namespace host_cuda {

// The properties of the only device, number 0, and its schedule.
struct Device {
  int multiprocessors = 4;
  int blocks_per_multiprocessor = 2;
  bool cooperative_launch = true;
  int compute_major = 9;
  int compiled_major = 0;                   // of the kernels' code: 0 = the device's, -1 = none
  int shared_bytes_per_block = 227 * 1024;  // with cudaFuncSetAttribute; 48 KiB without
  uintptr_t missing = 0;                    // a seeded bug: one of orderings() orders nothing
  Schedule schedule;
};

Device& device();

// How often cudaFuncSetAttribute has succeeded for a kernel.
int times_limit_was_set(const void* kernel);

// Fails where a device would refuse the launch; otherwise runs body once per thread.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& body);

}  // namespace host_cuda
}  // namespace dualhead

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> copied(arguments...);
  return ::dualhead::host_cuda::launch(*config, reinterpret_cast<const void*>(kernel),
                                       [&] { std::apply(kernel, copied); });
}
