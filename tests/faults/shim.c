/* Preloaded into a process under test: counts its file operations under one path, and disturbs one of them.
 *
 * The plan lies in shared memory, so that a test can set it in a forked child through ctypes and read afterwards what a
 * child that was killed had done. Only paths that begin with `prefix`, and descriptors opened through them, count; a
 * descriptor's path is asked of /proc, so that copies and inherited descriptors are known too.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, FAIL, KILL_BEFORE, KILL_INSIDE, KILL_AFTER, SIGNAL, FULL, NO_LOCKS };
enum { LOGGED = 1 << 16 };

struct plan {
  int action;
  int at;      /* the operation that is disturbed, from 0 */
  int ongoing; /* and all after it */
  int error;   /* errno; for SIGNAL, the signal */
  long budget; /* FULL: bytes that still fit */
  int count;   /* operations so far */
  int fired;
  char prefix[512];
  char log[LOGGED]; /* a letter for each operation */
};

static struct plan *plan;
static __thread int inside; /* our own calls do not count */

__attribute__((constructor)) static void start(void) {
  plan = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (plan == MAP_FAILED) abort();
}

struct plan *faults_plan(void) { return plan; }

static int watched_path(int dir, const char *path) {
  if (!plan || !plan->prefix[0] || inside || !path) return 0;
  size_t n = strlen(plan->prefix);
  if (path[0] == '/') return strncmp(path, plan->prefix, n) == 0;
  char link[64], folder[4096];
  if (dir == AT_FDCWD)
    snprintf(link, sizeof link, "/proc/self/cwd");
  else
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
  ssize_t got = readlink(link, folder, sizeof folder - 1);
  if (got < 0) return 0;
  folder[got] = 0;
  return strncmp(folder, plan->prefix, n) == 0;
}

static int watched(int fd) {
  if (!plan || !plan->prefix[0] || inside || fd < 0) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  int kept = errno;
  ssize_t got = readlink(link, path, sizeof path - 1);
  errno = kept;
  if (got < 0) return 0;
  path[got] = 0;
  return strncmp(path, plan->prefix, strlen(plan->prefix)) == 0;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* What to do at this operation: 0 go on, else an action. */
static int meet(char kind) {
  int n = __atomic_fetch_add(&plan->count, 1, __ATOMIC_SEQ_CST);
  if (n < LOGGED) plan->log[n] = kind;
  if (plan->action == NOTHING || plan->action == FULL || plan->action == NO_LOCKS) return 0;
  if (n != plan->at && !(plan->ongoing && n > plan->at)) return 0;
  plan->fired++;
  if (plan->action == KILL_BEFORE) die();
  if (plan->action == SIGNAL) {
    if (n == plan->at) kill(getpid(), plan->error);
    return 0;
  }
  return plan->action;
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* Operations that have no inside: refused, or done and killed after. */
#define SIMPLE(kind, when, call, refused) \
  if (when) { \
    int action = meet(kind); \
    if (action == FAIL) { \
      errno = plan->error; \
      return refused; \
    } \
    if (action == KILL_INSIDE || action == KILL_AFTER) { \
      call; \
      die(); \
    } \
  } \
  return call

#define OPENS(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list more; \
      va_start(more, flags); \
      mode = va_arg(more, mode_t); \
      va_end(more); \
    } \
    SIMPLE('o', watched_path(AT_FDCWD, path), real(path, flags, mode), -1); \
  }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
  int name(int dir, const char *path, int flags, ...) { \
    REAL(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list more; \
      va_start(more, flags); \
      mode = va_arg(more, mode_t); \
      va_end(more); \
    } \
    SIMPLE('o', watched_path(dir, path), real(dir, path, flags, mode), -1); \
  }
OPENS_AT(openat)
OPENS_AT(openat64)

FILE *fopen(const char *path, const char *mode) {
  REAL(fopen);
  SIMPLE('o', watched_path(AT_FDCWD, path), real(path, mode), NULL);
}
FILE *fopen64(const char *path, const char *mode) {
  REAL(fopen64);
  SIMPLE('o', watched_path(AT_FDCWD, path), real(path, mode), NULL);
}
size_t fread(void *to, size_t size, size_t n, FILE *file) {
  REAL(fread);
  SIMPLE('r', watched(fileno(file)), real(to, size, n, file), 0);
}
DIR *opendir(const char *path) {
  REAL(opendir);
  SIMPLE('d', watched_path(AT_FDCWD, path), real(path), NULL);
}
ssize_t read(int fd, void *to, size_t n) {
  REAL(read);
  SIMPLE('r', watched(fd), real(fd, to, n), -1);
}
ssize_t pread(int fd, void *to, size_t n, off_t at) {
  REAL(pread);
  SIMPLE('r', watched(fd), real(fd, to, n, at), -1);
}
ssize_t pread64(int fd, void *to, size_t n, off64_t at) {
  REAL(pread64);
  SIMPLE('r', watched(fd), real(fd, to, n, at), -1);
}
ssize_t readv(int fd, const struct iovec *to, int n) {
  REAL(readv);
  SIMPLE('r', watched(fd), real(fd, to, n), -1);
}
ssize_t preadv(int fd, const struct iovec *to, int n, off_t at) {
  REAL(preadv);
  SIMPLE('r', watched(fd), real(fd, to, n, at), -1);
}
ssize_t preadv64(int fd, const struct iovec *to, int n, off64_t at) {
  REAL(preadv64);
  SIMPLE('r', watched(fd), real(fd, to, n, at), -1);
}

/* A write on a full disk puts down what fits, as the kernel does; the next one has no room at all. */
#define WRITES(kind, n, call, part) \
  if (watched(fd)) { \
    int action = meet(kind); \
    if (action == FAIL) { \
      errno = plan->error; \
      return -1; \
    } \
    if (action == KILL_INSIDE) { \
      part(n / 2); \
      die(); \
    } \
    if (action == KILL_AFTER) { \
      call; \
      die(); \
    } \
    if (plan->action == FULL) { \
      long left = __atomic_fetch_sub(&plan->budget, (long)(n), __ATOMIC_SEQ_CST); \
      if (left < (long)(n)) { \
        plan->fired++; \
        if (left > 0) return part(left); \
        errno = plan->error; \
        return -1; \
      } \
    } \
  } \
  return call

#define PART(n) real(fd, from, n)
ssize_t write(int fd, const void *from, size_t n) {
  REAL(write);
  WRITES('w', n, real(fd, from, n), PART);
}
#undef PART
#define PART(n) real(fd, from, n, at)
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
  REAL(pwrite);
  WRITES('w', n, real(fd, from, n, at), PART);
}
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
  REAL(pwrite64);
  WRITES('w', n, real(fd, from, n, at), PART);
}
#undef PART
#define PART(n) real(fd, from, 1)
ssize_t writev(int fd, const struct iovec *from, int n) {
  REAL(writev);
  WRITES('w', n, real(fd, from, n), PART);
}
size_t fwrite(const void *from, size_t size, size_t n, FILE *file) {
  REAL(fwrite);
  SIMPLE('w', watched(fileno(file)), real(from, size, n, file), 0);
}

int fsync(int fd) {
  REAL(fsync);
  SIMPLE('s', watched(fd), real(fd), -1);
}
int fdatasync(int fd) {
  REAL(fdatasync);
  SIMPLE('s', watched(fd), real(fd), -1);
}
int ftruncate(int fd, off_t n) {
  REAL(ftruncate);
  SIMPLE('t', watched(fd), real(fd, n), -1);
}
int ftruncate64(int fd, off64_t n) {
  REAL(ftruncate64);
  SIMPLE('t', watched(fd), real(fd, n), -1);
}
/* Linux closes the descriptor even when it reports an error. */
int close(int fd) {
  REAL(close);
  if (watched(fd)) {
    int action = meet('c');
    if (action == FAIL) {
      real(fd);
      errno = plan->error;
      return -1;
    }
    if (action == KILL_INSIDE || action == KILL_AFTER) {
      real(fd);
      die();
    }
  }
  return real(fd);
}
int rename(const char *from, const char *to) {
  REAL(rename);
  SIMPLE('n', watched_path(AT_FDCWD, to), real(from, to), -1);
}
int renameat(int a, const char *from, int b, const char *to) {
  REAL(renameat);
  SIMPLE('n', watched_path(b, to), real(a, from, b, to), -1);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  REAL(renameat2);
  SIMPLE('n', watched_path(b, to), real(a, from, b, to, flags), -1);
}
int unlink(const char *path) {
  REAL(unlink);
  SIMPLE('u', watched_path(AT_FDCWD, path), real(path), -1);
}
int unlinkat(int dir, const char *path, int flags) {
  REAL(unlinkat);
  SIMPLE('u', watched_path(dir, path), real(dir, path, flags), -1);
}
int rmdir(const char *path) {
  REAL(rmdir);
  SIMPLE('u', watched_path(AT_FDCWD, path), real(path), -1);
}
int link(const char *from, const char *to) {
  REAL(link);
  SIMPLE('l', watched_path(AT_FDCWD, to), real(from, to), -1);
}
int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  SIMPLE('m', watched_path(AT_FDCWD, path), real(path, mode), -1);
}
int stat(const char *path, struct stat *to) {
  REAL(stat);
  SIMPLE('i', watched_path(AT_FDCWD, path), real(path, to), -1);
}
int stat64(const char *path, struct stat64 *to) {
  REAL(stat64);
  SIMPLE('i', watched_path(AT_FDCWD, path), real(path, to), -1);
}
int lstat(const char *path, struct stat *to) {
  REAL(lstat);
  SIMPLE('i', watched_path(AT_FDCWD, path), real(path, to), -1);
}
int lstat64(const char *path, struct stat64 *to) {
  REAL(lstat64);
  SIMPLE('i', watched_path(AT_FDCWD, path), real(path, to), -1);
}
int fstat(int fd, struct stat *to) {
  REAL(fstat);
  SIMPLE('i', watched(fd), real(fd, to), -1);
}
int fstat64(int fd, struct stat64 *to) {
  REAL(fstat64);
  SIMPLE('i', watched(fd), real(fd, to), -1);
}
int fchmod(int fd, mode_t mode) {
  REAL(fchmod);
  SIMPLE('h', watched(fd), real(fd, mode), -1);
}
int flock(int fd, int operation) {
  REAL(flock);
  if (watched(fd) && plan->action == NO_LOCKS) {
    plan->fired++;
    errno = plan->error;
    return -1;
  }
  SIMPLE('k', watched(fd), real(fd, operation), -1);
}

static int locks(int command) { return command == F_SETLK || command == F_SETLKW; }
#define CONTROLS(name) \
  int name(int fd, int command, ...) { \
    REAL(name); \
    va_list more; \
    va_start(more, command); \
    void *argument = va_arg(more, void *); \
    va_end(more); \
    if (locks(command) && watched(fd) && plan->action == NO_LOCKS) { \
      plan->fired++; \
      errno = plan->error; \
      return -1; \
    } \
    SIMPLE('k', locks(command) && watched(fd), real(fd, command, argument), -1); \
  }
CONTROLS(fcntl)
CONTROLS(fcntl64)
