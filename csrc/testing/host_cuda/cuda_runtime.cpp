// SPDX-License-Identifier: Apache-2.0
// The host backend's only device, number 0.
#include "cuda_runtime.h"

#include <map>
#include <mutex>
#include <thread>

namespace dualhead {
namespace host_cuda {
namespace {

constexpr size_t kSharedBytes = 48 * 1024;  // without cudaFuncSetAttribute
constexpr unsigned kMostThreads = 1024;

thread_local cudaError_t last_error = cudaSuccess;

// The shared memory limits set for kernels; the default for all others.
struct SharedLimits {
  std::mutex mutex;
  std::map<const void*, size_t> of_kernel;
  std::map<const void*, int> times;

  size_t get(const void* kernel) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto limit = of_kernel.find(kernel);
    return limit == of_kernel.end() ? kSharedBytes : limit->second;
  }

  void set(const void* kernel, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    of_kernel[kernel] = bytes;
    ++times[kernel];
  }
};

SharedLimits shared_limits;

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t refusal(const cudaLaunchConfig_t& config, const void* kernel, bool cooperative) {
  if (config.gridDim.x == 0 || config.blockDim.x == 0 || config.blockDim.x > kMostThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > shared_limits.get(kernel)) return cudaErrorInvalidValue;
  if (cooperative && !device().cooperative_launch) return cudaErrorNotSupported;
  const int64_t resident =
      static_cast<int64_t>(device().multiprocessors) * device().blocks_per_multiprocessor;
  if (cooperative && config.gridDim.x > resident) return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

}  // namespace

Device& device() {
  static Device the_device;
  return the_device;
}

int times_limit_was_set(const void* kernel) {
  const std::lock_guard<std::mutex> lock(shared_limits.mutex);
  return shared_limits.times[kernel];
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& body) {
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) {
      cooperative = config.attrs[i].val.cooperative != 0;
    }
  }
  const cudaError_t error = refusal(config, kernel, cooperative);
  if (error != cudaSuccess) return record(error);
  run_grid(config.gridDim, config.blockDim, config.dynamicSmemBytes, cooperative, device().schedule,
           body);
  return cudaSuccess;
}

}  // namespace host_cuda
}  // namespace dualhead

using dualhead::host_cuda::device;
using dualhead::host_cuda::record;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
  }
  return "an unknown error";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "refused by the host backend";
}

cudaError_t cudaSetDevice(int index) {
  return record(index == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = dualhead::host_cuda::last_error;
  dualhead::host_cuda::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return record(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device().multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device().compute_major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = device().cooperative_launch;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device().shared_bytes_per_block;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (device().compiled_major < 0) return record(cudaErrorNoKernelImageForDevice);
  const int major = device().compiled_major ? device().compiled_major : device().compute_major;
  *attributes = {0, 10 * major};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > device().shared_bytes_per_block) {
    return record(cudaErrorInvalidValue);
  }
  dualhead::host_cuda::shared_limits.set(kernel, static_cast<size_t>(value));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared_bytes) {
  if (threads < 1) return record(cudaErrorInvalidValue);
  std::this_thread::yield();  // lets other threads run between these settings and the launch
  // A multiprocessor has the shared memory of one block plus 1 KiB, which the driver reserves per
  // block.
  const size_t all = static_cast<size_t>(device().shared_bytes_per_block) + 1024;
  const int fit = static_cast<int>(all / (shared_bytes + 1024));
  *blocks = fit < device().blocks_per_multiprocessor ? fit : device().blocks_per_multiprocessor;
  return cudaSuccess;
}
