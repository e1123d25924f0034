// Pacer: how fast the streams of one link may go together, learnt from what the other side took.
//
// A kernel's congestion control finds the end of a path by overrunning it; with dozens of streams
// that fall back together a round then ends before they are up to speed again (docs/links.md). So
// what a long path was seen to carry becomes a ceiling for its streams. The ceiling only ever
// lowers what congestion control allows; it is raised again and again to see whether there is
// more.
//
// A plain object: measurements in, a rate out. It opens no socket and reads no clock.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace decotrain::net {

// Counters of all streams of a link together.
struct PathProgress {
  std::uint64_t delivered_bytes = 0;  // arrived at the other side, in whatever order
  std::uint64_t resent_bytes = 0;
  double rtt_s = 0.0;      // as it is now, the mean of the streams
  double rtt_min_s = 0.0;  // without queues
};

class Pacer {
 public:
  // What happened in `time_s`, of which `busy_s` with more to send than the kernel took.
  void observe(const PathProgress& change, double time_s, double busy_s);
  // Bytes of payload a second; 0: no ceiling yet.
  double ceiling() const;
  // Nothing learnt holds any more (another path, other streams).
  void forget() { *this = Pacer{}; }

 private:
  void remember(double rate);
  double best() const;

  static constexpr std::size_t kRemembered = 10;
  std::array<double, kRemembered> rates_{};
  std::size_t next_ = 0;
  bool full_ = false;  // the path's end was seen once: there is a ceiling
  double before_ = 0.0;
  double gain_ = 1.0;
  std::size_t steady_ = 0;  // measurements since the last change of gain
};

}  // namespace decotrain::net
