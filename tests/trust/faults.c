// Preloaded into a process, it counts what changes files below a directory, and from the k-th change on it refuses them
// or kills the process. A write that is hit is half done first. Counting is off until `fault_arm`.
//
//     cc -shared -fPIC -o faults.so faults.c; LD_PRELOAD=./faults.so python ...
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static long at;
static int code, everything;
static long *count;

// `number` 0 kills, else it is the errno; `all` refuses what takes no space too. `counter` is the caller's.
void fault_arm(const char *directory, long k, int number, int all, long *counter) {
  snprintf(prefix, sizeof prefix, "%s/", directory);
  at = k, code = number, everything = all, count = counter;
}

// Return the number of a change, or 0 if it is elsewhere. A relative path is where its directory is.
static long change(int directory, const char *path) {
  char place[PATH_MAX] = "", link[64];
  if (!count) return 0;
  if (path == NULL || path[0] != '/') {
    if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    if (readlink(link, place, sizeof place - 1) < 0) return 0;
    strcat(place, "/");
    path = place;
  }
  return strncmp(path, prefix, strlen(prefix)) ? 0 : __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
}

static int refused(long number, int grows) {
  if (!number || !at || number < at) return 0;
  if (!code) kill(getpid(), SIGKILL);
  if (!grows && !everything) return 0;
  errno = code;
  return 1;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define CHANGE(name, parameters, arguments, directory, path, grows)  \
  int name parameters {                                              \
    REAL(name);                                                      \
    return refused(change(directory, path), grows) ? -1 : real arguments; \
  }

CHANGE(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1)
CHANGE(mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode), dir, path, 1)
CHANGE(link, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1)
CHANGE(linkat, (int dir, const char *from, int at, const char *to, int flags), (dir, from, at, to, flags), at, to, 1)
CHANGE(symlink, (const char *text, const char *path), (text, path), AT_FDCWD, path, 1)
CHANGE(rename, (const char *from, const char *to), (from, to), AT_FDCWD, to, 0)
CHANGE(renameat, (int dir, const char *from, int at, const char *to), (dir, from, at, to), at, to, 0)
CHANGE(renameat2, (int dir, const char *from, int at, const char *to, unsigned flags), (dir, from, at, to, flags), at, to,
       0)
CHANGE(unlink, (const char *path), (path), AT_FDCWD, path, 0)
CHANGE(unlinkat, (int dir, const char *path, int flags), (dir, path, flags), dir, path, 0)
CHANGE(rmdir, (const char *path), (path), AT_FDCWD, path, 0)
CHANGE(chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 0)
CHANGE(fchmod, (int fd, mode_t mode), (fd, mode), fd, NULL, 0)
CHANGE(ftruncate, (int fd, off_t size), (fd, size), fd, NULL, 1)
CHANGE(ftruncate64, (int fd, off64_t size), (fd, size), fd, NULL, 1)
CHANGE(fsync, (int fd), (fd), fd, NULL, 1)
CHANGE(fdatasync, (int fd), (fd), fd, NULL, 1)

#define OPEN(name, parameters, arguments, directory)                                         \
  int name parameters {                                                                      \
    REAL(name);                                                                              \
    va_list rest;                                                                            \
    va_start(rest, flags);                                                                   \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                  \
    va_end(rest);                                                                            \
    return flags & (O_CREAT | O_TRUNC) && refused(change(directory, path), 1) ? -1 : real arguments; \
  }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), dir)
OPEN(openat64, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), dir)

#define WRITE(name, parameters, arguments, fd)                   \
  ssize_t name parameters {                                      \
    REAL(name);                                                  \
    long number = change(fd, NULL);                              \
    if (number && number == at && size > 1) {                    \
      size /= 2;                                                 \
      ssize_t done = real arguments;                             \
      return refused(code ? 0 : number, 1) ? -1 : done;          \
    }                                                            \
    return refused(number, 1) ? -1 : real arguments;             \
  }

WRITE(write, (int fd, const void *data, size_t size), (fd, data, size), fd)
WRITE(pwrite, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place), fd)
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t place), (fd, data, size, place), fd)
WRITE(sendfile, (int fd, int from, off_t *place, size_t size), (fd, from, place, size), fd)
WRITE(sendfile64, (int fd, int from, off64_t *place, size_t size), (fd, from, place, size), fd)
WRITE(copy_file_range, (int from, off64_t *start, int fd, off64_t *place, size_t size, unsigned flags),
      (from, start, fd, place, size, flags), fd)
