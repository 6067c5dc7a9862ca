// SPDX-License-Identifier: Apache-2.0
// One bug for each tool of compute-sanitizer: `seeded_bugs TOOL`. A tool that does not find its bug
// here proves nothing about our kernels (tools/gpu/sanitizers.py). The bugs are in the namespace of
// our kernels, so that a kernel filter that misses our kernels misses these too.
#include <cstdio>
#include <cstring>

namespace dualhead {

__global__ void memcheck_bug(int* out) { out[threadIdx.x + 1] = 1; }  // one beyond the end

__global__ void racecheck_bug(int* out) {  // reads another thread's cell without a barrier
  __shared__ int cells[64];
  cells[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = cells[(threadIdx.x + 32) % 64];
}

__global__ void synccheck_bug(int* out) {  // a barrier that half of each warp never reaches
  if (threadIdx.x % 32 < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void initcheck_bug(int* out, const int* never_written) {
  out[threadIdx.x] = never_written[threadIdx.x];
}

}  // namespace dualhead

int main(int argc, char** argv) {
  const char* tool = argc > 1 ? argv[1] : "";
  const size_t bytes = 64 * sizeof(int);
  int* out = nullptr;
  int* in = nullptr;
  if (cudaMalloc(&out, bytes) != cudaSuccess || cudaMalloc(&in, bytes) != cudaSuccess) return 2;
  if (!strcmp(tool, "memcheck")) {
    dualhead::memcheck_bug<<<1, 64>>>(out);
  } else if (!strcmp(tool, "racecheck")) {
    dualhead::racecheck_bug<<<1, 64>>>(out);
  } else if (!strcmp(tool, "synccheck")) {
    dualhead::synccheck_bug<<<1, 64>>>(out);
  } else if (!strcmp(tool, "initcheck")) {
    dualhead::initcheck_bug<<<1, 64>>>(out, in);
  } else {
    fprintf(stderr, "usage: seeded_bugs memcheck | racecheck | synccheck | initcheck\n");
    return 2;
  }
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) fprintf(stderr, "%s\n", cudaGetErrorString(error));
  return 0;  // what the tool found is the tool's exit code
}
