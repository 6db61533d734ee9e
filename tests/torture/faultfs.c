/* LD_PRELOAD shim: counts the calls that change the disk below one directory, and at the k-th one kills the process,
   fails, or writes less than it was asked to. Unarmed it only forwards. Python arms it through ctypes after fork. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { NOTHING, KILL_BEFORE, KILL_AFTER, KILL_TORN, FAIL_ONCE, FAIL_ALWAYS, SHORT };

static char root[4096];
static int action, number;
static long target;
static atomic_long count, hits;

void fault_arm(const char *directory, long k, int what, int error) {
  strncpy(root, directory, sizeof root - 1);
  action = what, number = error, target = k;
  atomic_store(&count, 0), atomic_store(&hits, 0);
}
void fault_disarm(void) { root[0] = 0; }
long fault_count(void) { return atomic_load(&count); }
long fault_hits(void) { return atomic_load(&hits); }

static int below(const char *path) { return root[0] && strncmp(path, root, strlen(root)) == 0; }

static int below_fd(int fd) {
  char link[64], path[4096];
  if (!root[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) return 0;
  path[n] = 0;
  return below(path);
}

static int below_at(int fd, const char *path) { return path[0] == '/' ? below(path) : fd >= 0 && below_fd(fd); }

/* 1: this is the call. Kills before it if that is the action; else the caller acts. */
static int now(void) {
  long n = atomic_fetch_add(&count, 1) + 1;
  int hit = n == target || (action == FAIL_ALWAYS && n > target && target > 0);
  if (!hit) return 0;
  atomic_fetch_add(&hits, 1);
  if (action == KILL_BEFORE) kill(getpid(), SIGKILL);
  return 1;
}
static int fails(void) { return action == FAIL_ONCE || action == FAIL_ALWAYS; }

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define GUARDED(inside, call)                                       \
  do {                                                              \
    if (!(inside)) return call;                                     \
    int hit = now();                                                \
    if (hit && fails()) { errno = number; return -1; }              \
    typeof(call) result = call;                                     \
    if (hit && (action == KILL_AFTER || action == KILL_TORN)) kill(getpid(), SIGKILL); \
    return result;                                                  \
  } while (0)

int fsync(int fd) { GUARDED(below_fd(fd), REAL(fsync)(fd)); }
int fdatasync(int fd) { GUARDED(below_fd(fd), REAL(fdatasync)(fd)); }
int rename(const char *a, const char *b) { GUARDED(below(a) || below(b), REAL(rename)(a, b)); }
int unlink(const char *p) { GUARDED(below(p), REAL(unlink)(p)); }
int rmdir(const char *p) { GUARDED(below(p), REAL(rmdir)(p)); }
int mkdir(const char *p, mode_t m) { GUARDED(below(p), REAL(mkdir)(p, m)); }
int unlinkat(int d, const char *p, int f) { GUARDED(below_at(d, p), REAL(unlinkat)(d, p, f)); }
int mkdirat(int d, const char *p, mode_t m) { GUARDED(below_at(d, p), REAL(mkdirat)(d, p, m)); }

#define OPEN(name, flags_of)                                        \
  mode_t mode = 0;                                                  \
  if (flags_of & O_CREAT) { va_list list; va_start(list, flags_of); mode = va_arg(list, mode_t); va_end(list); }

int open64(const char *p, int flags, ...) {
  OPEN(open64, flags)
  GUARDED((flags & O_CREAT) && below(p), REAL(open64)(p, flags, mode));
}
int openat64(int d, const char *p, int flags, ...) {
  OPEN(openat64, flags)
  GUARDED((flags & O_CREAT) && below_at(d, p), REAL(openat64)(d, p, flags, mode));
}
ssize_t write(int fd, const void *data, size_t size) {
  if (!below_fd(fd)) return REAL(write)(fd, data, size);
  int hit = now();
  if (hit && fails()) { errno = number; return -1; }
  size_t wanted = hit && (action == KILL_TORN || action == SHORT) && size > 1 ? size / 2 : size;
  ssize_t result = REAL(write)(fd, data, wanted);
  if (hit && (action == KILL_AFTER || action == KILL_TORN)) kill(getpid(), SIGKILL);
  return result;
}
