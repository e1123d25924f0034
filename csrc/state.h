// Shared state for newcomers: a store that serves chunks of fragments, and a fetch that pulls one
// fragment from several peers at once (docs/state.md).
//
// Frames and time in, frames out: no socket, no thread, no clock. The store may be called by the
// trainer's thread (publish, updates) and the network thread (requests) at once; a fetch belongs to
// the network thread. Neither decides what is current: that is the control plane's word.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine.h"
#include "wire.h"

namespace decotrain {

constexpr std::size_t kStateChunkBytes = std::size_t{1} << 20;
constexpr std::uint64_t kAnyVersion = ~std::uint64_t{0};
constexpr std::size_t kStateAskedMax = 8;    // requests under way, of one fetch at one peer
constexpr std::size_t kStateQueuedMax = 64;  // requests that the store keeps, of one peer
constexpr std::size_t kStateReplyBytesMax = std::size_t{32} << 20;  // copies on their way out
constexpr std::size_t kStateHeldMax = 32;  // pieces asked for or waiting, of a fetch that follows

// How a store answers (Header::chunk of a state frame).
enum class StateAnswer : std::uint32_t {
  here = 0,           // the payload is the chunk, at the version in `seq`
  busy = 1,           // being written to: ask again
  other_version = 2,  // `seq` is the version held
  unknown = 3         // no such fragment, or another one: `c` is its size, `b` its kind
};

struct StateArray {
  std::span<std::byte> bytes;
  std::size_t elements = 0;
};

// A fragment's arrays, cut into pieces of at most kStateChunkBytes. Elements of one index, of all
// arrays with as many elements, lie in one piece; arrays of a single element come first. So an
// update that works element by element moves each piece by itself, once the first ones are there.
class StatePieces {
 public:
  using Parts = std::vector<std::span<std::byte>>;

  StatePieces() = default;
  // Throws std::invalid_argument when an array's bytes are no multiple of its elements.
  explicit StatePieces(const std::vector<StateArray>& arrays);

  std::size_t size() const { return pieces_.size(); }
  std::size_t heads() const { return heads_; }  // so many pieces are of single elements
  std::size_t bytes() const { return bytes_; }
  std::size_t bytes_of(std::size_t piece) const;
  void read(std::size_t piece, std::byte* out) const;
  void write(std::size_t piece, const std::byte* from) const;

 private:
  void add(const std::vector<StateArray>& group);

  std::vector<Parts> pieces_;
  std::size_t room_ = 0;  // left in the last one
  std::size_t heads_ = 0;
  std::size_t bytes_ = 0;
};

class StateStore {
 public:
  // Serves the buffers from where they lie, until they are published anew or withdrawn.
  // `kind` is a digest of what the bytes mean (0: not said). Those of another kind are not served.
  void publish(std::uint32_t tag, StatePieces pieces, std::uint64_t version,
               std::shared_ptr<const void> keep, std::uint64_t kind = 0);
  void withdraw(std::uint32_t tag);
  // Around every write to the buffers. begin_update waits for at most one chunk's copy.
  void begin_update(std::uint32_t tag);
  void end_update(std::uint32_t tag, std::uint64_t version);
  std::optional<std::uint64_t> version(std::uint32_t tag) const;

  // The network thread's. A request that is no request of ours is forgotten.
  void on_request(PeerId from, const Header& header);
  bool has_reply(PeerId to) const;
  bool next_reply(PeerId to, OutFrame& frame);
  void forget(PeerId peer);  // it has left, or the link was reset: it asks again
  std::size_t reply_bytes() const { return *reply_bytes_; }

 private:
  struct Fragment {
    mutable std::mutex mutex;
    StatePieces pieces;
    std::uint64_t version = 0;
    bool updating = false;
    std::uint64_t kind = 0;
    std::shared_ptr<const void> keep;
  };
  std::shared_ptr<Fragment> find(std::uint32_t tag) const;
  StateAnswer read(const Header& request, Header& reply, std::byte* out) const;

  mutable std::mutex mutex_;  // guards the map
  std::map<std::uint32_t, std::shared_ptr<Fragment>> fragments_;
  std::map<PeerId, std::deque<Header>> asked_;  // the network thread's
  // Shared with the frames on their way, which may outlive the store.
  std::shared_ptr<std::atomic<std::size_t>> reply_bytes_ =
      std::make_shared<std::atomic<std::size_t>>(0);
};

struct StateProgress {
  std::size_t bytes = 0, total_bytes = 0;
  std::optional<std::uint64_t> version;
  std::uint32_t restarts = 0;   // the version moved
  std::uint32_t damaged = 0;    // chunks whose digest was wrong
  std::size_t under_way = 0;    // requests that are not answered
  std::size_t other_bytes = 0;  // what every server holds instead is so large; 0: it fits
};

class StateFetch {
 public:
  // `id` tells the answers of this fetch from those of an earlier one. When the servers' version
  // moves, a fetch that `follows` keeps what it has: its caller moves that along (pause, lock,
  // advance), and pieces of later versions wait for it. Another one starts again.
  StateFetch(std::uint32_t tag, std::uint32_t id, StatePieces into,
             const std::vector<PeerId>& peers, bool follows, std::uint64_t kind = 0);

  void pause();  // asks for nothing until advance()
  // From now until advance() the arrays are the caller's. False when the fetch is done already.
  bool lock();
  void advance(std::uint64_t version);               // what is here has moved to this version
  void set_peers(const std::vector<PeerId>& peers);  // what is fetched stays
  bool has_request(PeerId peer, double now) const;
  bool next_request(PeerId peer, double now, Header& header);
  Incoming on_header(PeerId from, const Header& header, double now);
  void on_payload(PeerId from, const Header& header, Incoming payload, double now);
  void on_link_reset(PeerId peer);  // its answers are lost
  void tick(double now);
  double next_deadline() const;

  bool done() const { return left_ == 0; }
  std::uint32_t tag() const { return tag_; }
  StateProgress progress() const;

 private:
  struct Server {
    std::vector<std::uint32_t> asked;
    double heard = 0.0;
    double not_before = 0.0;
    std::uint32_t damaged = 0;
    std::size_t other_bytes = 0;  // of its fragment, which is not ours
  };
  struct Piece {
    bool done = false;
    bool queued = true;  // in todo_
    bool late = false;   // asked long ago: an idle server may be asked as well
    double asked_at = 0.0;
  };
  struct Held {
    std::uint64_t version = 0;
    Incoming payload;
  };
  std::optional<std::uint32_t> pick(const Server& server, double now) const;
  bool current(const Header& header) const;
  bool fits(const Header& header) const;
  void queue(std::uint32_t piece);
  void give_back(Server& server);
  void restart(std::uint64_t version);
  void take(std::uint32_t piece, std::uint64_t version, Incoming payload, Server& server,
            double now);
  void store(std::uint32_t piece, const std::byte* payload);
  std::size_t asked() const;

  const std::uint32_t tag_, id_;
  const StatePieces into_;
  const bool follows_;
  const std::uint64_t kind_;
  bool paused_ = false, locked_ = false;
  std::map<PeerId, Server> servers_;
  std::vector<Piece> pieces_;
  std::deque<std::uint32_t> todo_;
  std::map<std::uint32_t, Held> held_;  // by piece
  std::size_t left_ = 0, heads_left_ = 0;
  StateProgress progress_;
};

}  // namespace decotrain
