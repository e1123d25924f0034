// Engine: all rounds of one peer as a pure state machine. Frames, calls and a clock in; frames and
// events out. It opens no socket, starts no thread and reads no clock: net/ drives it in a process,
// the simulator drives the very same object under virtual time (docs/protocol.md).
//
// One thread owns an Engine. It does not decide membership (decotrain/control does) and does not
// know tensors (decotrain/communicator does).
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "types.h"
#include "wire.h"

namespace decotrain {

struct EngineOptions {
  double grace_s = 0.0;  // waive who is not in this long after the quorum; 0: wait for all
  double quorum = 1.0;   // fraction of the active peers' weight that starts the grace period
  // Name who is later than the others by this, and by as long as those needed, with results when
  // most owners have sent all of theirs; or by twice this with its DONE after our own. 0: never.
  double done_bound_s = 0.0;
  std::size_t parked_bytes = std::size_t{64} << 20;  // early frames of rounds not begun here
  // Results kept for a caller that has not begun them, of each tag: so many, and more of them while
  // they are small. A newcomer needs those that come while it fetches the state.
  std::size_t missed_rounds = 4;
  std::size_t missed_bytes = std::size_t{4} << 20;
};

// Why and where a frame's payload goes.
enum class Accept : std::uint8_t {
  take,   // write payload_bytes to `target`, then call on_payload
  drop,   // read and forget the payload (stale, duplicate)
  later,  // of a view not installed here yet: stop reading this stream until install()
  refuse  // breaks the protocol: end this stream
};
struct Incoming {
  Accept accept = Accept::drop;
  std::byte* target = nullptr;
  std::shared_ptr<void> keep;  // owns target
  const char* reason = "";     // for refuse and drop
};

struct OutFrame {
  Header header;
  const std::byte* payload = nullptr;
  std::shared_ptr<const void> keep;  // owns payload
};

// Where one chunk's bytes come from or stand; all memory is the engine's or pinned by `keep`.
struct Snapshot {
  const std::byte* bytes = nullptr;  // encoded contribution, chunk after chunk
  std::shared_ptr<const void> keep;
  bool finite = true;  // false: not looked at yet (a large borrowed buffer), see Round::withdrawn
  // So many chunks, from the first on, are there; the others follow (Engine::chunks_ready).
  std::uint32_t ready = kAllChunks;
};

// Error feedback of the results we own: what earlier ones lost, for all elements of the round. It
// is read while the round is open; what this round's lose is in its result.
struct OwnerResidual {
  const float* values = nullptr;  // null: none
  std::shared_ptr<const void> keep;
};

struct BeginArgs {
  std::uint32_t tag = 0;
  RoundSpec spec;
  Snapshot snapshot;              // empty with weight 0
  std::size_t collect_bytes = 0;  // collect: length of the snapshot
  double weight = 1.0;            // 0: SKIP
  std::uint64_t state_digest = 0;
  OwnerResidual owner_residual;
};

enum class Outcome : std::uint8_t {
  stable,  // every active peer of the view holds these bits
  lost,    // the round was completed without us and its bytes are gone: fetch the state
  left     // we are not in the view any more
};

// What the result of a chunk that was combined here lost, residual included.
struct Lost {
  std::uint32_t chunk = 0;
  std::shared_ptr<const float[]> values;
};

// What a round leaves behind. Result chunks stay encoded until the caller decodes them.
struct RoundResult {
  std::uint32_t tag = 0;
  std::uint64_t seq = 0;
  RoundSpec spec;
  Outcome outcome = Outcome::stable;
  ViewId view = 0;                         // in which it became stable
  std::uint64_t digest = 0;                // of all result bytes and contributor sets
  std::vector<SlotMask> contributors;      // for each chunk
  std::vector<std::uint32_t> chunk_bytes;  // encoded length; 0: nobody contributed
  std::vector<const std::byte*> chunks;
  std::vector<std::pair<std::uint8_t, PeerId>> peers;  // slot -> peer for every contributor
  std::shared_ptr<const void> keep;
  bool begun = true;       // false: we got it as an observer or newly active peer
  bool withdrawn = false;  // our contribution was not finite: chunks that showed it lack it
  std::vector<Lost> lost;  // of rounds begun with an owner's residual: what replaces it, in parts
};

enum class EventKind : std::uint8_t {
  stable,         // a round is complete: take_result(tag, seq)
  refused,        // `peer` sent NaN, a wrong length or garbage inside a valid frame: left out
  spec_mismatch,  // `peer` runs another specification for this round
  diverged,       // DONE digests differ: `detail` lists slot=digest
  late_done,      // `peer` has not said DONE, or not sent its results, within the bound
  waived,         // we waived `peer` in a round
  open            // `peer` has begun a round that we have not (once for each round)
};
struct Event {
  EventKind kind;
  std::uint32_t tag = 0;
  std::uint64_t seq = 0;
  PeerId peer = 0;
  std::string detail;
};

struct FreezeId {
  std::uint32_t term = 0;
  std::uint64_t number = 0;
  auto operator<=>(const FreezeId&) const = default;
};

struct ChunkReport {
  std::uint64_t digest = 0;  // of the value held (payload digest); meaningful when born != 0
  ViewId born = 0;           // view in which that value was combined; 0: no value held
  SlotMask contributors = 0;
  std::uint8_t owner = kNoSlot;
  SlotMask received = 0;  // contributions held, when we own it (own one included)
};
struct RoundReport {
  std::uint32_t tag = 0;
  std::uint64_t seq = 0;
  RoundSpec spec;
  bool begun = false;
  SlotMask skipped = 0;  // who said SKIP
  std::vector<ChunkReport> chunks;
};
struct TagReport {
  std::uint32_t tag = 0;
  bool state = true;          // false: declared to carry no state, so covered whatever is stable
  std::int64_t covered = -1;  // last round whose effect or whose result we hold; -1: none
  std::vector<std::pair<std::uint64_t, std::uint64_t>> stable;  // newest (seq, digest), few
};
// Who a slot was, for contributors of values and those who will be: they may have left the view.
using Names = std::vector<std::pair<std::uint8_t, PeerId>>;

struct Report {
  ViewId installed = 0;
  bool declared = false;  // the application said which tags carry state; absent ones carry none
  std::vector<TagReport> tags;
  std::vector<RoundReport> rounds;  // open ones
  Names names;                      // of everybody whose contribution is in `rounds`
};

struct ChunkPlan {
  enum class Kind : std::uint8_t { owner = 0, value = 1 } kind = Kind::owner;
  std::uint8_t owner = kNoSlot;
  SlotMask received = 0;      // owner: what it has
  std::uint64_t digest = 0;   // value
  ViewId born = 0;            // value
  SlotMask holders = 0;       // value: who has it; the lowest active one, or the lowest, sends it
  SlotMask contributors = 0;  // value
};
struct RoundPlan {
  std::uint32_t tag = 0;
  std::uint64_t seq = 0;
  RoundSpec spec;
  bool stable = false;  // some report calls it stable: complete as soon as all values are here
  std::vector<ChunkPlan> chunks;
  std::uint64_t digest = 0;  // of a stable round, from who has returned it; 0: not known
};
struct TagPlan {
  std::uint32_t tag = 0;
  std::int64_t stable = -1;  // last stable round
  std::uint64_t digest = 0;
};
struct Install {
  View view;
  FreezeId answers;
  SlotMask reported = 0;  // slots whose report the plan was made from
  std::vector<TagPlan> tags;
  std::vector<RoundPlan> rounds;
  Names names;  // of contributors in `rounds` that the reports name
};

// Bugs on purpose, so that tests can show that they would be found. Only builds with DT_PLANT can
// switch one on; in others the compiler removes every trace.
enum class Plant : std::uint8_t {
  none = 0,
  apply_before_stable = 1,  // a complete round is handed over without waiting for DONE
  counted_twice = 2,        // a contribution that comes again is added again
  value_forgotten = 3,      // a dead owner's chunk is done again although we have its result
  stale_frame = 4,          // frames of older views are taken
  waived_added = 5,         // a waived contribution that comes late is added after all
  value_kept = 6,           // a value that is not the plan's survives the INSTALL
  goes_on = 7               // a frozen peer goes on in its old view after its report
};

// What a void state covers. Not -1: it is not where round 0 goes on from either, and results held
// since must not make up for it.
constexpr std::int64_t kVoid = -2;

class Engine {
 public:
  Engine(PeerId self, EngineOptions options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // --- the caller's side
  // The next round of the tag; returns its sequence number. While frozen only the snapshot is
  // taken. An observer's round contributes nothing and yields the others' result.
  std::uint64_t begin(BeginArgs args, double now);
  // False while a view is lacking, more than `ahead` rounds of ours or one that we skip are open,
  // or missed results are not taken.
  bool may_begin(std::uint32_t tag, std::uint8_t ahead = 0) const;
  // True when the others run the next round with another specification: it waits for the view that
  // decides between them. Says so once in each view.
  bool disputes(std::uint32_t tag, const RoundSpec& spec);
  // The number `begin` would give: who holds the state after round next - 1 may begin.
  std::uint64_t next(std::uint32_t tag) const;
  // Of a round begun with a snapshot that was not whole: so many of its chunks are there now.
  void chunks_ready(std::uint32_t tag, std::uint64_t seq, std::uint32_t chunks, double now);
  // The others will never be there: SKIP. What has been counted stays.
  void abandon(std::uint32_t tag, std::uint64_t seq, double now);
  bool ready(std::uint32_t tag, std::uint64_t seq) const;
  RoundResult take_result(std::uint32_t tag, std::uint64_t seq);
  // Results of rounds that were completed for us before our next begin (observing, skipped),
  // oldest first; they must be taken before begin(tag).
  std::vector<std::uint64_t> missed(std::uint32_t tag) const;
  // State held: tag -> last round whose effect it contains, kVoid when it is void. Tags not named
  // carry no state. Results taken before and not in this state count as lost: say it again after
  // dropping one.
  void declare(const std::vector<std::pair<std::uint32_t, std::int64_t>>& covered);
  void set_covered(std::uint32_t tag, std::int64_t seq);

  // --- the network's side
  // Where results that we own are best written, when they go to others; null: anywhere.
  using Memory = std::function<std::shared_ptr<std::byte[]>(std::size_t bytes)>;
  void set_result_memory(Memory memory);
  // arrived: the payload is in memory already. If it may stay there, it is taken without a target,
  // and on_payload gets a place that is only read.
  Incoming on_header(PeerId from, const Header& header, double now, bool arrived = false);
  void on_payload(PeerId from, const Header& header, Incoming incoming, double now);
  bool next_frame(PeerId to, OutFrame& frame);
  bool has_frames(PeerId to) const;
  void on_link_reset(PeerId peer, double now);  // a stream broke and another is up: exchange HAVE
  void tick(double now);
  double next_deadline() const;  // of tick; infinity when none

  // --- the control plane's side
  Report freeze(FreezeId id);
  // False, and nothing changes, unless it answers the newest freeze seen here.
  bool install(const Install& install, double now);
  const View& view() const;
  bool frozen() const;
  std::vector<Event> take_events();
  // Seconds for which each peer's contributions alone were waited for here, as owner; so far.
  const std::map<PeerId, double>& held_up_s() const;

#ifdef DT_PLANT
  void plant(Plant bug);
#endif

  struct Impl;  // engine_impl.h, for the files that implement it

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace decotrain
