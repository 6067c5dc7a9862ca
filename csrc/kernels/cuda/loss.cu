// SPDX-License-Identifier: Apache-2.0
// One row of logits of the training loss per block: log-probabilities of the labels, and later the
// gradients, which overwrite the logits. Formulas: dualhead_ext/loss/rows.py.
//
// A thread takes four adjacent logits at a time. Which thread takes which depends only on V, not on
// the alignment of the row, and every sum has one order (a thread's own entries, the lanes of its
// warp, the warps). So a row's bits depend only on the row. Each pass reads the logits once: the
// forward pass keeps running maxima and sums of up to two softmaxes.
#include "../head_math.h"
#include "../loss_math.h"
#include "loss.h"
#include "primitives.cuh"

namespace dualhead {
namespace cuda {
namespace {

// Two blocks fit on a multiprocessor with 64 registers per thread: half of its threads. A chunk of
// the loss has few rows, about one per multiprocessor at V = 32000, so blocks must be large.
constexpr int kMostThreads = 512;
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr int kNeighbours = 4;

// Rounds of kNeighbours logits that a thread loads before it uses the first. With one, the 1024
// threads of a multiprocessor have 32 KiB in flight, which take 1,600 clocks of latency and 450 of
// arithmetic: 16.0 bytes per clock, where memory delivers 16.5. With two, 26.
constexpr int kAhead = 2;

// Shared by a row's threads. One thread computes shares and of_mix, in double, for the others.
struct LossScratch {
  SoftmaxPart part[2][kMostWarps];
  double sum[kMostWarps];
  LossShares shares;
  MixedGradient of_mix;
};

// A row, and what is wanted of it.
struct LossRow {
  float *lm, *rm;
  int64_t label;
  bool mixes, probs;  // probs: mixes probabilities instead of logits
};

__device__ __forceinline__ LossRow own_row(const LossRowsParams& p) {
  const int64_t n = blockIdx.x;
  const bool mixes = p.mixed != nullptr;
  return LossRow{mixes ? p.z_lm + n * p.V : nullptr, p.z_rm + n * p.V, p.labels[n], mixes,
                 mixes && p.mix_probs};
}

__device__ __forceinline__ float post_value(const LossRowsParams& p, float z) {
  return postprocess(p.logit_scale, p.logit_softcap, z);
}

__device__ __forceinline__ float post_slope(const LossRowsParams& p, float y) {
  return postprocess_slope(p.logit_scale, p.logit_softcap, y);
}

__device__ __forceinline__ float mix_logits(LossShares shares, float lm, float rm) {
  if (shares.rm == 0.0f) return lm;
  if (shares.lm == 0.0f) return rm;
  return fmaf(shares.rm, rm, shares.lm * lm);
}

// How many of kNeighbours logits there are from v on: none beyond the end of the row.
__device__ __forceinline__ int neighbours_at(const LossRowsParams& p, int64_t v) {
  const int64_t left = p.V - v;
  return left < kNeighbours ? left > 0 ? static_cast<int>(left) : 0 : kNeighbours;
}

// Four adjacent logits of each head.
struct FourLogits {
  Four lm, rm;
};

__device__ __forceinline__ FourLogits load_logits(const LossRowsParams& p, const LossRow& row,
                                                  int64_t v) {
  const int count = neighbours_at(p, v);
  FourLogits four = {};
  four.rm = load_four(row.rm + v, count);
  if (row.mixes) four.lm = load_four(row.lm + v, count);
  return four;
}

// --- log-probabilities ---------------------------------------------------------------------------

// Adds f of the first `count` logits. The maximum ignores NaN; the sum becomes NaN.
__device__ __forceinline__ void add_logits(const LossRowsParams& p, SoftmaxPart& part, Four z,
                                           int count) {
  float max = part.max;
#pragma unroll
  for (int i = 0; i < kNeighbours; ++i) {
    const float y = post_value(p, z.x[i]);  // also of logits that are not there: no branch
    z.x[i] = i < count ? y : -INFINITY;
    max = fmaxf(max, z.x[i]);
  }
  const float shift = max == -INFINITY ? 0.0f : max;
  const float low = expf(z.x[0] - shift) + expf(z.x[1] - shift);
  const float high = expf(z.x[2] - shift) + expf(z.x[3] - shift);
  if (max > part.max) part.sum *= expf(part.max - max);
  part = SoftmaxPart{max, part.sum + (low + high)};
}

// The row's log-sum-exp from one part per thread; valid in the first warp.
__device__ __forceinline__ double block_log_sum_exp(SoftmaxPart part, SoftmaxPart* slots) {
  part = warp_merge(part);
  if (lane_index() == 0) slots[warp_in_block()] = part;
  block_barrier();  // every warp has written its part
  if (warp_in_block() != 0) return 0.0;
  part = warp_merge(lane_index() < warps_per_block() ? slots[lane_index()] : empty_part());
  return static_cast<double>(part.max) + log(static_cast<double>(part.sum));
}

__global__ void __launch_bounds__(kMostThreads, 2)
    loss_rows_kernel(const __grid_constant__ LossRowsParams p) {
  LossScratch* scratch = reinterpret_cast<LossScratch*>(shared_memory());
  const LossRow row = own_row(p);
  const int64_t n = blockIdx.x;
  const bool wants_rm = p.reward != nullptr || row.probs;
  if (threadIdx.x == 0 && row.mixes) scratch->shares = loss_shares(p.gate_logit[n]);
  block_barrier();  // shares are written
  const LossShares shares = row.mixes ? scratch->shares : LossShares{0.0f, 1.0f};

  SoftmaxPart of_mixed = empty_part(), of_rm = empty_part();
  const int64_t step = blockDim.x * kNeighbours;
  for (int64_t first = threadIdx.x * kNeighbours; first < p.V; first += kAhead * step) {
    FourLogits four[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) four[i] = load_logits(p, row, first + i * step);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int count = neighbours_at(p, first + i * step);
      if (count == 0) break;
      Four z = four[i].lm;
      const Four rm = four[i].rm;
      if (wants_rm) add_logits(p, of_rm, rm, count);
      if (!row.mixes) continue;
#pragma unroll
      for (int n = 0; n < kNeighbours; ++n) {
        if (!row.probs) z.x[n] = mix_logits(shares, z.x[n], rm.x[n]);
      }
      add_logits(p, of_mixed, z, count);
    }
  }
  const double rm_total = wants_rm ? block_log_sum_exp(of_rm, scratch->part[0]) : 0.0;
  const double mixed_total = row.mixes ? block_log_sum_exp(of_mixed, scratch->part[1]) : 0.0;
  if (threadIdx.x != 0) return;

  // The label's value is computed by the same formulas as the softmax.
  const float label_rm = row.rm[row.label], label_lm = row.mixes ? row.lm[row.label] : 0.0f;
  const double of_reward = static_cast<double>(post_value(p, label_rm)) - rm_total;
  p.rm_normalizer[n] = rm_total;
  if (p.reward) p.reward[n] = static_cast<float>(of_reward);
  if (!row.mixes) return;
  const float z = row.probs ? label_lm : mix_logits(shares, label_lm, label_rm);
  double mixed = static_cast<double>(post_value(p, z)) - mixed_total;
  if (row.probs) mixed = mixed_log_prob(p.gate_logit[n], shares, mixed, of_reward);
  p.mixed_normalizer[n] = mixed_total;
  p.mixed[n] = static_cast<float>(mixed);
}

// --- gradients -----------------------------------------------------------------------------------

// What a row's gradients are computed from, besides its logits.
struct Upstream {
  LossShares shares;
  MixedGradient of_mix;  // probability mix only; otherwise 0
  float mixed, reward;
  SplitNormalizer mixed_total, rm_total;
};

__device__ __forceinline__ Upstream own_upstream(const LossRowsParams& p, const LossRow& row,
                                                 LossScratch* scratch) {
  const int64_t n = blockIdx.x;
  const float mixed = row.mixes ? p.mixed_grad[n] : 0.0f;
  if (threadIdx.x == 0 && row.mixes) {
    scratch->shares = loss_shares(p.gate_logit[n]);
    if (row.probs) {
      const double lm = static_cast<double>(post_value(p, row.lm[row.label]));
      const double rm = static_cast<double>(post_value(p, row.rm[row.label]));
      scratch->of_mix = mixed_gradient(p.gate_logit[n], scratch->shares, lm - p.mixed_normalizer[n],
                                       rm - p.rm_normalizer[n], mixed);
    }
  }
  block_barrier();  // shares and of_mix are written; the label's logits may be overwritten
  return Upstream{row.mixes ? scratch->shares : LossShares{0.0f, 1.0f},
                  row.probs ? scratch->of_mix : MixedGradient{0.0f, 0.0f, 0.0f},
                  mixed,
                  p.reward_grad ? p.reward_grad[n] : 0.0f,
                  split_normalizer(row.mixes ? p.mixed_normalizer[n] : 0.0),
                  split_normalizer(p.rm_normalizer[n])};
}

// The gradient (onehot - softmax(f(z))) f'(z). label: 1 if z is the label's logit, else 0.
__device__ __forceinline__ float pull(const LossRowsParams& p, SplitNormalizer total, float z,
                                      float label) {
  const float y = post_value(p, z);
  return (label - expf((y - total.high) - total.low)) * post_slope(p, y);
}

// Replaces the two logits of one token by their gradients. Returns the gate's term.
__device__ __forceinline__ float make_gradients(const LossRowsParams& p, const LossRow& row,
                                                const Upstream& up, float label, float& lm,
                                                float& rm) {
  float gate = 0.0f, to_rm = 0.0f;
  if (up.reward != 0.0f || row.probs) {
    to_rm = pull(p, up.rm_total, rm, label) * (up.reward + up.of_mix.to_rm);
  }
  if (row.probs) {
    lm = pull(p, up.mixed_total, lm, label) * up.of_mix.to_lm;
  } else if (row.mixes) {
    const float dz = pull(p, up.mixed_total, mix_logits(up.shares, lm, rm), label) * up.mixed;
    if (!up.shares.selects()) gate = dz * (rm - lm);
    lm = dz * up.shares.lm;
    to_rm = fmaf(dz, up.shares.rm, to_rm);
  }
  rm = to_rm;
  return gate;
}

// The sum over the block's threads; valid in the first warp.
__device__ __forceinline__ double block_sum(double value, double* slots) {
  value = warp_sum(value);
  if (lane_index() == 0) slots[warp_in_block()] = value;
  block_barrier();  // every warp has written its sum
  if (warp_in_block() != 0) return 0.0;
  return warp_sum(lane_index() < warps_per_block() ? slots[lane_index()] : 0.0);
}

__global__ void __launch_bounds__(kMostThreads, 2)
    loss_rows_backward_kernel(const __grid_constant__ LossRowsParams p) {
  LossScratch* scratch = reinterpret_cast<LossScratch*>(shared_memory());
  const LossRow row = own_row(p);
  const Upstream up = own_upstream(p, row, scratch);
  double gate = 0.0;  // double, because its terms cancel
  for (int64_t v = threadIdx.x * kNeighbours; v < p.V; v += blockDim.x * kNeighbours) {
    const int count = p.V - v < kNeighbours ? static_cast<int>(p.V - v) : kNeighbours;
    Four rm = load_four(row.rm + v, count), lm = {};
    if (row.mixes) lm = load_four(row.lm + v, count);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kNeighbours; ++i) {
      const float label = v + i == row.label ? 1.0f : 0.0f;
      const float term = make_gradients(p, row, up, label, lm.x[i], rm.x[i]);
      if (i < count) sum += term;
    }
    gate += static_cast<double>(sum);
    store_four(row.rm + v, rm, count);
    if (p.write_lm) store_four(row.lm + v, lm, count);
  }
  if (!p.gate_grad) return;
  gate = row.probs ? 0.0 : block_sum(gate, scratch->sum);
  if (threadIdx.x != 0) return;
  const double both = static_cast<double>(up.shares.lm) * static_cast<double>(up.shares.rm);
  p.gate_grad[blockIdx.x] = row.probs ? up.of_mix.gate : static_cast<float>(gate * both);
}

// --- launches ------------------------------------------------------------------------------------

// Enough threads for V, in whole warps.
int threads_for(int64_t V) {
  const int64_t threads = ((V + kNeighbours - 1) / kNeighbours + kWarp - 1) / kWarp * kWarp;
  return static_cast<int>(threads < kMostThreads ? threads : kMostThreads);
}

int launch(void (*kernel)(LossRowsParams), const LossRowsParams& p, int device,
           CUstream_st* stream) {
  if (p.n == 0) return cudaSuccess;
  // This library links its own CUDA runtime, whose current device may differ from that of torch's.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(p.n));
    config.blockDim = dim3(threads_for(p.V));
    config.dynamicSmemBytes = sizeof(LossScratch);
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, p);
  }
  if (error != cudaSuccess) (void)cudaGetLastError();  // or the next caller would get it again
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
