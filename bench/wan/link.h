// Links of the lab's forwarder: queues with a rate, and paths with delay, loss and reordering.
//
// Arithmetic on virtual time only; no sockets and no clock. All times are nanoseconds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace lab {

using Time = std::int64_t;
constexpr Time kMillisecond = 1'000'000;

// SplitMix64: small, seeded, the same everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed = 0) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }  // [0, 1)

 private:
  std::uint64_t state_;
};

// A Bernoulli trial for each segment, drawn as the number of segments until the next hit.
class Hits {
 public:
  void set(double probability, Random& random) {
    probability_ = probability;
    draw(random);
  }
  double probability() const { return probability_; }
  std::uint64_t gap() const { return gap_; }
  void pass(std::uint64_t segments) {
    if (gap_ != kNever) gap_ -= segments;
  }
  void draw(Random& random) {
    if (probability_ <= 0) {
      gap_ = kNever;
    } else if (probability_ >= 1) {
      gap_ = 0;
    } else {
      gap_ = static_cast<std::uint64_t>(std::log1p(-random.uniform()) / std::log1p(-probability_));
    }
  }

 private:
  static constexpr std::uint64_t kNever = std::numeric_limits<std::uint64_t>::max();
  double probability_ = 0;
  std::uint64_t gap_ = kNever;
};

// A link that serialises: a rate, and before it a queue that drops what does not fit.
struct Queue {
  double ns_per_byte = 0;  // 0: no limit
  double limit_bytes = 0;  // of bytes that wait; at least one packet always fits
  Time busy_until = 0;

  void set_rate(double mbps, Time now) {
    const double waiting = backlog_bytes(now);
    ns_per_byte = mbps > 0 ? 8000.0 / mbps : 0;
    if (mbps > 0) busy_until = now + static_cast<Time>(waiting * ns_per_byte);
  }
  double backlog_bytes(Time now) const {
    if (ns_per_byte <= 0 || busy_until <= now) return 0;
    return static_cast<double>(busy_until - now) / ns_per_byte;
  }
  // How many of `count` segments of `bytes` each fit at `now`.
  unsigned room(Time now, unsigned count, double bytes) const {
    if (ns_per_byte <= 0 || bytes <= 0) return count;
    const double waiting = backlog_bytes(now);
    if (waiting <= 0) return std::max(1u, std::min(count, fits(limit_bytes, bytes)));
    return waiting >= limit_bytes ? 0 : std::min(count, fits(limit_bytes - waiting, bytes));
  }
  // Takes `bytes` at `now`; returns when the last bit has left.
  Time send(Time now, double bytes) {
    if (ns_per_byte <= 0) return now;
    busy_until = std::max(now, busy_until) + static_cast<Time>(bytes * ns_per_byte + 0.5);
    return busy_until;
  }
  // The most segments that may travel in one lump: about a millisecond's worth.
  unsigned lump(double bytes) const {
    if (ns_per_byte <= 0 || bytes <= 0) return 64;
    const double count = static_cast<double>(kMillisecond) / (ns_per_byte * bytes);
    return static_cast<unsigned>(std::clamp(count, 1.0, 64.0));
  }

 private:
  static unsigned fits(double space, double bytes) {
    return static_cast<unsigned>(std::min(space / bytes, 65536.0));
  }
};

struct Counters {
  std::uint64_t segments = 0;   // taken from the sender
  std::uint64_t bytes = 0;      // of them, IP headers included
  std::uint64_t delivered = 0;  // segments given to the receiver
  std::uint64_t delivered_bytes = 0;
  std::uint64_t lost = 0;        // at random
  std::uint64_t cut = 0;         // the path was down
  std::uint64_t queue_up = 0;    // did not fit the sender's queue,
  std::uint64_t queue_path = 0;  // the path's,
  std::uint64_t queue_down = 0;  // the receiver's
  std::uint64_t reordered = 0;
  std::uint64_t refused = 0;  // the receiver's device took it not
};

// One directed path between two sites. Its queue is unlimited unless given a rate.
struct Path {
  Queue queue;
  Time delay = 0;
  Time jitter = 0;        // added, uniform in [0, jitter]; never reorders
  Time reorder_hold = 0;  // by which a reordered segment is late
  Hits loss;
  Hits reorder;
  bool down = false;
  Random random;
  Time last_arrival = 0;  // so that jitter and changes of the delay do not reorder
  Counters counters;

  Time arrival(Time departure) {
    Time at = departure + delay;
    if (jitter > 0) at += static_cast<Time>(random.uniform() * static_cast<double>(jitter));
    last_arrival = std::max(last_arrival, at);
    return last_arrival;
  }
};

}  // namespace lab
