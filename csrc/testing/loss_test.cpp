// SPDX-License-Identifier: Apache-2.0
// The rows of the training loss, forward and backward, in every compiled kernel (each CPU
// instruction set, and the CUDA kernel on the host backend), compared with the definition in double
// and its central differences. Every buffer is a heap block of exactly its size, so with
// -DDUALHEAD_SANITIZE any access out of bounds is an error. The Python tests cover behaviour in
// depth; these tests exist for the sanitizers.
#include "kernels/cuda/loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/cpu/isa.h"

using namespace dualhead;

namespace {

struct Case {
  int64_t n, V;
  bool mix_probs, mixed, reward, write_lm;
  float scale, softcap;
};

template <typename T>
struct Block {
  explicit Block(int64_t count = 0, T value = T{}) : data(new T[count]), count(count) {
    std::fill(data.get(), data.get() + count, value);
  }
  T& operator[](int64_t i) const { return data[i]; }
  std::unique_ptr<T[]> data;
  int64_t count;
};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The tensors of one chunk. Those that are not wanted have no memory at all.
struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        z_lm(c.mixed ? c.n * c.V : 0),
        z_rm(c.n * c.V),
        gate_logit(c.mixed ? c.n : 0),
        mixed(c.mixed ? c.n : 0, kNan),
        reward(c.reward ? c.n : 0, kNan),
        mixed_grad(mixed.count),
        reward_grad(reward.count),
        gate_grad(mixed.count, kNan),
        normalizers(2 * c.n, kNan),
        labels(c.n) {
    std::mt19937 generator(c.n * 7919 + c.V);
    std::normal_distribution<float> normal;
    for (const auto* block : {&z_lm, &z_rm, &gate_logit, &mixed_grad, &reward_grad}) {
      for (int64_t i = 0; i < block->count; ++i) (*block)[i] = 2.0f * normal(generator);
    }
    for (int64_t i = 0; i < c.n; ++i) labels[i] = generator() % c.V;
    if (c.n > 2 && c.mixed) gate_logit[0] = -200.0f, gate_logit[1] = 200.0f;  // one head alone
    labels[c.n - 1] = c.V - 1;
    original_lm.assign(z_lm.data.get(), z_lm.data.get() + z_lm.count);
    original_rm.assign(z_rm.data.get(), z_rm.data.get() + z_rm.count);
  }

  LossRowsParams params() {
    LossRowsParams p{};
    p.n = c.n, p.V = c.V;
    p.z_rm = z_rm.data.get(), p.labels = labels.data.get();
    p.mix_probs = c.mix_probs, p.logit_scale = c.scale, p.logit_softcap = c.softcap;
    p.mixed_normalizer = normalizers.data.get(), p.rm_normalizer = p.mixed_normalizer + c.n;
    if (c.mixed) {
      p.z_lm = z_lm.data.get(), p.gate_logit = gate_logit.data.get();
      p.mixed = mixed.data.get(), p.mixed_grad = mixed_grad.data.get();
      p.gate_grad = gate_grad.data.get(), p.write_lm = c.write_lm;
    }
    if (c.reward) p.reward = reward.data.get(), p.reward_grad = reward_grad.data.get();
    return p;
  }

  Case c;
  Block<float> z_lm, z_rm, gate_logit, mixed, reward, mixed_grad, reward_grad, gate_grad;
  Block<double> normalizers;
  Block<int64_t> labels;
  std::vector<float> original_lm, original_rm;
};

// One row in double, computed from the definition.
struct Row {
  Row(const Problem& problem, int64_t n) : c(problem.c), label(problem.labels[n]) {
    const auto row = [&](const std::vector<float>& z) {
      return z.empty() ? std::vector<double>(c.V)
                       : std::vector<double>(z.begin() + n * c.V, z.begin() + (n + 1) * c.V);
    };
    lm = row(problem.original_lm), rm = row(problem.original_rm);
    gate_logit = c.mixed ? problem.gate_logit[n] : 0.0;
    mixed_grad = c.mixed ? problem.mixed_grad[n] : 0.0;
    reward_grad = c.reward ? problem.reward_grad[n] : 0.0;
  }

  double log_prob(const std::vector<double>& z) const {
    const auto post = [&](double x) {
      return c.softcap > 0 ? c.softcap * std::tanh(c.scale * x / c.softcap) : c.scale * x;
    };
    double sum = 0;
    for (double x : z) sum += std::exp(post(x));
    return post(z[label]) - std::log(sum);
  }

  double mixed_log_prob() const {
    const double share = 1 / (1 + std::exp(-gate_logit));
    if (c.mix_probs) {
      return std::log((1 - share) * std::exp(log_prob(lm)) + share * std::exp(log_prob(rm)));
    }
    std::vector<double> z(c.V);
    for (int64_t v = 0; v < c.V; ++v) z[v] = (1 - share) * lm[v] + share * rm[v];
    return log_prob(z);
  }

  double objective() const {
    return (c.mixed ? mixed_grad * mixed_log_prob() : 0) +
           (c.reward ? reward_grad * log_prob(rm) : 0);
  }

  double slope(double& x) {
    constexpr double kStep = 1e-5;
    const double before = x;
    x = before + kStep;
    const double high = objective();
    x = before - kStep;
    const double low = objective();
    x = before;
    return (high - low) / (2 * kStep);
  }

  Case c;
  int64_t label;
  std::vector<double> lm, rm;
  double gate_logit, mixed_grad, reward_grad;
};

bool near(double got, double expected) {
  return std::fabs(got - expected) < 2e-5 * std::max(1.0, std::fabs(expected));
}

void check_problem(const Problem& problem) {
  const Case& c = problem.c;
  for (int64_t n = 0; n < c.n; ++n) {
    Row row(problem, n);
    if (c.mixed) CHECK(near(problem.mixed[n], row.mixed_log_prob()));
    if (c.reward) CHECK(near(problem.reward[n], row.log_prob(row.rm)));
    if (c.mixed) CHECK(near(problem.gate_grad[n], row.slope(row.gate_logit)));
    for (int64_t v = 0; v < c.V; ++v) {
      CHECK(near(problem.z_rm[n * c.V + v], row.slope(row.rm[v])));
      if (!c.mixed) continue;
      const float got = problem.z_lm[n * c.V + v];
      CHECK(c.write_lm ? near(got, row.slope(row.lm[v])) : got == problem.original_lm[n * c.V + v]);
    }
  }
}

// Runs both passes on every case.
template <typename Forward, typename Backward>
void check_all(const Forward& forward, const Backward& backward) {
  const int64_t sizes[][2] = {{1, 1}, {3, 3}, {2, 5}, {4, 16}, {3, 33}, {3, 131}};
  for (const auto& size : sizes) {
    for (int wanted : {0b111, 0b110, 0b101, 0b100, 0b010}) {  // mixed, reward, write_lm
      for (bool mix_probs : {false, true}) {
        for (float softcap : {0.0f, 5.0f}) {
          Problem problem({size[0], size[1], mix_probs, (wanted & 4) != 0, (wanted & 2) != 0,
                           (wanted & 1) != 0, softcap > 0 ? -0.7f : 1.0f, softcap});
          forward(problem.params());
          backward(problem.params());
          check_problem(problem);
        }
      }
    }
  }
}

}  // namespace

TEST(every_cpu_instruction_set_agrees_with_double) {
  std::istringstream names(cpu::available_levels());
  int levels = 0;
  for (std::string name; std::getline(names, name, ','); ++levels) {
    cpu::force_kernels(name);
    const cpu::Kernels& kernels = cpu::chosen_kernels();
    check_all([&](const LossRowsParams& p) { kernels.loss_rows(p, 0, p.n); },
              [&](const LossRowsParams& p) { kernels.loss_rows_backward(p, 0, p.n); });
  }
  cpu::force_kernels("");
  CHECK(levels >= 1);
}

TEST(the_cuda_kernel_on_the_host_agrees_with_double) {
  check_all(
      [](const LossRowsParams& p) { CHECK_EQUAL(cuda::loss_rows(p, 0, nullptr), 0); },
      [](const LossRowsParams& p) { CHECK_EQUAL(cuda::loss_rows_backward(p, 0, nullptr), 0); });
}
