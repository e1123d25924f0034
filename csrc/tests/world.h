// A world of engines under one seed: peers, streams that reorder, break and repeat, and a small
// coordinator that plans from reports (docs/protocol.md). For tests only.
#pragma once

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "buffers.h"
#include "engine.h"

namespace decotrain::test {

struct Frame {
  std::array<std::byte, kHeaderBytes> header{};
  std::vector<std::byte> payload;
};

struct Stream {
  std::deque<Frame> frames;
  std::optional<Incoming> receiving;  // the header of the first frame was taken
};

// What an application holds: versions of one state for each tag, as a chain of digests.
struct State {
  std::int64_t version = -1;
  std::uint64_t chain = 1;
};

struct Peer {
  PeerId id = 0;
  std::uint8_t slot = kNoSlot;
  bool alive = true;
  bool needs_fetch = false;
  std::unique_ptr<Engine> engine;
  std::map<std::uint32_t, State> state;
  std::map<std::uint32_t, std::deque<std::uint64_t>> begun;  // tag -> open rounds of ours
  std::map<std::pair<std::uint32_t, std::uint64_t>, std::uint64_t> returned;  // -> digest
};

struct WorldOptions {
  std::size_t peers = 3;
  Op op = Op::sum;  // or collect: each peer's elements are bytes of its own
  std::uint64_t elements = 200;
  std::uint32_t chunk_elements = 64;
  std::uint32_t tags = 2;
  int streams = 2;
  std::uint64_t rounds = 3;  // of each tag
  std::uint8_t ahead = 0;    // of them that may be open before the newest
  EngineOptions engine;
  bool fills = false;  // chunks of many rounds become ready one by one
  bool chaos = false;
  Plant plant = Plant::none;
};

class World {
 public:
  World(std::uint32_t seed, WorldOptions chosen);

  void act();                       // one random step of chaos or work
  bool run_until_quiet(int bound);  // no faults; false when the bound is met first
  void heal();                      // everybody current, active, and with all rounds done
  void change_view(
      bool lossy);  // freeze, report, plan, install; lossy: reports or installs missing
  void kill(std::size_t peer);
  void join();
  void break_pair(std::size_t a, std::size_t b);
  bool move(bool only_send);  // one frame one step further; false when nothing moves
  void begin_some();
  void take_all();
  void check();  // agreement of all living

  std::string describe();  // for a failing seed

  Peer& peer(std::size_t i) { return peers_[i]; }
  std::size_t size() const { return peers_.size(); }
  std::vector<std::string>& violations() { return violations_; }
  double now = 0.0;

 private:
  std::uint64_t random(std::uint64_t n) { return rng_() % n; }
  void late_install();
  void forget(PeerId peer);
  bool active(const Peer& peer);
  void note_state(const Peer& peer, std::uint32_t tag);
  void install(Peer& peer, const Install& made);
  void check_names(const Peer& peer, const RoundResult& result);
  void send_one(std::size_t from, std::size_t to);
  bool deliver(std::size_t from, std::size_t to, Stream& stream);
  void begin(Peer& peer, std::uint32_t tag);
  void apply(Peer& peer, std::uint32_t tag, const RoundResult& result);
  void fetch(Peer& peer);
  bool fill_one();
  void declare(Peer& peer);
  void check_sum(const Peer& peer, const RoundResult& result);
  Install plan(const std::map<std::size_t, Report>& reports, const std::vector<std::size_t>& in,
               bool fresh);
  void new_generation(std::map<std::size_t, Report>& reports);
  void plan_tags(const std::map<std::uint8_t, Report>& reports, bool fresh, Install& out);
  RoundPlan plan_round(const std::map<std::uint8_t, Report>& reports, const Install& view,
                       std::uint32_t tag, std::uint64_t seq);

  WorldOptions options_;
  std::mt19937 rng_;
  std::vector<Peer> peers_;
  std::map<std::tuple<std::size_t, std::size_t, int>, Stream> streams_;
  std::vector<std::pair<std::size_t, std::size_t>> resets_;  // (who, about whom), to be told
  std::vector<std::tuple<std::size_t, std::size_t, Frame>> old_frames_;
  std::map<std::pair<std::uint32_t, std::uint64_t>, std::map<PeerId, std::uint64_t>> truth_;
  // Contributions that are not whole yet: NaN where nothing has been written.
  struct Filling {
    std::size_t peer = 0;
    std::uint32_t tag = 0;
    std::uint64_t seq = 0;
    std::uint32_t ready = 0;
    std::shared_ptr<std::vector<float>> values;
  };
  std::deque<Filling> filling_;
  // (tag, version) -> who held it, and the chain of results it held
  std::map<std::pair<std::uint32_t, std::int64_t>, std::map<PeerId, std::uint64_t>> chains_;
  std::vector<Install> installs_;  // all so far: some arrive late
  std::vector<std::string> violations_;
  ViewId view_id_ = ViewId{1} << 32;
  std::uint64_t freeze_number_ = 0;
  std::size_t next_slot_ = 0;
};

}  // namespace decotrain::test
