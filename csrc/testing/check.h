// SPDX-License-Identifier: Apache-2.0
// A minimal test harness: TEST(name) { CHECK(...); }. This file has its own main(), so each
// *_test.cpp is one program under CTest. A program without a single check fails.
#pragma once

#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace dualhead::testing {

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> list;
  return list;
}

struct Counts {
  long checks = 0;
  long failures = 0;
};

inline Counts& counts() {
  static Counts total;
  return total;
}

struct Registered {
  Registered(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

inline void check(bool holds, const char* file, int line, const std::string& what) {
  ++counts().checks;
  if (holds) return;
  ++counts().failures;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

template <typename A, typename B>
void check_equal(const A& got, const B& expected, const char* file, int line, const char* text) {
  if (got == expected) return check(true, file, line, text);
  std::ostringstream what;
  what.precision(17);
  what << text << " must be " << expected << ", got " << got;
  check(false, file, line, what.str());
}

inline int run_all() {
  for (const Case& one : cases()) {
    const long before = counts().failures;
    try {
      one.body();
    } catch (const std::exception& error) {
      ++counts().failures;
      std::fprintf(stderr, "%s: unexpected exception: %s\n", one.name, error.what());
    }
    std::printf("%s %s\n", counts().failures == before ? "passed" : "FAILED", one.name);
  }
  std::printf("%ld checks, %ld failures\n", counts().checks, counts().failures);
  return counts().failures == 0 && counts().checks > 0 ? 0 : 1;
}

}  // namespace dualhead::testing

#define TEST(name)                                                              \
  static void name();                                                           \
  static const ::dualhead::testing::Registered name##_registered(#name, &name); \
  static void name()
#define CHECK(condition) ::dualhead::testing::check((condition), __FILE__, __LINE__, #condition)
#define CHECK_EQUAL(got, expected) \
  ::dualhead::testing::check_equal((got), (expected), __FILE__, __LINE__, #got)

int main() { return ::dualhead::testing::run_all(); }
