// For LD_PRELOAD: the n-th system call that changes a file does not come to pass. Until
// disk_faults_arm() is called, and for descriptors that are no regular files, nothing changes.
//
// mode kill: the process dies before the call; a write is half done. What was not flushed to disk
// before is lost with it, as when the power goes: those files are cut to what was.
// mode full: the call fails with ENOSPC, after half of the bytes if it is a write.
// mode count: nothing fails. disk_faults_count() says how many calls there were.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <vector>

namespace {

enum Mode { kCount = 0, kKill = 1, kFull = 2 };
struct Dirty {
  int fd;
  dev_t device;
  ino_t inode;
  off_t bytes;  // that are on the disk
};

int mode = kCount;
long fails_at = -1;
long count = 0;
bool armed = false;
std::vector<Dirty>* dirty;  // never destroyed

template <typename F>
F real(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

bool regular(int fd, struct stat& about) {
  return fstat(fd, &about) == 0 && S_ISREG(about.st_mode);
}

[[noreturn]] void lose_power() {
  for (const Dirty& one : *dirty) {
    if (ftruncate(one.fd, one.bytes) != 0) break;
  }
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// True when this call must fail; the process may end here.
bool fails(bool before_death = false) {
  if (!armed) return false;
  const bool now = count++ == fails_at;
  if (!now || mode == kCount) return false;
  if (mode == kKill && !before_death) lose_power();
  errno = ENOSPC;
  return true;
}

void remember(int fd) {
  struct stat about;
  if (!armed || !regular(fd, about)) return;
  for (const Dirty& one : *dirty) {
    if (one.device == about.st_dev && one.inode == about.st_ino) return;
  }
  dirty->push_back({fcntl(fd, F_DUPFD_CLOEXEC, 200), about.st_dev, about.st_ino, about.st_size});
}

void forget(int fd) {
  struct stat about;
  if (!armed || !regular(fd, about)) return;
  for (auto one = dirty->begin(); one != dirty->end(); ++one) {
    if (one->device != about.st_dev || one->inode != about.st_ino) continue;
    close(one->fd);
    dirty->erase(one);
    return;
  }
}

bool changes(int flags) { return (flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) != 0; }

}  // namespace

extern "C" {

void disk_faults_arm(int how, long at) {
  dirty = new std::vector<Dirty>;
  mode = how;
  fails_at = at;
  count = 0;
  armed = true;
}

long disk_faults_count() {
  armed = false;
  return count;
}

ssize_t write(int fd, const void* data, size_t bytes) {
  static const auto call = real<ssize_t (*)(int, const void*, size_t)>("write");
  struct stat about;
  if (!armed || !regular(fd, about)) return call(fd, data, bytes);
  remember(fd);
  if (!fails(true)) return call(fd, data, bytes);
  const ssize_t half = bytes > 1 ? call(fd, data, bytes / 2) : 0;
  if (mode == kKill) lose_power();
  // The rest does not fit, and neither does anything after it.
  fails_at = count;
  if (half > 0) return half;
  errno = ENOSPC;
  return -1;
}

int fsync(int fd) {
  static const auto call = real<int (*)(int)>("fsync");
  if (fails()) return -1;
  const int result = call(fd);
  if (result == 0) forget(fd);
  return result;
}

#define OPEN(name)                                                             \
  int name(const char* path, int flags, ...) {                                 \
    static const auto call = real<int (*)(const char*, int, mode_t)>(#name);   \
    va_list rest;                                                              \
    va_start(rest, flags);                                                     \
    const mode_t permissions = (flags & O_CREAT) != 0 ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                              \
    if (changes(flags) && fails()) return -1;                                  \
    return call(path, flags, permissions);                                     \
  }
OPEN(open)
OPEN(open64)

#define CALL(name, types, names, ...)                    \
  int name types {                                       \
    static const auto call = real<int(*) types>(#name);  \
    if (fails()) return -1;                              \
    return call names;                                   \
  }
CALL(rename, (const char* a, const char* b), (a, b))
CALL(renameat, (int x, const char* a, int y, const char* b), (x, a, y, b))
CALL(link, (const char* a, const char* b), (a, b))
CALL(linkat, (int x, const char* a, int y, const char* b, int f), (x, a, y, b, f))
CALL(mkdir, (const char* path, mode_t m), (path, m))
CALL(unlink, (const char* path), (path))
CALL(unlinkat, (int at, const char* path, int flags), (at, path, flags))
CALL(rmdir, (const char* path), (path))
CALL(truncate64, (const char* path, off64_t n), (path, n))
CALL(ftruncate64, (int fd, off64_t n), (fd, n))
}
