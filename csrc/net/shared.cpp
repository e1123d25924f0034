#include "net/shared.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>

namespace decotrain::net {
namespace {

constexpr std::size_t kPage = 4096;
constexpr long kTmpfsMagic = 0x01021994;
// Nobody changes the size or maps it writable any more, nor takes these seals away.
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;

// At most 1/8 above what was asked for, so that few sizes serve rounds of similar size.
std::size_t block_class(std::size_t bytes) {
  std::size_t step = kPage;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

}  // namespace

struct Arena::Segment {
  std::uint32_t id = 0;
  Fd fd;
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  std::size_t block_bytes = 0;
  std::vector<std::uint32_t> free;  // last in, first out: what was used last is in the cache
  std::size_t blocks = 0;
  bool retired = false;
  double idle_since = 0.0;  // 0: not seen idle

  Segment() = default;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment() {
    if (data != nullptr) munmap(data, bytes);
  }
  bool idle() const { return free.size() == blocks; }
  static std::shared_ptr<Segment> make(std::uint32_t id, std::size_t block_bytes);
};

struct Arena::State {
  mutable std::mutex mutex;
  std::size_t max_bytes = 0;
  std::size_t bytes = 0;
  std::uint32_t next_id = 0;
  std::size_t retired = 0;  // lately
  double forgiven_at = 0.0;
  bool refused = false;                                           // by the system: do not ask again
  std::map<const std::byte*, std::shared_ptr<Segment>> segments;  // by where they begin
  std::vector<std::uint32_t> dropped;                             // not yet told
};

std::shared_ptr<Arena::Segment> Arena::Segment::make(std::uint32_t id, std::size_t block_bytes) {
  auto segment = std::make_shared<Segment>();
  segment->id = id;
  segment->block_bytes = block_bytes;
  segment->blocks = std::clamp<std::size_t>(kSegmentBytes / block_bytes, 1, kBlocksPerSegment);
  segment->bytes = segment->blocks * block_bytes;
  segment->fd.reset(memfd_create("decotrain", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  const int fd = segment->fd.get();
  // All pages are there from the start: a reader can neither miss one nor be charged for it.
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(segment->bytes)) != 0 ||
      fallocate(fd, 0, 0, static_cast<off_t>(segment->bytes)) != 0) {
    return nullptr;
  }
  void* const at =
      mmap(nullptr, segment->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (at == MAP_FAILED) return nullptr;
  segment->data = static_cast<std::byte*>(at);
  if (fcntl(fd, F_ADD_SEALS, kSeals) != 0) return nullptr;
  for (std::size_t i = segment->blocks; i > 0; --i) {
    segment->free.push_back(static_cast<std::uint32_t>(i - 1));
  }
  return segment;
}

Arena::Arena(std::size_t max_bytes) : state_(std::make_shared<State>()) {
  state_->max_bytes = max_bytes;
}

// With the mutex held.
std::shared_ptr<std::byte[]> Arena::take(const std::shared_ptr<Segment>& segment) {
  const std::uint32_t block = segment->free.back();
  segment->free.pop_back();
  segment->idle_since = 0.0;
  return {segment->data + block * segment->block_bytes,
          [segment, block, state = state_](std::byte*) {
            const std::lock_guard lock(state->mutex);
            segment->free.push_back(block);
          }};
}

std::shared_ptr<std::byte[]> Arena::allocate(std::size_t bytes) {
  if (bytes == 0 || bytes > kSegmentBytesMax) return nullptr;
  const std::size_t block_bytes = block_class(bytes);
  State& state = *state_;
  const std::lock_guard lock(state.mutex);
  for (const auto& [at, segment] : state.segments) {
    if (segment->block_bytes == block_bytes && !segment->retired && !segment->free.empty()) {
      return take(segment);
    }
  }
  if (state.refused || state.retired >= kRetiredMax) return nullptr;
  const std::size_t blocks =
      std::clamp<std::size_t>(kSegmentBytes / block_bytes, 1, kBlocksPerSegment);
  const std::size_t wanted = blocks * block_bytes;
  for (auto it = state.segments.begin();
       it != state.segments.end() && state.bytes + wanted > state.max_bytes;) {
    const Segment& old = *it->second;
    if (!old.idle() || old.block_bytes == block_bytes) {
      ++it;
      continue;
    }
    state.bytes -= old.bytes;
    state.dropped.push_back(old.id);
    it = state.segments.erase(it);
  }
  if (state.bytes + wanted > state.max_bytes || state.segments.size() >= kSegmentsMax) {
    return nullptr;
  }
  const auto made = Segment::make(state.next_id, block_bytes);
  if (made == nullptr) {
    state.refused = true;
    return nullptr;
  }
  ++state.next_id;
  state.bytes += made->bytes;
  state.segments.emplace(made->data, made);
  return take(made);
}

std::optional<Arena::Where> Arena::find(const std::byte* at, std::size_t bytes) const {
  const std::lock_guard lock(state_->mutex);
  auto it = state_->segments.upper_bound(at);
  if (it == state_->segments.begin()) return std::nullopt;
  const Segment& segment = *(--it)->second;
  const auto offset = static_cast<std::size_t>(at - segment.data);
  if (offset >= segment.bytes || bytes > segment.bytes - offset) return std::nullopt;
  return Where{segment.id, offset};
}

Arena::File Arena::file(std::uint32_t id) const {
  const std::lock_guard lock(state_->mutex);
  for (const auto& [at, segment] : state_->segments) {
    if (segment->id == id) return {segment->fd.get(), segment->bytes, segment};
  }
  return {};
}

void Arena::retire(std::uint32_t id) {
  const std::lock_guard lock(state_->mutex);
  for (const auto& [at, segment] : state_->segments) {
    if (segment->id != id || segment->retired) continue;
    segment->retired = true;
    ++state_->retired;
  }
}

std::vector<std::uint32_t> Arena::trim(double now) {
  const std::lock_guard lock(state_->mutex);
  std::vector<std::uint32_t> dropped = std::exchange(state_->dropped, {});
  if (now - state_->forgiven_at > kForgive_s) {
    state_->forgiven_at = now;
    state_->retired /= 2;
  }
  for (auto it = state_->segments.begin(); it != state_->segments.end();) {
    Segment& segment = *it->second;
    if (segment.idle() && segment.idle_since == 0.0) segment.idle_since = now;
    const bool over =
        segment.idle() && (segment.retired || now - segment.idle_since > kSegmentIdle_s);
    if (!over) {
      ++it;
      continue;
    }
    state_->bytes -= segment.bytes;
    dropped.push_back(segment.id);
    it = state_->segments.erase(it);
  }
  return dropped;
}

std::size_t Arena::bytes() const {
  const std::lock_guard lock(state_->mutex);
  return state_->bytes;
}

std::shared_ptr<const Mapping> Mapping::of(const Fd& fd, std::uint64_t bytes) {
  if (!fd || bytes == 0 || bytes > kSegmentBytesMax) return nullptr;
  struct stat info{};
  struct statfs system{};
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  // Other file systems have other ways to take pages away (huge pages: of a bounded pool).
  if (seals < 0 || (seals & kSeals) != kSeals || fstatfs(fd.get(), &system) != 0 ||
      static_cast<long>(system.f_type) != kTmpfsMagic || fstat(fd.get(), &info) != 0 ||
      static_cast<std::uint64_t>(info.st_size) != bytes ||
      static_cast<std::uint64_t>(info.st_blocks) * 512 < bytes) {
    return nullptr;
  }
  void* const at = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ,
                        MAP_SHARED | MAP_POPULATE, fd.get(), 0);
  if (at == MAP_FAILED) return nullptr;
  return std::shared_ptr<const Mapping>(
      new Mapping(static_cast<const std::byte*>(at), static_cast<std::size_t>(bytes)));
}

Mapping::~Mapping() { munmap(const_cast<std::byte*>(data_), bytes_); }

void Returns::add(std::uint64_t loan) {
  const std::lock_guard lock(mutex_);
  if (wake_fd_ < 0) return;
  loans_.push_back(loan);
  if (loans_.size() > 1) return;
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(wake_fd_, &one, sizeof one);
}

std::vector<std::uint64_t> Returns::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(loans_, {});
}

void Returns::close() {
  const std::lock_guard lock(mutex_);
  wake_fd_ = -1;
  loans_.clear();
}

}  // namespace decotrain::net
