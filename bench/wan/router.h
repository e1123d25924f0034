// The forwarder's sites and the way of a packet between them: sender's queue, path, receiver's
// queue.
//
// Reads and writes TUN devices; keeps what is under way in one heap ordered by time. Nothing
// here blocks.
#pragma once

#include <sys/resource.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <queue>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "link.h"
#include "packet.h"

namespace lab {

constexpr std::size_t kMaxHeldBytes = std::size_t{1} << 30;
constexpr int kReadsPerTurn = 16;
constexpr Time kLate = kMillisecond;

inline Time now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

struct Site {
  std::string name;
  int tun = -1;
  ino_t inode = 0;  // of its namespace
  std::uint32_t address = 0;
  Queue up;
  Queue down;
  std::uint64_t unroutable = 0;
};

// A packet that comes to the end of a path (then the receiver's queue is next), or of everything.
struct Due {
  Time at;
  std::uint64_t order;
  bool delivery;
  Packet packet;
};
struct Later {
  bool operator()(const Due& a, const Due& b) const {
    return a.at != b.at ? a.at > b.at : a.order > b.order;
  }
};

class Router {
 public:
  Router(std::uint64_t seed, std::vector<Site> sites)
      : sites_(std::move(sites)), paths_(sites_.size() * sites_.size()) {
    for (std::size_t i = 0; i < paths_.size(); ++i) {
      Random mix(seed * 0x100000001b3ull + i);
      paths_[i].random = Random(mix.next());
    }
    for (std::size_t i = 0; i < sites_.size(); ++i) by_address_[sites_[i].address] = i;
  }

  std::vector<Site>& sites() { return sites_; }
  Path& path(std::size_t from, std::size_t to) { return paths_[from * sites_.size() + to]; }
  Time next_due() const { return due_.empty() ? -1 : due_.top().at; }

  // Reads some packets of a site's device; false when there are no more.
  bool read(std::size_t from) {
    Site& site = sites_[from];
    for (int i = 0; i < kReadsPerTurn; ++i) {
      if (!scratch_) scratch_ = buffer(kReadBytes);
      const ssize_t got = ::read(site.tun, scratch_->data(), kReadBytes);
      if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
      if (got < 0) fail("reading the device of " + site.name);
      const auto count = static_cast<std::size_t>(got);
      const auto to = by_address_.find(destination(scratch_->data(), count));
      if (to == by_address_.end() || held_ > kMaxHeldBytes) {
        ++site.unroutable;
        continue;
      }
      Buffer bytes = scratch_;
      if (count <= kSmallBytes) {
        bytes = buffer(kSmallBytes);
        std::memcpy(bytes->data(), scratch_->data(), count);
      } else {
        scratch_.reset();
      }
      take(describe(std::move(bytes), count, static_cast<std::uint8_t>(from),
                    static_cast<std::uint8_t>(to->second)),
           now_ns());
    }
    return true;
  }

  void run_due(Time now) {
    while (!due_.empty() && due_.top().at <= now) {
      // The queue's order does not look at the packet, so it may be moved out.
      Due due = std::move(const_cast<Due&>(due_.top()));
      due_.pop();
      if (due.delivery) {
        deliver(due.packet, due.at);
      } else {
        arrive(std::move(due.packet), due.at);
      }
    }
  }

  std::string stats();

 private:
  Buffer buffer(std::size_t bytes) {
    auto& pool = bytes == kSmallBytes ? small_ : large_;
    std::unique_ptr<std::vector<std::uint8_t>> raw;
    if (pool.empty()) {
      raw = std::make_unique<std::vector<std::uint8_t>>(bytes);
    } else {
      raw = std::move(pool.back());
      pool.pop_back();
    }
    held_ += bytes;
    return Buffer(raw.release(), [this, bytes, &pool](std::vector<std::uint8_t>* done) {
      held_ -= bytes;
      pool.emplace_back(done);
    });
  }

  // Into the sender's queue, in lumps so small that a slow link's timing is that of segments.
  void take(Packet whole, Time now) {
    Path& way = path(whole.from, whole.to);
    Site& site = sites_[whole.from];
    way.counters.segments += whole.segments;
    way.counters.bytes += whole.link_bytes();
    if (way.down) {
      way.counters.cut += whole.segments;
      return;
    }
    const double each = static_cast<double>(whole.link_bytes()) / whole.segments;
    const unsigned lump =
        std::min({site.up.lump(each), way.queue.lump(each), sites_[whole.to].down.lump(each)});
    for (unsigned at = 0; at < whole.segments;) {
      const unsigned want = std::min<unsigned>(lump, whole.segments - at);
      const unsigned fit = site.up.room(now, want, each);
      way.counters.queue_up += want - fit;
      if (fit > 0) {
        Packet piece = cut(whole, at, fit);
        const Time left = site.up.send(now, static_cast<double>(piece.link_bytes()));
        enter(piece, way, left);
      }
      at += want;
    }
  }

  // Onto the path: runs of segments between lost and reordered ones travel together.
  void enter(const Packet& piece, Path& way, Time departure) {
    for (unsigned at = 0; at < piece.segments;) {
      const unsigned rest = piece.segments - at;
      const auto run =
          static_cast<unsigned>(std::min<std::uint64_t>({rest, way.loss.gap(), way.reorder.gap()}));
      if (run > 0) {
        travel(cut(piece, at, run), way, departure, 0);
        way.loss.pass(run);
        way.reorder.pass(run);
        at += run;
        continue;
      }
      const bool lost = way.loss.gap() == 0;
      const bool moved = way.reorder.gap() == 0;
      if (lost) ++way.counters.lost;
      if (moved && !lost) {
        ++way.counters.reordered;
        travel(cut(piece, at, 1), way, departure, way.reorder_hold);
      }
      lost ? way.loss.draw(way.random) : way.loss.pass(1);
      moved ? way.reorder.draw(way.random) : way.reorder.pass(1);
      ++at;
    }
  }

  void travel(Packet piece, Path& way, Time departure, Time hold) {
    const double each = static_cast<double>(piece.link_bytes()) / piece.segments;
    const unsigned fit = way.queue.room(departure, piece.segments, each);
    way.counters.queue_path += piece.segments - fit;
    if (fit == 0) return;
    if (fit < piece.segments) piece = cut(piece, 0, fit);
    const Time left = way.queue.send(departure, static_cast<double>(piece.link_bytes()));
    push(way.arrival(left) + hold, false, std::move(piece));
  }

  void arrive(Packet piece, Time at) {
    Path& way = path(piece.from, piece.to);
    Queue& queue = sites_[piece.to].down;
    if (way.down) {
      way.counters.cut += piece.segments;
      return;
    }
    const double each = static_cast<double>(piece.link_bytes()) / piece.segments;
    const unsigned fit = queue.room(at, piece.segments, each);
    way.counters.queue_down += piece.segments - fit;
    if (fit == 0) return;
    if (fit < piece.segments) piece = cut(piece, 0, fit);
    const Time left = queue.send(at, static_cast<double>(piece.link_bytes()));
    if (left <= at) {
      deliver(piece, at);
    } else {
      push(left, true, std::move(piece));
    }
  }

  void deliver(const Packet& piece, Time at) {
    Path& way = path(piece.from, piece.to);
    const Time late = now_ns() - at;
    late_max_ = std::max(late_max_, late);
    late_count_ += late > kLate;
    ++writes_;
    const iovec parts[2] = {{const_cast<std::uint8_t*>(piece.head.data()), piece.head_bytes},
                            {piece.buffer->data() + piece.payload_at, piece.payload_bytes}};
    if (::writev(sites_[piece.to].tun, parts, 2) < 0) {
      way.counters.refused += piece.segments;
      return;
    }
    way.counters.delivered += piece.segments;
    way.counters.delivered_bytes += piece.link_bytes();
  }

  void push(Time at, bool delivery, Packet packet) {
    due_.push(Due{at, order_++, delivery, std::move(packet)});
  }

  std::size_t held_ = 0;
  std::vector<std::unique_ptr<std::vector<std::uint8_t>>> small_;
  std::vector<std::unique_ptr<std::vector<std::uint8_t>>> large_;
  Buffer scratch_;
  std::vector<Site> sites_;
  std::vector<Path> paths_;
  std::unordered_map<std::uint32_t, std::size_t> by_address_;
  std::priority_queue<Due, std::vector<Due>, Later> due_;
  std::uint64_t order_ = 0;
  std::uint64_t writes_ = 0;
  std::uint64_t late_count_ = 0;
  Time late_max_ = 0;
};

inline std::string Router::stats() {
  std::ostringstream out;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](timeval t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  out << "{\"cpu_s\": " << seconds(usage.ru_utime) + seconds(usage.ru_stime)
      << ", \"writes\": " << writes_ << ", \"late\": " << late_count_
      << ", \"late_max_ms\": " << static_cast<double>(late_max_) / kMillisecond
      << ", \"held_bytes\": " << held_ << ", \"paths\": [";
  const char* comma = "";
  for (std::size_t i = 0; i < paths_.size(); ++i) {
    const Counters& c = paths_[i].counters;
    if (i % (sites_.size() + 1) == 0) continue;  // a site's path to itself
    out << comma << "{\"from\": \"" << sites_[i / sites_.size()].name << "\", \"to\": \""
        << sites_[i % sites_.size()].name << "\", \"segments\": " << c.segments
        << ", \"bytes\": " << c.bytes << ", \"delivered\": " << c.delivered
        << ", \"delivered_bytes\": " << c.delivered_bytes << ", \"lost\": " << c.lost
        << ", \"cut\": " << c.cut << ", \"queue_up\": " << c.queue_up
        << ", \"queue_path\": " << c.queue_path << ", \"queue_down\": " << c.queue_down
        << ", \"reordered\": " << c.reordered << ", \"refused\": " << c.refused << "}";
    comma = ", ";
  }
  out << "]}";
  late_max_ = 0;
  return out.str();
}

}  // namespace lab
