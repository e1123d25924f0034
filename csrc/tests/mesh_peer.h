// A Mesh with the simplest handler that tests can drive: a queue of frames out for each peer, a
// list of frames in. Meshes of one test run in one thread, in turn.
#pragma once

#include <doctest/doctest.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "net/mesh.h"

namespace decotrain::net {

struct Got {
  PeerId from = 0;
  Header header;
  std::vector<std::byte> payload;
  Incoming incoming;  // with `holds`
};

class TestPeer {
 public:
  TestPeer(PeerId peer, std::uint8_t in_slot, const std::vector<std::string>& listen,
           MeshOptions options)
      : id(peer), slot(in_slot), mesh(peer, listen, options, handler()) {}

  void send(PeerId to, std::uint8_t to_slot, std::vector<std::byte> payload,
            std::uint64_t seq = 0) {
    OutFrame frame;
    frame.header.type = FrameType::contribution;
    frame.header.src = slot;
    frame.header.dst = to_slot;
    frame.header.seq = seq;
    frame.header.payload_bytes = static_cast<std::uint32_t>(payload.size());
    auto held = std::make_shared<std::vector<std::byte>>(std::move(payload));
    frame.payload = held->data();
    frame.keep = held;
    queues[to].push_back(std::move(frame));
  }
  PeerInfo info() const { return {id, slot, mesh.addresses()}; }
  bool saw(MeshEvent::Kind kind, PeerId peer = 0) {
    for (MeshEvent& event : mesh.take_events()) events.push_back(std::move(event));
    for (const MeshEvent& event : events) {
      if (event.kind == kind && (peer == 0 || event.peer == peer)) return true;
    }
    return false;
  }

  const PeerId id;
  const std::uint8_t slot;
  std::map<PeerId, std::deque<OutFrame>> queues;
  std::vector<Got> got;
  std::map<PeerId, int> resets;
  std::vector<MeshEvent> events;
  Accept answer = Accept::take;
  bool holds = false;  // what arrives is not given back
  bool stays = true;   // payloads that are in memory already are not copied
  Mesh mesh;

 private:
  MeshHandler handler() {
    return {
        .on_header =
            [this](PeerId, const Header& header, bool arrived) {
              Incoming incoming;
              incoming.accept = answer;
              incoming.reason = "the test says so";
              if (answer != Accept::take || (arrived && stays)) return incoming;
              auto held = std::make_shared<std::vector<std::byte>>(header.payload_bytes);
              incoming.target = held->data();
              incoming.keep = held;
              return incoming;
            },
        .on_payload =
            [this](PeerId from, const Header& header, Incoming incoming) {
              std::vector<std::byte> payload(incoming.target,
                                             incoming.target + header.payload_bytes);
              got.push_back({from, header, std::move(payload), holds ? incoming : Incoming{}});
            },
        .next_frame =
            [this](PeerId to, OutFrame& frame) {
              auto& queue = queues[to];
              if (queue.empty()) return false;
              frame = std::move(queue.front());
              queue.pop_front();
              return true;
            },
        .has_frames = [this](PeerId to) { return !queues[to].empty(); },
        .on_link_reset = [this](PeerId peer) { ++resets[peer]; },
    };
  }
};

using TestPeers = std::vector<std::unique_ptr<TestPeer>>;

// Runs all of them in turn until `done()` or the bound; true when done.
template <typename Done>
bool run_until(TestPeers& peers, Done done, double bound_s = 10.0) {
  const Clock end = Mesh::now() + bound_s;
  while (!done()) {
    if (Mesh::now() > end) return false;
    for (auto& peer : peers) peer->mesh.run_once(Mesh::now() + 0.0005);
  }
  return true;
}

inline MeshOptions fast_options() {
  MeshOptions options;
  options.run_fingerprint = 7;
  options.handshake_timeout_s = 0.5;
  options.dial_patience_s = 0.2;
  options.backoff_min_s = 0.01;
  options.backoff_max_s = 0.05;
  return options;
}

inline TestPeers make_peers(std::size_t n, const std::vector<std::string>& listen,
                            const MeshOptions& options) {
  TestPeers peers;
  for (std::size_t i = 0; i < n; ++i) {
    peers.push_back(
        std::make_unique<TestPeer>(100 + i, static_cast<std::uint8_t>(i), listen, options));
  }
  return peers;
}

inline void introduce(TestPeers& peers) {
  std::vector<PeerInfo> all;
  for (const auto& peer : peers) all.push_back(peer->info());
  for (auto& peer : peers) peer->mesh.set_peers(all, Mesh::now());
}

inline std::vector<std::byte> bytes_of(std::size_t n, unsigned seed) {
  std::vector<std::byte> out(n);
  for (std::size_t i = 0; i < n; ++i) {
    seed = seed * 1664525u + 1013904223u;
    out[i] = static_cast<std::byte>(seed >> 24);
  }
  return out;
}

// Everybody sends everybody one frame of each size, and gets all of them whole.
template <std::size_t n>
void exchange_all(TestPeers& peers, const std::size_t (&sizes)[n], unsigned round = 0) {
  std::size_t count = 0;
  for (auto& from : peers) {
    from->got.clear();
    for (auto& to : peers) {
      if (from == to) continue;
      for (const std::size_t size : sizes) {
        from->send(to->id, to->slot, bytes_of(size, unsigned(size + from->id + round)), size);
        ++count;
      }
    }
  }
  REQUIRE(run_until(peers, [&] {
    std::size_t got = 0;
    for (auto& peer : peers) got += peer->got.size();
    return got == count;
  }));
  for (auto& peer : peers) {
    for (const Got& frame : peer->got) {
      const auto seed = unsigned(frame.header.seq + frame.from + round);
      CHECK(frame.payload == bytes_of(frame.header.seq, seed));
    }
  }
}

inline bool all_up(const TestPeers& peers) {
  for (const auto& peer : peers) {
    for (const LinkStats& link : peer->mesh.stats()) {
      if (!link.up) return false;
    }
  }
  return true;
}

}  // namespace decotrain::net
