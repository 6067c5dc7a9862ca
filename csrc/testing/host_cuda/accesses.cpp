// SPDX-License-Identifier: Apache-2.0
// The functions that a compiler calls for each memory access of code built with -fsanitize=thread.
// They take the place of its own library: the kernels' threads are fibers of one host thread. Code
// that is built without the option calls none of them.
#include <cstddef>

#include "order.h"

using dualhead::host_cuda::note_access;

extern "C" {

void __tsan_init() { dualhead::host_cuda::check_accesses(); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define DUALHEAD_ACCESS(name, bytes)                                          \
  void __tsan_read##name(void* p) { note_access(p, bytes, false); }           \
  void __tsan_write##name(void* p) { note_access(p, bytes, true); }           \
  void __tsan_unaligned_read##name(void* p) { note_access(p, bytes, false); } \
  void __tsan_unaligned_write##name(void* p) { note_access(p, bytes, true); }

DUALHEAD_ACCESS(1, 1)
DUALHEAD_ACCESS(2, 2)
DUALHEAD_ACCESS(4, 4)
DUALHEAD_ACCESS(8, 8)
DUALHEAD_ACCESS(16, 16)

// Of the guards of static variables, in launches.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

void __tsan_read_range(void* p, size_t bytes) { note_access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { note_access(p, bytes, true); }

}  // extern "C"
