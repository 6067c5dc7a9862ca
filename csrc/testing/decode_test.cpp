// SPDX-License-Identifier: Apache-2.0
// One decode step of every compiled kernel (each CPU instruction set, and the CUDA kernel on the
// host backend) at irregular sizes, compared with a computation in double. Every buffer is a heap
// block of exactly its size, so with -DDUALHEAD_SANITIZE any access out of bounds is an error. The
// Python tests cover behaviour in depth; these tests exist for the sanitizers.
#include "kernels/cpu/decode.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_runtime.h"  // the host backend's
#include "host_x86/levels.h"
#include "kernels/cpu/isa.h"
#include "kernels/cuda/decode.h"
#include "kernels/sampling.h"

using namespace dualhead;

namespace {

struct Case {
  int64_t B, d, V, K, H, d_k, S;
  DType dtype;
  bool mix_probs, sampled;
  float softcap;
  RewardHead reward_head;
  int64_t r;
};

// Values that are exact in the dtype, and their bytes in a separate block.
struct Array {
  std::vector<double> value;
  std::unique_ptr<unsigned char[]> bytes;
  void* data() const { return bytes.get(); }
};

Array random_array(int64_t count, DType dtype, double scale, std::mt19937& generator) {
  Array array;
  const size_t size = dtype == DType::kBFloat16 ? 2 : 4;
  array.bytes.reset(new unsigned char[count * size]);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = float_bits(static_cast<float>(normal(generator) * scale));
    if (size == 2) bits &= 0xFFFF0000u;
    const float exact = bits_float(bits);
    const uint16_t high = static_cast<uint16_t>(bits >> 16);
    std::memcpy(array.bytes.get() + i * size, size == 2 ? static_cast<const void*>(&high) : &exact,
                size);
    array.value.push_back(exact);
  }
  return array;
}

// The inputs, outputs and cache of one step, filled with test data.
struct Problem {
  Problem(const Case& c, int64_t filled) : c(c), generator(c.B * 7919 + c.V * 31 + c.d) {
    const int64_t g = c.H * c.d_k;
    const double scale = 1.0 / std::sqrt(static_cast<double>(c.d));
    hidden = random_array(c.B * c.d, c.dtype, 1.0, generator);
    lm_weight = random_array(c.V * c.d, c.dtype, scale, generator);
    if (c.reward_head == RewardHead::kFull) {
      reward_weight = random_array(c.K * c.V * c.d, c.dtype, scale, generator);
    } else {
      reward_down = random_array(c.K * c.r * c.d, c.dtype, scale, generator);
      reward_up = random_array(c.K * changed() * c.r, c.dtype, 0.5, generator);
      reward_bias = random_array(c.K * changed(), c.dtype, 0.5, generator);
    }
    q_weight = random_array(g * c.d, c.dtype, scale, generator);
    k_weight = random_array(g * c.d, c.dtype, scale, generator);
    u_weight = random_array(c.H * c.d, DType::kFloat32, scale, generator);
    gate_bias = random_array(1, DType::kFloat32, 1.0, generator);
    cache_k = random_array(c.B * g * c.S, c.dtype, 1.0, generator);
    cache_u = random_array(c.B * c.H * c.S, DType::kFloat32, 1.0, generator);
    valid.assign(c.B * c.S, 0);
    for (int64_t i = 0; i < c.B * c.S; ++i) valid[i] = i % 3 != 0;
    length.assign(c.B, static_cast<int32_t>(filled));
    seeds.assign(c.B, 17), draws.assign(c.B, 0);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    logits.assign(c.B * c.V, nan), alpha.assign(c.B, nan), gate_logit.assign(c.B, nan);
    logprob.assign(c.B, nan), attention.assign(c.B * c.H * c.S, nan);
    token.assign(c.B, -1), status.assign(c.B, -1);
  }

  // The size of what a correction changes: hidden states or logits.
  int64_t changed() const { return c.reward_head == RewardHead::kEmbedding ? c.d : c.V; }

  DecodeParams params() {
    DecodeParams p{};
    p.B = c.B, p.d = c.d, p.V = c.V, p.K = c.K, p.H = c.H, p.d_k = c.d_k, p.S = c.S;
    p.dtype = c.dtype;
    p.hidden = hidden.data(), p.hidden_stride = c.d;
    p.lm_weight = lm_weight.data(), p.lm_weight_stride = c.d;
    p.reward_head = c.reward_head;
    if (c.reward_head == RewardHead::kFull) {
      p.reward_weight = reward_weight.data();
      p.reward_weight_stride_k = c.V * c.d, p.reward_weight_stride = c.d;
    } else {
      p.reward_bias = reward_bias.data(), p.r = c.r;
      if (c.r > 0) p.reward_down = reward_down.data(), p.reward_up = reward_up.data();
    }
    p.q_weight = q_weight.data(), p.k_weight = k_weight.data();
    p.u_weight = static_cast<const float*>(u_weight.data());
    p.gate_bias = static_cast<const float*>(gate_bias.data());
    p.cache_k = cache_k.data(), p.cache_u = static_cast<float*>(cache_u.data());
    p.cache_valid = valid.data(), p.cache_length = length.data();
    p.mix_probs = c.mix_probs, p.logit_scale = 1.5f, p.logit_softcap = c.softcap;
    if (c.sampled) p.seeds = seeds.data(), p.draws = draws.data();
    p.out_logits = logits.data(), p.out_alpha = alpha.data(), p.out_gate_logit = gate_logit.data();
    p.out_token = token.data(), p.out_logprob = logprob.data(), p.out_status = status.data();
    p.out_attention = attention.data();
    return p;
  }

  // The mean over objectives of U_k D_k h + c_k, (changed(),).
  std::vector<double> change(int64_t b) const {
    const int64_t n = changed();
    std::vector<double> sum(n, 0.0);
    for (int64_t k = 0; k < c.K; ++k) {
      for (int64_t i = 0; i < n; ++i) {
        double value = reward_bias.value[k * n + i];
        for (int64_t j = 0; j < c.r; ++j) {
          value += reward_up.value[(k * n + i) * c.r + j] * product(reward_down, k * c.r + j, b);
        }
        sum[i] += value / c.K;
      }
    }
    return sum;
  }

  // row `row` of weights (rows, d) times row b of hidden.
  double product(const Array& weight, int64_t row, int64_t b) const {
    double sum = 0;
    for (int64_t i = 0; i < c.d; ++i)
      sum += weight.value[row * c.d + i] * hidden.value[b * c.d + i];
    return sum;
  }

  // The gate logit of row b, computed from the definition. The new position is in column `column`.
  double expected_gate_logit(int64_t b, int64_t column) const {
    double logit = gate_bias.value[0];
    for (int64_t h = 0; h < c.H; ++h) {
      std::vector<double> score, u;
      for (int64_t s = 0; s <= column; ++s) {
        if (s < column && !valid[b * c.S + s]) continue;
        double dot = 0;
        for (int64_t j = 0; j < c.d_k; ++j) {
          const int64_t row = h * c.d_k + j;
          const double k = s == column ? product(k_weight, row, b)
                                       : cache_k.value[((b * c.H + h) * c.S + s) * c.d_k + j];
          dot += product(q_weight, row, b) * k;
        }
        score.push_back(dot / std::sqrt(static_cast<double>(c.d_k)));
        u.push_back(s == column ? product(u_weight, h, b) : cache_u.value[(b * c.H + h) * c.S + s]);
      }
      double sum = 0, weighted = 0;
      const double top = *std::max_element(score.begin(), score.end());
      for (size_t i = 0; i < score.size(); ++i) {
        sum += std::exp(score[i] - top), weighted += std::exp(score[i] - top) * u[i];
      }
      logit += weighted / sum;
    }
    return logit;
  }

  std::vector<double> expected_logits(int64_t b, double a) const {
    std::vector<double> lm(c.V), reward(c.V, 0.0), mixed(c.V);
    const auto post = [&](double z) {
      return c.softcap > 0 ? c.softcap * std::tanh(1.5 * z / c.softcap) : 1.5 * z;
    };
    const auto log_softmax = [](std::vector<double> z) {
      double sum = 0;
      for (double value : z) sum += std::exp(value);
      for (double& value : z) value -= std::log(sum);
      return z;
    };
    const bool full = c.reward_head == RewardHead::kFull;
    const bool embeds = c.reward_head == RewardHead::kEmbedding;
    const std::vector<double> changes = full ? std::vector<double>() : change(b);
    for (int64_t v = 0; v < c.V; ++v) {
      lm[v] = product(lm_weight, v, b);
      for (int64_t k = 0; full && k < c.K; ++k) {
        reward[v] += product(reward_weight, k * c.V + v, b) / c.K;
      }
      if (!full) reward[v] = lm[v] + (embeds ? 0.0 : changes[v]);
      for (int64_t i = 0; embeds && i < c.d; ++i) {
        reward[v] += lm_weight.value[v * c.d + i] * changes[i];
      }
      mixed[v] = post((1 - a) * lm[v] + a * reward[v]);
      lm[v] = post(lm[v]), reward[v] = post(reward[v]);
    }
    if (!c.mix_probs) return mixed;
    lm = log_softmax(lm), reward = log_softmax(reward);
    for (int64_t v = 0; v < c.V; ++v) {
      mixed[v] = std::log((1 - a) * std::exp(lm[v]) + a * std::exp(reward[v]));
    }
    return mixed;
  }

  Case c;
  std::mt19937 generator;
  Array reward_down, reward_up, reward_bias;
  Array hidden, lm_weight, reward_weight, q_weight, k_weight, u_weight, gate_bias, cache_k, cache_u;
  std::vector<uint8_t> valid;
  std::vector<int32_t> length, status;
  std::vector<int64_t> seeds, draws, token;
  std::vector<float> logits, alpha, gate_logit, logprob, attention;
};

void check_step(const Problem& problem, int64_t filled) {
  const Case& c = problem.c;
  // The key is rounded to the dtype when it is stored in the cache. All else is fp32.
  const double tolerance = c.dtype == DType::kBFloat16 ? 2e-2 : 2e-5;
  for (int64_t b = 0; b < c.B; ++b) {
    if (filled == c.S) {
      CHECK_EQUAL(problem.status[b], static_cast<int32_t>(kCacheFull));
      CHECK_EQUAL(problem.token[b], 0);
      CHECK_EQUAL(problem.length[b], c.S);
      continue;
    }
    CHECK_EQUAL(problem.status[b], static_cast<int32_t>(kOk));
    CHECK_EQUAL(problem.length[b], filled + 1);
    const double gate_logit = problem.expected_gate_logit(b, filled);
    CHECK(std::fabs(problem.gate_logit[b] - gate_logit) < tolerance);
    CHECK(std::fabs(problem.alpha[b] - 1 / (1 + std::exp(-gate_logit))) < tolerance);
    const std::vector<double> expected = problem.expected_logits(b, problem.alpha[b]);
    const float* row = problem.logits.data() + b * c.V;
    double worst = 0;
    for (int64_t v = 0; v < c.V; ++v) worst = std::max(worst, std::fabs(row[v] - expected[v]));
    // For an embedding head the changed hidden states are rounded to the dtype too.
    const bool rounds = c.reward_head == RewardHead::kEmbedding && c.dtype == DType::kBFloat16;
    CHECK(worst < (rounds ? 0.2 : 5e-5));
    CHECK(problem.token[b] >= 0 && problem.token[b] < c.V);
    if (!c.sampled) CHECK_EQUAL(problem.token[b], std::max_element(row, row + c.V) - row);
    if (c.sampled) CHECK_EQUAL(problem.draws[b], 1);
    double attended = 0;
    for (int64_t s = 0; s < c.S; ++s) attended += problem.attention[b * c.H * c.S + s];
    CHECK(std::fabs(attended - 1) < 1e-5);
  }
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  const int64_t sizes[][7] = {// B, d, V, K, H, d_k, S
                              {1, 1, 1, 1, 1, 1, 1},
                              {1, 7, 5, 1, 2, 3, 4},
                              {3, 33, 65, 2, 3, 5, 9},
                              {2, 64, 131, 1, 2, 16, 130},
                              {9, 47, 64, 3, 1, 48, 17},
                              // In bfloat16 these two and the case with d = 64 take the streaming
                              // path on CUDA.
                              {1, 8, 9, 1, 1, 1, 1},
                              {9, 136, 150, 2, 1, 8, 17}};
  for (const auto& n : sizes) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (bool mix_probs : {false, true}) {
        for (bool sampled : {false, true}) {
          for (RewardHead head :
               {RewardHead::kFull, RewardHead::kEmbedding, RewardHead::kLowRank}) {
            const int64_t r = head == RewardHead::kFull ? 0 : n[1] % 4;
            cases.push_back({n[0], n[1], n[2], n[3], n[4], n[5], n[6], dtype, mix_probs, sampled,
                             mix_probs ? 0.0f : 5.0f, head, r});
          }
        }
      }
    }
  }
  return cases;
}

// Runs `step` on every case with an empty, a nearly full and a full cache.
template <typename Step>
void check_all(const Step& step) {
  for (const Case& c : all_cases()) {
    for (int64_t filled : {int64_t{0}, c.S - 1, c.S}) {
      Problem problem(c, filled);
      step(problem.params());
      check_step(problem, filled);
    }
  }
}

// Uses the smallest allowed ranges, the last one first, because no phase may rely on an order.
void backwards(int64_t count, int64_t grain, cpu::RangeFunction body, void* context) {
  for (int64_t begin = (count - 1) / grain * grain; count > 0 && begin >= 0; begin -= grain) {
    body(begin, std::min(begin + grain, count), context);
  }
}

using Scratch = std::unique_ptr<void, void (*)(void*)>;

Scratch scratch(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, std::max<size_t>(bytes, 1)) != 0) std::abort();
  std::memset(memory, 0xFF, bytes);
  return Scratch(memory, &std::free);
}

void cpu_step(const DecodeParams& params, const cpu::Kernels& kernels) {
  const Scratch workspace = scratch(cpu::workspace_bytes(params), 64);
  cpu::decode_step(params, kernels, workspace.get(), &backwards);
}

}  // namespace

TEST(every_cpu_instruction_set_agrees_with_double) {
  std::istringstream names(cpu::available_levels());
  int levels = 0;
  for (std::string name; std::getline(names, name, ','); ++levels) {
    cpu::force_kernels(name);
    check_all([](const DecodeParams& params) { cpu_step(params, cpu::chosen_kernels()); });
  }
  cpu::force_kernels("");
  CHECK(levels >= 1);
}

#if defined(__x86_64__)
TEST(every_emulated_instruction_set_agrees_with_double) {
  for (const cpu::Kernels* kernels : cpu::kEmulatedLevels) {
    check_all([=](const DecodeParams& params) { cpu_step(params, *kernels); });
  }
}
#endif

TEST(the_cuda_kernels_on_the_host_agree_with_double) {
  for (int compute_major : {8, 9}) {  // both copy mechanisms of the streaming path
    host_cuda::device().compute_major = compute_major;
    host_cuda::device().schedule.seed = static_cast<uint64_t>(compute_major);
    check_all([](const DecodeParams& params) {
      const Scratch workspace = scratch(cuda::decode_workspace_bytes(params), 256);
      CHECK_EQUAL(cuda::decode_step(params, workspace.get(), 0, nullptr), 0);
    });
  }
}
