// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dualhead::cpu {

namespace amx {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}

namespace {

// Best first.
const Kernels* const kLevels[] = {
#if defined(__x86_64__)
    &amx::kernels, &avx512bf16::kernels, &avx512::kernels, &avx2::kernels,
#endif
    &portable::kernels};

std::string names(bool supported_only) {
  std::string text;
  for (const Kernels* level : kLevels) {
    if (supported_only && !level->supported()) continue;
    text += (text.empty() ? "" : ",") + std::string(level->name);
  }
  return text;
}

// `source` says where the name came from, for the error message.
const Kernels* find(const std::string& name, const char* source) {
  for (const Kernels* level : kLevels) {
    if (name != level->name) continue;
    if (level->supported()) return level;
    throw std::runtime_error(std::string(source) + ": this machine cannot run '" + name +
                             "'; it runs " + names(true));
  }
  throw std::runtime_error(std::string(source) + " must be one of " + names(false) + ", got '" +
                           name + "'");
}

const Kernels* best() {
  for (const Kernels* level : kLevels) {
    if (level->supported()) return level;
  }
  return &portable::kernels;
}

std::atomic<const Kernels*> forced{nullptr};

}  // namespace

const Kernels& chosen_kernels() {
  if (const Kernels* kernels = forced.load(std::memory_order_relaxed)) return *kernels;
  // Read once, so that the choice does not change within a process. An invalid name throws at every
  // call.
  static const Kernels* const chosen = [] {
    const char* name = std::getenv("DUALHEAD_FORCE_ISA");
    return name && *name ? find(name, "DUALHEAD_FORCE_ISA") : best();
  }();
  return *chosen;
}

void force_kernels(const std::string& name) {
  forced.store(name.empty() ? nullptr : find(name, "_force_cpu_isa: isa"),
               std::memory_order_relaxed);
}

bool bf16_pays() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("amx-bf16") ||
         (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16"));
#else
  return true;
#endif
}

std::string available_levels() { return names(true); }

}  // namespace dualhead::cpu
