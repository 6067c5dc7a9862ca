// SPDX-License-Identifier: Apache-2.0
// The streaming path of the decode step: weights of two bytes or less at memory bandwidth, in one
// cooperative launch. Every block has three kinds of warps that run at the same time:
//
//   producer    1   copies weight rows into the ring from the start (ring.cuh)
//   gate        3   project, attend, weigh: compute alpha of every batch row (gate.cuh)
//   consumers   8   compute both products on the tensor cores, then logits and softmax parts
//                   (stream_heads.cuh)
//
// So the gate is hidden behind the first tile of weights. Then all warps continue with the phases
// that follow the products on every path (token.cuh).
//
// A row's result is the same for every batch up to 64 rows, every grid and both copy mechanisms:
// the products take a row's inputs in one order, with one tensor core sum per column, and all parts
// are cut at constants. Larger batches take this path only with quantised weights.
// The weights are then read once per 64 rows of hidden states, and a row's result is still the
// same.
#pragma once

#include "gate.cuh"
#include "launch.cuh"
#include "stream_heads.cuh"
#include "tensor_map.h"
#include "token.cuh"

namespace dualhead {
namespace cuda {
namespace {

constexpr int kStreamThreads = kStreamWarps * kWarp;

static_assert(2 * kMaxStages * sizeof(Barrier) <= kHeadBytes / 2,
              "the ring's barriers fit in the first half of the head of shared memory");
static_assert((kMaxBatchTile + kStreamWarps) * sizeof(float) <= kHeadBytes / 2,
              "the scales fit in the second half");
static_assert(kRowBlock == kBlockBytes, "plans are made in the copy engine's blocks");
static_assert(1 << (kBoxes - 1) == 2 * kConsumers, "the largest box is the largest tile");

// A barrier of the gate warps of all blocks; their writes become visible to all of them. `round`
// counts from 1.
__device__ __forceinline__ void gate_barrier(const Workspace& ws, unsigned round) {
  group_barrier<kGateGroup, kGateWarps * kWarp>();
  if (warp_in_block() == kConsumers) {
    if (lane_index() == 0) signal(ws.counter + kGateBlocks, 1);
    wait_for(ws.counter + kGateBlocks, round * gridDim.x);
  }
  group_barrier<kGateGroup, kGateWarps * kWarp>();
}

__device__ __forceinline__ Team gate_team() {
  return Team{static_cast<int64_t>(blockIdx.x) * kGateWarps + warp_in_block() - kConsumers,
              static_cast<int64_t>(gridDim.x) * kGateWarps};
}

// gate_projections, gate_attention, gate and finish_step are not inlined, so that the loads of each
// can use all registers.
__device__ __noinline__ void gate_projections(const DecodeParams& p, const Workspace& ws) {
  project_streamed(p, ws, gate_team());
}

// Executed by all warps except the producer.
__device__ __forceinline__ void correction(const DecodeParams& p, const Workspace& ws) {
  constexpr int kWarps = kConsumers + kGateWarps;
  const Team team{static_cast<int64_t>(blockIdx.x) * kWarps + warp_in_block(),
                  static_cast<int64_t>(gridDim.x) * kWarps};
  prepare_correction(p, ws, team, p.dtype);
}

__device__ __noinline__ void gate_attention(const DecodeParams& p, const Workspace& ws) {
  attend<16>(p, ws, gate_team());
}

// early: whether the projections are complete.
__device__ __noinline__ void gate(const DecodeParams& p, const Workspace& ws, bool early) {
  const Team team = gate_team();
  unsigned round = 0;
  if (!p.gate_logit) {
    if (!early) {
      gate_projections(p, ws);
      gate_barrier(ws, ++round);  // all slices of the projections are complete
    }
    gate_attention(p, ws);
    gate_barrier(ws, ++round);  // all attention parts are complete
  }
  weigh(p, ws, team, true);
  if (p.out_attention) {
    gate_barrier(ws, ++round);  // sums and status of all rows are complete
    normalize_attention(p, ws, team);
  }
}

template <Format kFormat, bool kCorrects>
__device__ __forceinline__ void consume_by_batch(const Stream<kCorrects>& s) {
  switch (s.plan.batch_tile) {
    case 8:
      return consume<kFormat, 1>(s);
    case 16:
      return consume<kFormat, 2>(s);
    case 32:
      return consume<kFormat, 4>(s);
    default:
      return consume<kFormat, 8>(s);
  }
}

template <Format kFormat, bool kCorrects>
__device__ __forceinline__ Stream<kCorrects> stream_of(const DecodeParams& p, const Workspace& ws,
                                                       const StreamPlan& plan,
                                                       const StreamMaps& maps) {
  const int64_t units = kCorrects ? half_units(p) : ceil_div(p.V, kUnit);
  const int64_t inputs = round_up(p.d, run_inputs(kFormat));
  const bool prepared = steps_of(kFormat) > 1;
  Stream<kCorrects> s{p, ws, plan, maps};
  s.begin = static_cast<int>(units * blockIdx.x / gridDim.x);
  s.end = static_cast<int>(units * (blockIdx.x + 1) / gridDim.x);
  s.weight_bytes = static_cast<int>(p.d * 2 / steps_of(kFormat));
  s.row_blocks = static_cast<int>(ceil_div(s.weight_bytes, kBlockBytes));
  s.chunks = static_cast<int>(ceil_div(s.row_blocks, plan.blocks));
  s.passes = kCorrects ? 1 : static_cast<int>((p.K + 2) / 2);
  s.tile_units = kConsumers * units_per_warp(kFormat, plan.batch_tile / 8);
  const bool moved = kCorrects && ws.rows;
  s.hidden = static_cast<const unsigned char*>(prepared ? ws.operand : moved ? ws.rows : p.hidden);
  s.hidden_stride = 2 * (prepared ? inputs : moved ? p.d : p.hidden_stride);
  s.term_stride = prepared ? s.rows() * s.hidden_stride : 0;
  s.hidden_bytes = static_cast<int>(2 * (prepared ? inputs : p.d));
  s.terms = prepared && p.dtype == DType::kFloat32 ? 3 : 1;
  s.operand_scale = plan.resident ? resident_scales() : ws.operand_scale;
  return s;
}

template <bool kCorrects>
__device__ __forceinline__ void prefetch_maps(const Stream<kCorrects>& s) {
  if (!elect_one()) return;
  for (int i = 0; 1 << i <= s.tile_units; ++i) {
    prefetch_map(s.maps.lm + i), prefetch_map(s.maps.reward + i);
  }
  prefetch_map(&s.maps.hidden);
}

template <Format kFormat, bool kBulk, bool kCorrects>
__device__ __forceinline__ void step(const DecodeParams& p, const Workspace& ws,
                                     const StreamPlan& plan, const StreamMaps& maps) {
  const Stream<kCorrects> s = stream_of<kFormat, kCorrects>(p, ws, plan, maps);
  using Fill = Producer<kFormat, kBulk, kCorrects>;
  if (threadIdx.x == 0) {
    Slot slot;
    for (; slot.index < plan.stages; ++slot.index) {
      mbarrier_init(full_barrier(slot), Fill::arrivals());
      mbarrier_init(empty_barrier(slot), kConsumers);
    }
  }
  // Done by the block that is likely to start last, where a missing barrier would be most likely to
  // show.
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < kCounters) ws.counter[threadIdx.x] = 0;
  block_barrier();  // the barriers are initialised
  const bool producer = warp_in_block() == kConsumers + kGateWarps;
  const bool early = plan.projects_early;
  constexpr int kStarters = (kGateWarps + 1) * kWarp;
  Fill weights{s}, hidden{s};
  int filled = 0;
  if (producer) {
    if (kBulk) prefetch_maps(s);
    for (; filled < plan.under_way && weights.more(); ++filled, weights.advance()) {
      if (filled == 1 && early) group_barrier<kStartGroup, kStarters>();
      weights.copy_weights();
    }
    if (filled <= 1 && early) group_barrier<kStartGroup, kStarters>();
  } else if (warp_in_block() >= kConsumers) {
    if (early) {
      gate_projections(p, ws);
      group_barrier<kStartGroup, kStarters>();
    } else {
      prefetch_projection(p, gate_team());
    }
  } else if (plan.resident && !kCorrects) {
    load_resident<kFormat>(s);
  }
  if constexpr (kCorrects) {
    grid_barrier();  // all slices of the projections are complete
    if (!producer) correction(p, ws);
    grid_barrier();  // the rows that the LM head multiplies are complete
    if (plan.resident && warp_in_block() < kConsumers) load_resident<kFormat>(s);
  }
  if constexpr (steps_of(kFormat) > 1) {
    if (!producer && !plan.resident) {
      constexpr int kThreads = (kConsumers + kGateWarps) * kWarp;
      prepare_batch<kPrepareGroup, kThreads>(p, ws, kFormat, prepare_slots());
    }
  }
  grid_barrier();  // counters are zero; early projections and prepared hidden states complete
  if (producer) {
    proxy_fence();  // the copies below read what the grid has prepared
    for (int i = 0; i < filled; ++i, hidden.advance()) hidden.copy_hidden();
    Slot landed;  // plan.under_way stages behind
    for (int i = filled; weights.more(); ++i, weights.advance(), landed.advance(plan.stages)) {
      // Waits until the consumers have emptied the slot in the previous round.
      if (i >= plan.stages) mbarrier_wait(empty_barrier(weights.slot), weights.slot.parity ^ 1u);
      weights.learn_needs();
      if (!weights.weighed) mbarrier_wait(full_barrier(landed), landed.parity);
      weights.copy_weights();
      weights.copy_hidden();
    }
  } else if (warp_in_block() >= kConsumers) {
    gate(p, ws, early);
  } else {
    consume_by_batch<kFormat>(s);
  }
  grid_barrier();  // logits, softmax parts, alpha and status are complete
  finish_step(p, ws);
}

template <Format kFormat, bool kBulk, bool kCorrects>
__global__ void __launch_bounds__(kStreamThreads, 1)
    stream_kernel(const __grid_constant__ DecodeParams p, const __grid_constant__ Workspace ws,
                  const __grid_constant__ StreamPlan plan,
                  const __grid_constant__ StreamMaps maps) {
  // launch_stream_of chooses the kernel that this compilation implements; the other one must not
  // run.
  if constexpr (kBulk ? kHasBulkCopies : kHasAsyncCopies) {
    step<kFormat, kBulk, kCorrects>(p, ws, plan, maps);
  } else {
    trap();
  }
}

// Describes the matrices that a step reads to the copy engine.
template <Format kFormat>
cudaError_t encode_maps(const DecodeParams& p, const Workspace& ws, const StreamPlan& plan,
                        StreamMaps* maps) {
  const int64_t row_bytes = p.d * 2 / steps_of(kFormat);
  const int64_t stride = stored_bytes(p, p.lm_weight_stride);
  const Rows3 lm{p.lm_weight, row_bytes, p.V, stride, 1, p.V * stride};
  Rows3 reward;
  if (corrects(p)) {
    // The second half of the vocabulary. If it is empty: a row whose products are not used.
    const int64_t first = static_cast<int64_t>(half_units(p)) * kUnit;
    const int64_t rows = p.V > first ? p.V - first : 1;
    const void* base = static_cast<const unsigned char*>(p.lm_weight) + (p.V - rows) * stride;
    reward = Rows3{base, row_bytes, rows, stride, 1, p.V * stride};
  } else {
    const int64_t reward_stride = stored_bytes(p, p.reward_weight_stride);
    // With one objective its stride is arbitrary.
    const int64_t plane = p.K > 1 ? stored_bytes(p, p.reward_weight_stride_k) : p.V * reward_stride;
    reward = Rows3{p.reward_weight, row_bytes, p.V, reward_stride, p.K, plane};
  }
  const bool prepared = steps_of(kFormat) > 1;
  const int64_t hidden_bytes = 2 * (prepared ? operand_inputs(p) : p.d);
  const int64_t hidden_rows = operand_terms(p) * product_rows(p);
  const int64_t own_stride = 2 * (ws.rows ? p.d : p.hidden_stride);
  const int64_t hidden_stride = prepared ? hidden_bytes : own_stride;
  const void* hidden_base = prepared ? ws.operand : ws.rows ? ws.rows : p.hidden;
  const Rows3 hidden{
      hidden_base, hidden_bytes, hidden_rows, hidden_stride, 1, hidden_rows * hidden_stride};
  const int tile_units = kConsumers * units_per_warp(kFormat, plan.batch_tile / 8);
  cudaError_t error = encode_map(hidden, plan.batch_tile, &maps->hidden);
  for (int i = 0; 1 << i <= tile_units && error == cudaSuccess; ++i) {
    error = encode_map(lm, kUnit << i, maps->lm + i);
    if (error == cudaSuccess) error = encode_map(reward, kUnit << i, maps->reward + i);
  }
  return error;
}

template <Format kFormat, bool kBulk, bool kCorrects>
cudaError_t launch(const DecodeParams& p, const Workspace& ws, const StreamPlan& plan, int device,
                   cudaStream_t stream, int blocks) {
  // The token phase reuses the memory of the ring and everything else for its scratch.
  const int scratch = static_cast<int>(sizeof(TokenScratch));
  const int shared_bytes = plan.shared_bytes > scratch ? plan.shared_bytes : scratch;
  StreamMaps maps = {};
  if (kBulk) {
    const cudaError_t error = encode_maps<kFormat>(p, ws, plan, &maps);
    if (error != cudaSuccess) return error;
  }
  const int64_t useful = corrects(p) ? half_units(p) : ceil_div(p.V, kUnit);
  return launch_cooperative(stream_kernel<kFormat, kBulk, kCorrects>, device, stream, blocks,
                            useful, kStreamThreads, shared_bytes, p, ws, plan, maps);
}

template <bool kBulk, bool kCorrects>
cudaError_t launch_format(const DecodeParams& p, const Workspace& ws, const StreamPlan& plan,
                          int device, cudaStream_t stream, int blocks) {
  switch (format_of(p)) {
    case Format::kBFloat16:
      return launch<Format::kBFloat16, kBulk, kCorrects>(p, ws, plan, device, stream, blocks);
    case Format::kFloat16:
      return launch<Format::kFloat16, kBulk, kCorrects>(p, ws, plan, device, stream, blocks);
    case Format::kInt8:
      return launch<Format::kInt8, kBulk, kCorrects>(p, ws, plan, device, stream, blocks);
    case Format::kFp8:
      return launch<Format::kFp8, kBulk, kCorrects>(p, ws, plan, device, stream, blocks);
    case Format::kInt4:
      return launch<Format::kInt4, kBulk, kCorrects>(p, ws, plan, device, stream, blocks);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

// Launches one kind of head. Each kind has a source file of its own, so that they compile in
// parallel.
template <bool kCorrects>
cudaError_t launch_stream_of(const DecodeParams& p, const Workspace& ws, int device,
                             cudaStream_t stream, int blocks) {
  // The architecture that the code was compiled for determines the copy mechanism. It need not be
  // the device's: a Hopper device may run PTX of sm_80, compiled by the driver. All kernels of the
  // library have the same one, so a single kernel is queried.
  KernelFacts facts;
  const auto kernel = stream_kernel<Format::kBFloat16, true, kCorrects>;
  const cudaError_t error = kernel_facts(reinterpret_cast<const void*>(kernel), device, &facts);
  if (error != cudaSuccess) return error;
  const bool bulk = facts.arch >= kBulkArch;
  StreamPlan plan;
  const int64_t grid = blocks ? blocks : facts.multiprocessors;  // a block takes a whole one
  if (!make_plan(p, facts.shared_bytes, grid, &plan)) return cudaErrorInvalidConfiguration;
  return bulk ? launch_format<true, kCorrects>(p, ws, plan, device, stream, blocks)
              : launch_format<false, kCorrects>(p, ws, plan, device, stream, blocks);
}

}  // namespace cuda
}  // namespace dualhead
