// Memory for snapshots, contributions and results, kept between rounds: a fresh mapping of a large
// buffer costs a page fault for every 4 KiB, each round again.
//
// Thread-safe: the trainer's thread takes snapshots and lets results go, the network thread the
// rest. It does not zero memory.
#pragma once

#include <cstddef>
#include <memory>

namespace decotrain {

// Uninitialised memory, 64-byte aligned, never null. It goes back to the pool with its last owner.
// The pool holds free memory only up to what was lately in use at once.
std::shared_ptr<std::byte[]> allocate(std::size_t bytes);

struct PoolFigures {
  std::size_t in_use_bytes = 0;  // also of blocks that are too small for the pool
  std::size_t peak_bytes = 0;    // most in use at once since the last reset
  std::size_t free_bytes = 0;
};
// With `reset` the peak starts anew, from what is in use now.
PoolFigures pool_figures(bool reset = false);

}  // namespace decotrain
