// SPDX-License-Identifier: Apache-2.0
// A cooperative launch that cannot deadlock: the grid is never larger than what the device can hold
// at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "workspace.h"

namespace dualhead {
namespace cuda {

// Properties of a kernel on one device.
struct KernelFacts {
  int arch;             // architecture of its code (of its PTX, if the driver compiled that)
  int shared_bytes;     // the most dynamic shared memory that a block may have
  int multiprocessors;  // of the device
};

// Sets the most dynamic shared memory that a block of this kernel may have. The limit belongs to
// the kernel, not to a launch: if each launch set what it needs, another thread could lower the
// limit between the setting and the launch. So it is set once, to the most that the device has.
inline cudaError_t raise_shared_limit(const void* kernel, int device, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> limits;
  const std::lock_guard<std::mutex> lock(mutex);
  int& limit = limits[{kernel, device}];
  if (limit == bytes) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) limit = bytes;
  return error;
}

inline cudaError_t kernel_facts(const void* kernel, int device, KernelFacts* facts) {
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;  // usually: no code that this device can run
  int most = 0;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&facts->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  facts->arch = attributes.ptxVersion;
  facts->shared_bytes = most - static_cast<int>(attributes.sharedSizeBytes);
  return raise_shared_limit(kernel, device, facts->shared_bytes);
}

// The largest grid that the device can hold at once, queried for exactly the kernel and shape of
// the launch. A grid that is too large would be refused, or deadlock at the first barrier.
inline cudaError_t resident_blocks(const void* kernel, int device, int threads, int shared_bytes,
                                   int* blocks) {
  int cooperative = 0, per_multiprocessor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  if (error != cudaSuccess) return error;
  if (!cooperative) return cudaErrorNotSupported;
  KernelFacts facts;
  error = kernel_facts(kernel, device, &facts);
  if (error != cudaSuccess) return error;
  if (shared_bytes > facts.shared_bytes) return cudaErrorInvalidConfiguration;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads,
                                                        static_cast<size_t>(shared_bytes));
  *blocks = facts.multiprocessors * per_multiprocessor;
  return error;
}

// `blocks`: the wanted number; 0 = as many as are useful and fit.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), int device, cudaStream_t stream,
                               int blocks, int64_t useful, int threads, int shared_bytes,
                               const Arguments&... arguments) {
  int resident = 0;
  const cudaError_t error = resident_blocks(reinterpret_cast<const void*>(kernel), device, threads,
                                            shared_bytes, &resident);
  if (error != cudaSuccess) return error;
  if (resident < 1 || blocks > resident) return cudaErrorCooperativeLaunchTooLarge;

  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks ? blocks : useful < resident ? useful : resident);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launch functions of the streaming path (stream.cuh), for full reward heads and for corrections.
cudaError_t launch_stream(const DecodeParams& p, const Workspace& ws, int device,
                          cudaStream_t stream, int blocks);
cudaError_t launch_stream_correction(const DecodeParams& p, const Workspace& ws, int device,
                                     cudaStream_t stream, int blocks);

}  // namespace cuda
}  // namespace dualhead
