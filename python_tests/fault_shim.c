// SPDX-License-Identifier: Apache-2.0
// Preloaded into a test's child process. Counts and logs the calls that change the disk. The Nth
// call kills the process, fails, or writes only half of its data.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF = 0, COUNT = 1, KILL = 2, FAIL_ONCE = 3, FAIL_FROM = 4, SHORT = 5 };

static int mode = OFF, target = 0, code = 0, calls = 0, log_bytes = 0;
static char log_text[1 << 20];

void shim_arm(int new_mode, int nth, int error) {
  mode = new_mode, target = nth, code = error, calls = 0, log_bytes = 0;
  log_text[0] = 0;
}
int shim_calls(void) { return calls; }
const char* shim_log(void) { return log_text; }

static void note(const char* call, const char* path, const char* other) {
  int room = (int)sizeof(log_text) - log_bytes;
  int n = snprintf(log_text + log_bytes, room, "%s\t%s\t%s\n", call, path, other);
  if (n < room) log_bytes += n;
}

static void note_descriptor(const char* call, int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", descriptor);
  ssize_t n = readlink(link, path, sizeof(path) - 1);
  path[n < 0 ? 0 : n] = 0;
  note(call, path, "");
}

// Returns true, and sets errno, if the call must fail. Does not return if it kills the process.
// Calls that remove files (removes = 1) still work on a full disk.
static int faulty(int removes) {
  if (mode == OFF) return 0;
  ++calls;
  if (mode == KILL && calls == target) raise(SIGKILL);
  int now =
      (mode == FAIL_ONCE && calls == target) || (mode == FAIL_FROM && calls >= target && !removes);
  if (now) errno = code;
  return now;
}

static int ours(int descriptor) {
  struct stat status;
  return mode != OFF && fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
}

#define REAL(result, name, ...)              \
  static result (*real)(__VA_ARGS__) = NULL; \
  if (!real) *(void**)(&real) = dlsym(RTLD_NEXT, name);

ssize_t write(int fd, const void* data, size_t size) {
  REAL(ssize_t, "write", int, const void*, size_t)
  if (ours(fd)) {
    if (faulty(0)) return -1;
    note_descriptor("write", fd);
    if (mode == SHORT && calls == target && size > 1) size /= 2;
  }
  return real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec* parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec*, int)
  if (ours(fd)) {
    if (faulty(0)) return -1;
    note_descriptor("write", fd);
    if (mode == SHORT && calls == target) return write(fd, parts[0].iov_base, parts[0].iov_len);
  }
  return real(fd, parts, count);
}

#define OPEN(name)                                                     \
  int name(const char* path, int flags, ...) {                         \
    REAL(int, #name, const char*, int, ...)                            \
    va_list rest;                                                      \
    va_start(rest, flags);                                             \
    mode_t permissions = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                      \
    if (mode != OFF && (flags & O_CREAT)) {                            \
      if (faulty(0)) return -1;                                        \
      note("create", path, "");                                        \
    }                                                                  \
    return real(path, flags, permissions);                             \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                   \
  int name(int folder, const char* path, int flags, ...) {             \
    REAL(int, #name, int, const char*, int, ...)                       \
    va_list rest;                                                      \
    va_start(rest, flags);                                             \
    mode_t permissions = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                      \
    if (mode != OFF && (flags & O_CREAT)) {                            \
      if (faulty(0)) return -1;                                        \
      note("create", path, "");                                        \
    }                                                                  \
    return real(folder, path, flags, permissions);                     \
  }
OPENAT(openat)
OPENAT(openat64)

#define ON_DESCRIPTOR(name)         \
  int name(int fd) {                \
    REAL(int, #name, int)           \
    if (mode != OFF) {              \
      if (faulty(0)) return -1;     \
      note_descriptor("fsync", fd); \
    }                               \
    return real(fd);                \
  }
ON_DESCRIPTOR(fsync)
ON_DESCRIPTOR(fdatasync)

#define TRUNCATE(name)              \
  int name(int fd, off_t size) {    \
    REAL(int, #name, int, off_t)    \
    if (mode != OFF) {              \
      if (faulty(0)) return -1;     \
      note_descriptor("write", fd); \
    }                               \
    return real(fd, size);          \
  }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int rename(const char* from, const char* to) {
  REAL(int, "rename", const char*, const char*)
  if (mode != OFF) {
    if (faulty(0)) return -1;
    note("rename", from, to);
  }
  return real(from, to);
}

int mkdir(const char* path, mode_t permissions) {
  REAL(int, "mkdir", const char*, mode_t)
  if (mode != OFF) {
    if (faulty(0)) return -1;
    note("create", path, "");
  }
  return real(path, permissions);
}

#define REMOVE(name)              \
  int name(const char* path) {    \
    REAL(int, #name, const char*) \
    if (mode != OFF) {            \
      if (faulty(1)) return -1;   \
      note("remove", path, "");   \
    }                             \
    return real(path);            \
  }
REMOVE(unlink)
REMOVE(rmdir)

int unlinkat(int folder, const char* path, int flags) {
  REAL(int, "unlinkat", int, const char*, int)
  if (mode != OFF) {
    if (faulty(1)) return -1;
    note("remove", path, "");
  }
  return real(folder, path, flags);
}
