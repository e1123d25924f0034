// Node: one peer's data plane. An Engine and a Mesh on one network thread, and calls that any
// thread may make. It never needs the GIL.
//
// The engine and the mesh belong to the network thread; the caller's thread encodes snapshots and
// decodes results, and leaves commands in a queue. It does not decide membership: the control
// plane freezes, installs and names addresses.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "engine.h"
#include "net/mesh.h"
#include "state.h"

namespace decotrain {

struct NodeOptions {
  EngineOptions engine;
  net::MeshOptions mesh;
};

struct NodeEvent {
  std::string kind;  // names of EventKind and net::MeshEvent::Kind
  std::uint32_t tag = 0;
  std::uint64_t seq = 0;
  PeerId peer = 0;
  std::string detail;
};

// A round that was begun here. Any thread may look at it.
class Work {
 public:
  explicit Work(std::uint32_t tag) : tag_(tag) {}

  // False when the time is over first; without a bound below zero. Rethrows what failed the round.
  bool wait(double timeout_s);
  bool done() const;
  // Set when the round has its number: a round begun before there is a view has none yet.
  std::optional<std::uint64_t> seq() const;
  std::uint32_t tag() const { return tag_; }
  // Only after wait() was true. Null: missed results must be taken before this round can begin.
  std::shared_ptr<const RoundResult> result() const;

 private:
  friend class Node;
  void started(std::uint64_t seq);
  void complete(std::shared_ptr<const RoundResult> result);
  void fail(std::string error);

  const std::uint32_t tag_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool done_ = false;
  std::string error_;
  std::optional<std::uint64_t> seq_;
  std::shared_ptr<const RoundResult> result_;
};

// A fragment that is being fetched into the caller's buffers. Any thread may look at it.
class FetchWork {
 public:
  // False when the time is over first; without a bound below zero. Throws when it was cancelled.
  bool wait(double timeout_s);
  // False when the time is over before every request is answered (or the fetch done).
  bool wait_quiet(double timeout_s);
  bool done() const;
  StateProgress progress() const;

 private:
  friend class Node;
  void update(const StateProgress& progress, bool done);
  void fail(std::string error);

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool done_ = false;
  std::string error_;
  StateProgress progress_;
};

// What went wrong in a round, or a call after close().
struct NodeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Elements of one chunk for a round of so many: small enough to spread over the owners and to
// overlap sending with combining, large enough for few frames.
std::uint32_t default_chunk_elements(std::uint64_t elements);

class Node {
 public:
  // Throws std::runtime_error when an address cannot be bound.
  Node(PeerId self, const std::vector<std::string>& listen, const NodeOptions& options);
  ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  PeerId self() const { return self_; }
  std::vector<std::string> addresses() const { return addresses_; }
  // Ends the network thread. Works that are open fail; later calls throw NodeError.
  void close();

  // --- rounds
  std::shared_ptr<Work> begin(BeginArgs args);
  // Of a round begun with a snapshot that was not whole: so many of its chunks are there now; or
  // the others will never be.
  void chunks_ready(const std::shared_ptr<Work>& work, std::uint32_t chunks);
  void abandon(const std::shared_ptr<Work>& work);
  std::vector<std::uint64_t> missed(std::uint32_t tag);
  std::vector<std::shared_ptr<const RoundResult>> take_missed(std::uint32_t tag);
  void declare(std::vector<std::pair<std::uint32_t, std::int64_t>> covered);
  void set_covered(std::uint32_t tag, std::int64_t seq);

  // --- shared state: the store's own calls (publish, begin_update, ...) go straight to it
  StateStore& store() { return store_; }
  // Pulls the fragment from these peers into the buffers, which belong to the fetch until it is
  // done or cancelled.
  std::shared_ptr<FetchWork> fetch(std::uint32_t tag, std::vector<PeerId> peers, StatePieces into,
                                   bool follows, std::shared_ptr<const void> keep,
                                   std::uint64_t kind = 0);
  // Of a fetch that follows: no more requests; then, when it is quiet, the arrays are the caller's
  // (lock_fetch; false: it is done or gone) until they have moved to another version.
  void pause_fetch(const std::shared_ptr<FetchWork>& work);
  bool lock_fetch(const std::shared_ptr<FetchWork>& work);
  void advance_fetch(const std::shared_ptr<FetchWork>& work, std::uint64_t version);
  // Others to ask from now on; what is fetched stays.
  void set_fetch_peers(const std::shared_ptr<FetchWork>& work, std::vector<PeerId> peers);
  void cancel(const std::shared_ptr<FetchWork>& work);

  // --- the control plane
  Report freeze(FreezeId id);
  bool install(const Install& install);
  // Host names in addresses are resolved on the caller's thread.
  void set_peers(std::vector<net::PeerInfo> peers);
  void set_route(PeerId peer, PeerId via);
  View view();
  std::vector<NodeEvent> take_events();
  int event_fd() const { return event_fd_.get(); }  // readable while there are events
  std::vector<net::LinkStats> links();
  struct Measures {
    double uplink_bps = 0.0;  // 0: not measured yet
    std::map<PeerId, double> held_up_s;
    net::Mesh::Traffic traffic;
  };
  Measures measures();

 private:
  struct Open {
    std::uint64_t seq = 0;
    std::shared_ptr<Work> work;
  };
  struct Waiting {
    BeginArgs args;
    std::shared_ptr<Work> work;
  };
  struct Fetching {
    std::unique_ptr<StateFetch> fetch;
    std::shared_ptr<FetchWork> work;
    std::shared_ptr<const void> keep;
  };
  using Command = std::function<void(double now)>;

  net::MeshHandler handler();
  void run();
  bool turn();
  void finish(const std::string& why, bool broken);
  bool run_commands();
  void start_waiting(double now);
  void finish_ready();
  bool next_frame(PeerId to, OutFrame& frame);
  bool has_frames(PeerId to) const;
  Incoming on_state_header(PeerId from, const Header& header);
  void on_state_payload(PeerId from, const Header& header, const Incoming& incoming);
  void run_fetches(double now);
  StateFetch* fetch_of(const std::shared_ptr<FetchWork>& work);
  double next_deadline() const;
  void forward_events();
  void emit(NodeEvent event);
  void post(Command command);
  void fail_all(const std::string& error);
  // Runs on the network thread and waits for it.
  template <typename Result>
  Result call(std::function<Result(double)> command) {
    auto promise = std::make_shared<std::promise<Result>>();
    std::future<Result> future = promise->get_future();
    post([this, promise, command = std::move(command)](double now) {
      try {
        if (broken_) throw NodeError(end_);
        if constexpr (std::is_void_v<Result>) {
          command(now);
          promise->set_value();
        } else {
          promise->set_value(command(now));
        }
      } catch (...) {
        promise->set_exception(std::current_exception());
      }
    });
    return future.get();
  }

  const PeerId self_;
  net::Fd event_fd_;

  // The network thread's.
  bool broken_ = false;        // by an exception: the engine may be half changed, let it be
  std::deque<Command> taken_;  // of commands_, to be run
  Engine engine_;
  std::multimap<std::uint32_t, Waiting> waiting_;  // by tag, in order
  std::multimap<std::uint32_t, Open> open_;
  std::vector<Fetching> fetches_;
  std::uint32_t next_fetch_ = 0;
  StateStore store_;
  std::unique_ptr<net::Mesh> mesh_;
  std::vector<std::string> addresses_;

  std::mutex mutex_;  // guards the members below
  std::deque<Command> commands_;
  std::vector<NodeEvent> events_;
  bool closing_ = false;
  std::string end_ = "this node is closed";  // what calls are told once it is closing

  std::mutex close_mutex_;
  std::thread thread_;
};

}  // namespace decotrain
