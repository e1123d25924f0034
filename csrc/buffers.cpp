// The buffer pool: size classes with last-in first-out lists, bounded by recent use.
#include "buffers.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace decotrain {
namespace {

constexpr std::size_t kAlign = 64;
constexpr std::size_t kPooledFrom = 32 << 10;  // smaller ones are malloc's business
constexpr std::size_t kHugeFrom = std::size_t{4} << 20;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kForgetAfter = 16384;  // allocations until an old peak counts for nothing

// At most 1/8 above what was asked for, so that few classes serve rounds of similar size.
std::size_t size_class(std::size_t bytes) {
  const std::size_t step = std::max<std::size_t>(std::bit_floor(bytes) / 8, 4096);
  return (bytes + step - 1) / step * step;
}

std::byte* fresh(std::size_t bytes) {
  const std::size_t align = bytes >= kHugeFrom ? kHugePage : kAlign;
  auto* at = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{align}));
#ifdef __linux__
  if (bytes >= kHugeFrom) madvise(at, bytes, MADV_HUGEPAGE);  // a wish: failure costs only speed
#endif
  return at;
}

void destroy(std::byte* at, std::size_t bytes) {
  ::operator delete(at, std::align_val_t{bytes >= kHugeFrom ? kHugePage : kAlign});
}

// What callers hold, small blocks included.
std::atomic<std::size_t> held_bytes{0};
std::atomic<std::size_t> held_peak{0};

void count_taken(std::size_t bytes) {
  const std::size_t now = held_bytes.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  std::size_t peak = held_peak.load(std::memory_order_relaxed);
  while (peak < now && !held_peak.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
  }
}

void count_given(std::size_t bytes) { held_bytes.fetch_sub(bytes, std::memory_order_relaxed); }

class Pool {
 public:
  std::byte* take(std::size_t bytes) {
    std::byte* at = nullptr;
    std::vector<std::pair<std::byte*, std::size_t>> surplus;
    {
      const std::lock_guard lock(mutex_);
      const auto found = free_.find(bytes);
      if (found != free_.end() && !found->second.empty()) {
        at = found->second.back();
        found->second.pop_back();
        free_bytes_ -= bytes;
      }
      in_use_ += bytes;
      peak_ = std::max(in_use_, peak_ - peak_ / kForgetAfter);
      trim(surplus);
    }
    for (const auto& [old, size] : surplus) destroy(old, size);
    if (at != nullptr) return at;
    try {
      return fresh(bytes);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      in_use_ -= bytes;
      throw;
    }
  }

  void give(std::byte* at, std::size_t bytes) {
    std::vector<std::pair<std::byte*, std::size_t>> surplus;
    {
      const std::lock_guard lock(mutex_);
      free_[bytes].push_back(at);
      free_bytes_ += bytes;
      in_use_ -= bytes;
      trim(surplus);
    }
    for (const auto& [old, size] : surplus) destroy(old, size);
  }

  std::size_t free_bytes() {
    const std::lock_guard lock(mutex_);
    return free_bytes_;
  }

 private:
  // Large ones first, but none larger than the surplus: a few small blocks too many must not cost
  // the one that the next round needs.
  void trim(std::vector<std::pair<std::byte*, std::size_t>>& surplus) {
    // With room to spare: the peak fades a little between two rounds that are just alike.
    const std::size_t allowed = peak_ + peak_ / 4;
    for (auto it = free_.end(); it != free_.begin() && in_use_ + free_bytes_ > allowed;) {
      auto& [size, blocks] = *--it;
      while (!blocks.empty() && in_use_ + free_bytes_ >= allowed + size) {
        surplus.emplace_back(blocks.back(), size);
        blocks.pop_back();
        free_bytes_ -= size;
      }
      if (blocks.empty()) it = free_.erase(it);
    }
  }

  std::mutex mutex_;
  std::map<std::size_t, std::vector<std::byte*>> free_;
  std::size_t free_bytes_ = 0;
  std::size_t in_use_ = 0;
  std::size_t peak_ = 0;
};

// Never destroyed: a result may be let go after static destructors have run.
Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

}  // namespace

std::shared_ptr<std::byte[]> allocate(std::size_t bytes) {
  if (bytes < kPooledFrom) {
    const std::size_t size = std::max<std::size_t>(bytes, 1);
    std::byte* const small = fresh(size);
    count_taken(size);
    return {small, [size](std::byte* at) {
              count_given(size);
              destroy(at, size);
            }};
  }
  const std::size_t size = size_class(bytes);
  std::byte* const large = pool().take(size);
  count_taken(size);
  return {large, [size](std::byte* at) {
            count_given(size);
            pool().give(at, size);
          }};
}

PoolFigures pool_figures(bool reset) {
  const std::size_t held = held_bytes.load(std::memory_order_relaxed);
  if (reset) held_peak.store(held, std::memory_order_relaxed);
  return {held, held_peak.load(std::memory_order_relaxed), pool().free_bytes()};
}

}  // namespace decotrain
