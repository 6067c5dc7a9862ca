// SPDX-License-Identifier: Apache-2.0
// The decode step in one cooperative launch, from hidden state to token: the plain path. It handles
// fp32 weights, rows that do not start and end at multiples of 16 bytes, and steps whose products
// GEMMs have computed. All other steps take the streaming path (stream.cuh).
//
// The phases are separated by grid barriers. Each phase strides over work items of constant size
// (workspace.h), so a row's bits depend neither on the grid nor on the other rows. No float is ever
// added atomically.
//
//   phase              item                       unit    reads              writes
//   project            rows x slice of d x tile   warp    hidden             partial sums
//   attend             (b, h) x cache split       warp    those, cache       column, parts
//   weigh              b                          warp    attention parts    alpha, cache length
//   prepare_correction b x 32 inputs              warp    partial sums       change or inner
//   heads              chunk of V x tile          block   hidden, alpha      logits, softmax parts
//   (finish_products   b x chunk                  warp    products, alpha    the same)
//   normalizers        b x head, mix_probs        block   softmax parts      two log-sum-exps
//   mix_distributions  b x chunk, mix_probs       warp    f(z) of both       log-probs, parts
//   pick_tokens        b                          block   logits, parts      token, logprob, status
//
// Shared memory: ChunkLogits (2 KiB) in heads, later TokenScratch (12.3 KiB) at the same address.
#include <cstdio>

#include "decode.h"
#include "gate.cuh"
#include "heads.cuh"
#include "launch.cuh"
#include "primitives.cuh"
#include "token.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {
namespace {

constexpr int kMaxThreads = 256;

static_assert(sizeof(ChunkLogits) <= sizeof(TokenScratch), "heads and later phases share memory");
constexpr int kSharedBytes = sizeof(TokenScratch);

// Whether fp32 rows can be read sixteen bytes at a time. The result has the same bits either way.
__device__ __forceinline__ bool in_fours(const DecodeParams& p) {
  const int64_t numbers = p.d | p.hidden_stride | p.lm_weight_stride | p.reward_weight_stride |
                          p.reward_weight_stride_k;
  return numbers % 4 == 0 && sixteen_divides(p.hidden) && sixteen_divides(p.lm_weight) &&
         sixteen_divides(p.reward_weight) && sixteen_divides(p.reward_down) &&
         sixteen_divides(p.q_weight) && sixteen_divides(p.k_weight) && sixteen_divides(p.u_weight);
}

// projections and attention are not inlined, so that the loads of each can use all registers.
template <bool kFloat32>
__device__ __noinline__ void projections(const DecodeParams& p, const Workspace& ws, DType dtype) {
  if (kFloat32 && in_fours(p)) {
    project_plain<true>(p, ws, whole_grid(), dtype);
  } else {
    project_plain<false>(p, ws, whole_grid(), dtype);
  }
}

__device__ __noinline__ void attention(const DecodeParams& p, const Workspace& ws) {
  attend<8>(p, ws, whole_grid());
}

// kFloat32: fp32 weights and hidden states, the main use of this path. Otherwise any dtype, tested
// at every load. kCorrects: the reward head is a correction.
template <bool kFloat32, bool kCorrects>
__global__ void __launch_bounds__(kMaxThreads, 2)
    decode_step_kernel(const __grid_constant__ DecodeParams p,
                       const __grid_constant__ Workspace ws) {
  const DType dtype = kFloat32 ? DType::kFloat32 : p.dtype;
  const Quantization quantization = kFloat32 ? Quantization::kNone : p.quantization;
  if (projection_rows(p) > 0) {
    projections<kFloat32>(p, ws, dtype);
    grid_barrier();  // all slices of the projections are complete
  }
  if (!p.gate_logit) {
    attention(p, ws);
    grid_barrier();  // all attention parts are complete
  }
  weigh(p, ws, whole_grid(), false);
  if (kCorrects && !p.lm_product) prepare_correction(p, ws, whole_grid(), dtype);
  grid_barrier();  // alpha, status and the correction's operands are complete
  if (p.out_attention) normalize_attention(p, ws, whole_grid());
  if (p.lm_product) {
    finish_products(p, ws, dtype);
  } else if (kFloat32 && in_fours(p)) {
    heads<true, kCorrects>(p, ws, dtype, quantization);
  } else {
    heads<false, kCorrects>(p, ws, dtype, quantization);
  }
  grid_barrier();  // logits and softmax parts are complete
  finish_step(p, ws);
}

// The number of blocks that the largest phase can use. More would only slow down the barriers.
int64_t useful_blocks(const DecodeParams& p, int threads) {
  const int64_t tiles = ceil_div(p.B, kTile), warps = threads / kWarp;
  const int64_t chunks = ceil_div(p.V, kChunk);
  const int64_t heads = p.lm_product ? ceil_div(p.B * chunks, warps) : chunks * tiles;
  const int64_t project =
      ceil_div(ceil_div(projection_rows(p), kFmaRows) * ceil_div(p.d, kSlice) * 2 * tiles, warps);
  const int64_t attend = ceil_div(p.B * p.H * ceil_div(p.S, kSplit), warps);
  const int64_t most = heads > project ? heads : project;
  return most > attend ? most : attend;
}

template <bool kFloat32, bool kCorrects>
cudaError_t launch(const DecodeParams& p, const Workspace& ws, int device, cudaStream_t stream,
                   LaunchShape shape) {
  const int threads = shape.threads ? shape.threads : kMaxThreads;
  if (threads < kWarp || threads > kMaxThreads || threads % kWarp) return cudaErrorInvalidValue;
  return launch_cooperative(decode_step_kernel<kFloat32, kCorrects>, device, stream, shape.blocks,
                            useful_blocks(p, threads), threads, kSharedBytes, p, ws);
}

cudaError_t launch_path(const DecodeParams& p, const Workspace& ws, int device, cudaStream_t stream,
                        LaunchShape shape) {
  if (streams(p)) {
    if (shape.threads) return cudaErrorInvalidValue;
    const auto launch = corrects(p) ? launch_stream_correction : launch_stream;
    return launch(p, ws, device, stream, shape.blocks);
  }
  const bool float32 = p.dtype == DType::kFloat32 && p.quantization == Quantization::kNone;
  if (corrects(p)) {
    return float32 ? launch<true, true>(p, ws, device, stream, shape)
                   : launch<false, true>(p, ws, device, stream, shape);
  }
  return float32 ? launch<true, false>(p, ws, device, stream, shape)
                 : launch<false, false>(p, ws, device, stream, shape);
}

}  // namespace

bool decode_streams(const DecodeParams& params) { return streams(params); }

bool decode_wants_products(const DecodeParams& params) { return wants_products(params); }

size_t decode_workspace_bytes(const DecodeParams& params) {
  Workspace workspace;
  return lay_out_workspace(params, nullptr, &workspace);
}

int decode_step(const DecodeParams& params, void* workspace, int device, CUstream_st* stream,
                LaunchShape shape) {
  if (params.B == 0) return cudaSuccess;
  // This library links its own CUDA runtime, whose current device may differ from that of torch's.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    Workspace ws;
    lay_out_workspace(params, workspace, &ws);
    error = launch_path(params, ws, device, stream, shape);
  }
  // Clears the error of a refused launch, which the next caller of cudaGetLastError would get
  // again.
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

const char* error_text(int error) {
  static thread_local char text[512];
  const cudaError_t code = static_cast<cudaError_t>(error);
  int length =
      snprintf(text, sizeof(text), "%s: %s", cudaGetErrorName(code), cudaGetErrorString(code));
  if (code != cudaErrorNoKernelImageForDevice && code != cudaErrorInvalidDeviceFunction) {
    return text;
  }
  // Adds to the driver's message which architectures the code was compiled for and which one is
  // needed.
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return text;
  }
  length += snprintf(text + length, sizeof(text) - length, " (compiled for");
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    length += snprintf(text + length, sizeof(text) - length, " sm_%d", arch / 10);
  }
  snprintf(text + length, sizeof(text) - length,
           ", device %d is sm_%d%d: compile with TORCH_CUDA_ARCH_LIST=%d.%d)", device, major, minor,
           major, minor);
  return text;
}

}  // namespace cuda
}  // namespace dualhead
