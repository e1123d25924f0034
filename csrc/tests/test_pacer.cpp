// Pacer against a path of which we know everything: a bottleneck, a queue before it, other streams.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "net/pacer.h"

namespace decotrain::net {
namespace {

constexpr double kTurn_s = 0.18;
constexpr double kRtt_s = 0.09;
constexpr double kQueueMax_s = 0.1;
constexpr double kUnbounded = 1e9;

// Links that share one bottleneck. What exceeds it waits in a queue; what exceeds the queue is lost
// and sent again.
struct Path {
  double capacity;
  double queue_bytes = 0.0;
  std::vector<Pacer> pacers;

  double turn(double congestion_control_rate) {
    std::vector<double> rates;
    for (const Pacer& pacer : pacers) {
      const double ceiling = pacer.ceiling() > 0.0 ? pacer.ceiling() : kUnbounded;
      rates.push_back(std::min(ceiling, congestion_control_rate));
    }
    const double sum = std::accumulate(rates.begin(), rates.end(), 0.0);
    queue_bytes = std::max(0.0, queue_bytes + (sum - capacity) * kTurn_s);
    const double lost = std::max(0.0, queue_bytes - kQueueMax_s * capacity);
    queue_bytes -= lost;
    const double carried = queue_bytes > 0.0 ? capacity : std::min(sum, capacity);
    for (std::size_t i = 0; i < pacers.size(); ++i) {
      const double share = rates[i] / sum;
      pacers[i].observe({.delivered_bytes = static_cast<std::uint64_t>(share * carried * kTurn_s),
                         .resent_bytes = static_cast<std::uint64_t>(share * lost),
                         .rtt_s = kRtt_s + queue_bytes / capacity,
                         .rtt_min_s = kRtt_s},
                        kTurn_s, kTurn_s);
    }
    return carried;
  }
};

}  // namespace

TEST_CASE("there is no ceiling while a link still speeds up, and one when it stops") {
  Pacer pacer;
  for (const std::uint64_t rate : {1'000'000, 2'000'000, 4'000'000, 8'000'000}) {
    pacer.observe({rate, 0, kRtt_s, kRtt_s}, 1.0, 1.0);
    CHECK(pacer.ceiling() == 0.0);
  }
  pacer.observe({9'000'000, 0, kRtt_s, kRtt_s}, 1.0, 1.0);
  CHECK(pacer.ceiling() == 9e6);
}

TEST_CASE("a ceiling is what arrives when the path is overrun") {
  Pacer pacer;
  pacer.observe({1'000'000, 0, kRtt_s, kRtt_s}, 1.0, 1.0);
  pacer.observe({5'000'000, 900'000, kRtt_s, kRtt_s}, 1.0, 1.0);
  CHECK(pacer.ceiling() == 5e6);
  // One lost packet in a thousand is no overrun: the best of before stays.
  pacer.observe({4'000'000, 4'000, kRtt_s, kRtt_s}, 1.0, 1.0);
  CHECK(pacer.ceiling() == 5e6);
  pacer.observe({3'000'000, 300'000, kRtt_s, kRtt_s}, 1.0, 1.0);
  CHECK(pacer.ceiling() < 3.1e6);
}

TEST_CASE("pauses of our own say nothing about the path") {
  Pacer pacer;
  pacer.observe({5'000'000, 0, kRtt_s, kRtt_s}, 1.0, 1.0);
  pacer.observe({5'000'000, 0, kRtt_s, kRtt_s}, 1.0, 1.0);
  for (int i = 0; i < 100; ++i) pacer.observe({1'000, 0, kRtt_s, kRtt_s}, 1.0, 0.1);
  CHECK(pacer.ceiling() == 5e6);
  pacer.observe({6'000'000, 0, kRtt_s, kRtt_s}, 1.0, 0.1);
  CHECK(pacer.ceiling() == 6e6);
}

TEST_CASE("links that share a path fill it without overrunning it") {
  for (const std::size_t links : {1, 3, 7}) {
    CAPTURE(links);
    Path path{12.5e6, 0.0, std::vector<Pacer>(links)};
    for (int i = 0; i < 40; ++i) path.turn(20e6);
    double carried = 0.0;
    double queue_bytes = 0.0;
    for (int i = 0; i < 100; ++i) {
      carried += path.turn(20e6);
      queue_bytes += path.queue_bytes;
    }
    CHECK(carried / 100 > 0.97 * path.capacity);
    CHECK(queue_bytes / 100 < 0.02 * path.capacity);
  }
}

TEST_CASE("a ceiling follows a path that becomes wider or narrower") {
  Path path{12.5e6, 0.0, std::vector<Pacer>(2)};
  for (int i = 0; i < 40; ++i) path.turn(20e6);
  path.capacity = 25e6;
  for (int i = 0; i < 60; ++i) path.turn(20e6);
  CHECK(path.turn(20e6) > 0.9 * path.capacity);
  path.capacity = 5e6;
  for (int i = 0; i < 20; ++i) path.turn(20e6);
  double sum = 0.0;
  for (const Pacer& pacer : path.pacers) sum += pacer.ceiling();
  CHECK(sum < 1.15 * path.capacity);
}

TEST_CASE("links that learnt about the same get the same, and no more than the uplink has") {
  CHECK(level({}, 0.0).empty());
  CHECK(level({9e6, 11e6, 10e6}, 0.0) == std::vector<double>(3, 10e6));
  CHECK(level({9e6, 11e6, 10e6}, 24e6) == std::vector<double>(3, 8e6));
  CHECK(level({9e6, 11e6, 10e6}, 90e6) == std::vector<double>(3, 10e6));  // it raises none
}

TEST_CASE("a link whose own path is slow keeps what it learnt, and the others share the rest") {
  CHECK(level({10e6, 1e6, 12e6}, 0.0) == std::vector<double>{11e6, 1e6, 11e6});
  CHECK(level({10e6, 1e6, 12e6}, 21e6) == std::vector<double>{10e6, 1e6, 10e6});
  CHECK(level({4e6, 1e6, 12e6}, 0.0) == std::vector<double>{4e6, 1e6, 12e6});
  // In between it is raised a little, to see.
  CHECK(level({10e6, 15e6}, 0.0) == std::vector<double>{11.5e6, 13.5e6});
  // Neither gets more than the uplink, be it slower than both paths.
  CHECK(level({10e6, 50e6}, 8e6) == std::vector<double>(2, 4e6));
}

TEST_CASE("a look after a pause, at other streams or at counters that began anew says nothing") {
  PathWatch watch;
  const auto busy_look = [&](std::uint64_t delivered, std::size_t streams, double now_s) {
    watch.busy_s = 0.2;
    watch.look({delivered, 0, kRtt_s, kRtt_s}, streams, now_s, kTurn_s);
  };
  CHECK(watch.due(1.0, kTurn_s));
  busy_look(5'000'000, 1, 1.0);
  CHECK_FALSE(watch.due(1.1, kTurn_s));
  CHECK(watch.due(1.2, kTurn_s));
  busy_look(6'000'000, 1, 1.2);
  CHECK(watch.pacer.ceiling() == 0.0);  // one rate: is it still growing?
  busy_look(9'000'000, 2, 1.4);
  busy_look(8'000'000, 2, 1.6);
  busy_look(50'000'000, 2, 3.6);
  CHECK(watch.pacer.ceiling() == 0.0);
  busy_look(51'000'000, 2, 3.8);
  CHECK(watch.pacer.ceiling() == doctest::Approx(5e6));
}

}  // namespace decotrain::net
