// Stream: one connection to one peer and where it stands in its frames, both ways.
//
// A plain record: Mesh (mesh.cpp, frames.cpp, links.cpp) moves it. Payloads go straight from the
// sender's memory to the kernel and from the kernel to the receiver's; only what follows a header
// in the same read passes through `staging`. Within a host it may stay where it is (shared.h).
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "engine.h"
#include "net/shared.h"
#include "wire.h"

namespace decotrain::net {

constexpr std::size_t kStagingBytes = 16 << 10;
constexpr std::uint32_t kHelloTakesMemory = 1;

using Clock = double;  // seconds, monotonic

struct Stream {
  enum class State : std::uint8_t {
    connecting,  // connect() under way
    greeting,    // waiting for the other's hello
    waiting,     // its hello is valid, but the peer is in no view we know yet
    open,
    closed
  };

  std::uint64_t id = 0;
  Channel channel;
  State state = State::greeting;
  bool dialled = false;  // by us
  std::uint64_t origin = 0;
  PeerId peer = 0;
  std::uint32_t index = 0;
  Clock born = 0;

  // reading
  bool readable = false;
  bool ended = false;       // the other side has closed its half
  bool queued = false;      // in Mesh::ready_
  bool has_header = false;  // `in` is parsed and not yet accepted
  bool paused = false;      // and is not to be offered before something changes
  std::array<std::byte, kHeaderBytes> hello_bytes{};
  std::size_t hello_got = 0;
  std::unique_ptr<std::byte[]> staging;
  std::size_t staged_from = 0, staged_to = 0;
  bool in_payload = false;
  Header in;
  Incoming incoming;
  PeerId in_from = 0;     // who the frame is from: `peer` or, relayed, another
  bool in_relay = false;  // to be forwarded
  std::size_t in_got = 0;

  bool local = false;                // within this host
  bool far_takes_memory = false;     // its hello says so
  std::unique_ptr<Sharing> sharing;  // with a process of this host

  // The last header of each type, both ways: what short headers are made from.
  static constexpr std::size_t kTypes = static_cast<std::size_t>(kLastFrameType) + 1;
  std::array<HeaderBytes, kTypes> sent_last{}, received_last{};

  // writing
  bool writable = false;
  bool blocked = false;  // the kernel took less than offered, and has not said it has room since
  struct Out {
    OutFrame frame;
    HeaderBytes header{};
    std::size_t header_bytes = kHeaderBytes;  // fewer when it is short
    bool lent = false;                        // the payload stays in shared memory
    int descriptor = -1;                      // goes along; frame.keep keeps it open
    std::size_t payload_bytes() const { return lent ? 0 : frame.header.payload_bytes; }
    std::size_t bytes() const { return header_bytes + payload_bytes(); }
  };
  std::deque<Out> out;       // the frames now going out; the first one partly
  std::size_t out_sent = 0;  // bytes of the first one

  // liveness
  Clock last_received = 0;
  Clock last_acknowledged = 0;  // when the other side last took bytes of ours
  bool owes = false;            // bytes of ours are not taken yet, as far as we looked
  std::uint64_t sent_bytes = 0, received_bytes = 0;
  std::int64_t acknowledged_bytes = 0;
  Clock ping_sent = 0;   // 0: none outstanding
  bool chooses = false;  // has a congestion control to choose when many bytes go out
  Clock bulk_at = 0;     // when they last did
  Clock frame_started = 0;
  double frame_s = 0.0;  // smoothed duration of a large frame

  bool live() const { return state == State::open; }
  std::size_t staged() const { return staged_to - staged_from; }
};

}  // namespace decotrain::net
