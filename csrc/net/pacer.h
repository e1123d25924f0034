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
#include <vector>

namespace decotrain::net {

// Counters of all streams of a link together.
struct PathProgress {
  std::uint64_t delivered_bytes = 0;  // arrived at the other side, in whatever order
  std::uint64_t resent_bytes = 0;
  double rtt_s = 0.0;      // as it is now; of several streams the sum, as all that is here
  double rtt_min_s = 0.0;  // without queues

  PathProgress& operator+=(const PathProgress& other);
};

class Pacer {
 public:
  // What happened in `time_s`, of which `busy_s` with more to send than the kernel took.
  void observe(const PathProgress& change, double time_s, double busy_s);
  // Bytes of payload a second; 0: no ceiling yet.
  double ceiling() const;

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

// What streams that share a path did since the last look, given to a pacer.
class PathWatch {
 public:
  Pacer pacer;
  double busy_s = 0.0;  // since the last look, with more to send than the kernel took

  bool due(double now_s, double turn_s) const { return at_s_ == 0.0 || now_s - at_s_ >= turn_s; }
  // Counters of `streams` streams, added up; `turn_s` is the least time between two looks. A look
  // after a pause, or at other streams than the last one, says nothing.
  void look(const PathProgress& sum, std::size_t streams, double now_s, double turn_s);

 private:
  PathProgress mark_;
  double at_s_ = 0.0;
  std::size_t streams_ = 0;
};

// Ceilings of the links of one uplink, as each learnt its own (all above 0), of which all together
// get at most `total` (0: no such limit): those that are about alike become alike. In a round every
// neighbour gets the same number of bytes, so a link that is a tenth slower by chance makes the
// round a tenth longer. A link that learnt clearly less than an equal share is limited by its own
// path: it keeps what it learnt, and the others share the rest.
std::vector<double> level(const std::vector<double>& ceilings, double total);

}  // namespace decotrain::net
