// SPDX-License-Identifier: Apache-2.0
// A row of logits of the training loss per block: log-probabilities of the labels, and later the
// gradients of the logits in their place. Formulas: dualhead_ext/loss_rows.py.
//
// Blocks are of one size and every sum has one order (a thread's own entries, its warp's lanes, the
// warps), so a row's bits depend on nothing but the row. Each pass reads the logits once: the
// forward pass keeps running maxima and sums of up to two softmaxes.
#include "../loss_math.h"
#include "loss.h"
#include "primitives.cuh"

namespace dualhead {
namespace cuda {
namespace {

// Four blocks of a multiprocessor's 1024 to 2048 threads; at V = 32000 a thread has 125 entries.
constexpr int kLossThreads = 256;
constexpr int kLossWarps = kLossThreads / kWarp;

struct LossScratch {
  SoftmaxPart part[2][kLossWarps];
  double sum[kLossWarps];
  MixedGradient of_mix;
};

// f(z) = cap(scale * z), and what its derivative multiplies by, from the value.
__device__ __forceinline__ float post_value(const LossRowsParams& p, float z) {
  z *= p.logit_scale;
  return p.logit_softcap > 0.0f ? p.logit_softcap * tanhf(z / p.logit_softcap) : z;
}

__device__ __forceinline__ float post_slope(const LossRowsParams& p, float y) {
  if (p.logit_softcap <= 0.0f) return p.logit_scale;
  const float t = y / p.logit_softcap;
  return (1.0f - t * t) * p.logit_scale;
}

__device__ __forceinline__ float mix_row(LossShares shares, float lm, float rm) {
  if (shares.rm == 0.0f) return lm;
  if (shares.lm == 0.0f) return rm;
  return fmaf(shares.rm, rm, shares.lm * lm);
}

// Takes one more logit in. A NaN is passed over by the maximum and makes the sum NaN.
__device__ __forceinline__ void add_logit(SoftmaxPart& part, float y) {
  if (y > part.max) {
    part.sum = part.max == -INFINITY ? part.sum : part.sum * expf(part.max - y);
    part.max = y;
  }
  if (y != -INFINITY) part.sum += expf(y - part.max);
}

// One part per thread to the row's log-sum-exp, for all threads.
__device__ __forceinline__ double block_log_sum_exp(SoftmaxPart part, SoftmaxPart* slots) {
  part = warp_merge(part);
  if (lane_index() == 0) slots[warp_in_block()] = part;
  block_barrier();  // every warp's part is written
  part = slots[0];
  for (int warp = 1; warp < kLossWarps; ++warp) part = merge_parts(part, slots[warp]);
  return static_cast<double>(part.max) + log(static_cast<double>(part.sum));
}

__device__ __forceinline__ double block_sum(double value, double* slots) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += exchange_xor(value, offset);
  if (lane_index() == 0) slots[warp_in_block()] = value;
  block_barrier();  // every warp's sum is written
  value = slots[0];
  for (int warp = 1; warp < kLossWarps; ++warp) value += slots[warp];
  return value;
}

__global__ void __launch_bounds__(kLossThreads)
    loss_rows_kernel(const __grid_constant__ LossRowsParams p) {
  LossScratch* scratch = reinterpret_cast<LossScratch*>(shared_memory());
  const int64_t n = blockIdx.x, y = p.labels[n];
  const float *z_lm = p.z_lm ? p.z_lm + n * p.V : nullptr, *z_rm = p.z_rm + n * p.V;
  const bool wants_mixed = p.mixed != nullptr;
  const bool wants_rm = p.reward != nullptr || (wants_mixed && p.mix_probs);
  const LossShares shares = loss_shares(wants_mixed ? p.gate_logit[n] : 0.0f);

  SoftmaxPart of_mixed = empty_part(), of_rm = empty_part();
#pragma unroll 4
  for (int64_t v = threadIdx.x; v < p.V; v += kLossThreads) {
    const float rm = z_rm[v], lm = wants_mixed ? z_lm[v] : 0.0f;
    if (wants_rm) add_logit(of_rm, post_value(p, rm));
    if (wants_mixed) add_logit(of_mixed, post_value(p, p.mix_probs ? lm : mix_row(shares, lm, rm)));
  }
  // The label's own logits come from the same formulas, so that its softmax is theirs.
  double rm_total = 0.0, label_rm = 0.0;
  if (wants_rm) {
    rm_total = block_log_sum_exp(of_rm, scratch->part[0]);
    label_rm = static_cast<double>(post_value(p, z_rm[y])) - rm_total;
  }
  double mixed = 0.0, mixed_total = 0.0;
  if (wants_mixed) {
    mixed_total = block_log_sum_exp(of_mixed, scratch->part[1]);
    const float z = p.mix_probs ? z_lm[y] : mix_row(shares, z_lm[y], z_rm[y]);
    mixed = static_cast<double>(post_value(p, z)) - mixed_total;
    if (p.mix_probs) mixed = mixed_log_prob(p.gate_logit[n], shares, mixed, label_rm);
  }
  if (threadIdx.x != 0) return;
  p.rm_normalizer[n] = rm_total;
  if (p.reward) p.reward[n] = static_cast<float>(label_rm);
  if (wants_mixed) {
    p.mixed_normalizer[n] = mixed_total;
    p.mixed[n] = static_cast<float>(mixed);
  }
}

__device__ __forceinline__ float softmax(SplitNormalizer total, float y) {
  return expf((y - total.high) - total.low);
}

// onehot - softmax(y), through f.
__device__ __forceinline__ float pull(const LossRowsParams& p, SplitNormalizer total, float y,
                                      float label) {
  return (label - softmax(total, y)) * post_slope(p, y);
}

__global__ void __launch_bounds__(kLossThreads)
    loss_rows_backward_kernel(const __grid_constant__ LossRowsParams p) {
  LossScratch* scratch = reinterpret_cast<LossScratch*>(shared_memory());
  const int64_t n = blockIdx.x, label = p.labels[n];
  float *z_lm = p.z_lm ? p.z_lm + n * p.V : nullptr, *z_rm = p.z_rm + n * p.V;
  const bool mixes = p.mixed != nullptr, probs = mixes && p.mix_probs;
  const float gate_logit = mixes ? p.gate_logit[n] : 0.0f;
  const LossShares shares = loss_shares(gate_logit);
  const float mixed = mixes ? p.mixed_grad[n] : 0.0f;
  const float reward = p.reward_grad ? p.reward_grad[n] : 0.0f;
  const SplitNormalizer mixed_total = split_normalizer(mixes ? p.mixed_normalizer[n] : 0.0);
  const SplitNormalizer rm_total = split_normalizer(p.rm_normalizer[n]);
  if (probs && threadIdx.x == 0) {
    const double of_lm = static_cast<double>(post_value(p, z_lm[label])) - p.mixed_normalizer[n];
    const double of_rm = static_cast<double>(post_value(p, z_rm[label])) - p.rm_normalizer[n];
    scratch->of_mix = mixed_gradient(gate_logit, shares, of_lm, of_rm, mixed);
  }
  block_barrier();  // the label's logits are read, and may be overwritten; of_mix is written
  const MixedGradient of_mix = probs ? scratch->of_mix : MixedGradient{0.0f, 0.0f, 0.0f};

  float gate = 0.0f;
#pragma unroll 4
  for (int64_t v = threadIdx.x; v < p.V; v += kLossThreads) {
    const float rm = z_rm[v], lm = mixes ? z_lm[v] : 0.0f, hot = v == label ? 1.0f : 0.0f;
    float to_rm = 0.0f, to_lm = 0.0f;
    if (reward != 0.0f || probs) {
      to_rm = pull(p, rm_total, post_value(p, rm), hot) * (reward + of_mix.to_rm);
    }
    if (probs) {
      to_lm = pull(p, mixed_total, post_value(p, lm), hot) * of_mix.to_lm;
    } else if (mixes) {
      const float dz = pull(p, mixed_total, post_value(p, mix_row(shares, lm, rm)), hot) * mixed;
      if (!shares.selects()) gate = fmaf(dz, rm - lm, gate);
      to_lm = dz * shares.lm;
      to_rm = fmaf(dz, shares.rm, to_rm);
    }
    z_rm[v] = to_rm;
    if (p.write_lm) z_lm[v] = to_lm;
  }
  if (!p.gate_grad) return;
  const double sum = block_sum(static_cast<double>(gate), scratch->sum);
  if (threadIdx.x == 0) {
    const double both = static_cast<double>(shares.lm) * static_cast<double>(shares.rm);
    p.gate_grad[n] = probs ? of_mix.gate : static_cast<float>(sum * both);
  }
}

int launch(void (*kernel)(LossRowsParams), const LossRowsParams& p, int device,
           CUstream_st* stream) {
  if (p.n == 0) return cudaSuccess;
  // This library links its own CUDA runtime, which need not know the device that torch's chose.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(p.n));
    config.blockDim = dim3(kLossThreads);
    config.dynamicSmemBytes = sizeof(LossScratch);
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, p);
  }
  if (error != cudaSuccess) (void)cudaGetLastError();  // or the next to ask would get it once more
  return error;
}

}  // namespace

int loss_rows(const LossRowsParams& params, int device, CUstream_st* stream) {
  return launch(loss_rows_kernel, params, device, stream);
}

int loss_rows_backward(const LossRowsParams& params, int device, CUstream_st* stream) {
  return launch(loss_rows_backward_kernel, params, device, stream);
}

}  // namespace cuda
}  // namespace dualhead
