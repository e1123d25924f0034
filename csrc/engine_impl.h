// What Engine keeps, shared by the files that implement it: engine.cpp (callers, time),
// receive.cpp, send.cpp (frames) and views.cpp (freeze, install).
#pragma once

#include <array>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "engine.h"
#include "round.h"

namespace decotrain {

constexpr std::size_t kStableKept = 4;     // digests of stable rounds remembered, at least
constexpr std::uint8_t kCorruptAsked = 3;  // times a payload with a wrong digest is asked for again
constexpr std::size_t kParkedOverhead = 256;  // what a parked frame costs beside its payload

struct StableRound {
  std::uint64_t seq = 0;
  std::uint64_t digest = 0;
  std::uint64_t state = 0;
  ViewId view = 0;
};

struct Tag {
  std::uint64_t next = 0;      // the next `begin`; lower rounds are open or settled
  bool state = false;          // named by declare()
  std::int64_t applied = -1;   // as the application says
  std::int64_t run_first = 0;  // results of run_first..run_last were or are in our hands
  std::int64_t run_last = -1;
  std::map<std::uint64_t, Round> rounds;
  std::map<std::uint64_t, RoundResult> results;  // settled, not taken
  std::deque<StableRound> stable;                // newest last
  std::uint8_t ahead = 0;                        // most that a round of it was begun with
  std::array<double, kMaxPeers> weights{};       // of each slot's last contribution; 0: unknown
  // The last stable rounds of this view, for observers that have not got all their results.
  std::map<std::uint64_t, Round> closed;

  // As many may be open at another peer when the newest is settled here.
  std::size_t kept() const { return std::size_t{1} + ahead; }
  void remember(const StableRound& round);
  std::int64_t covered() const {
    return run_first <= applied + 1 && run_last > applied ? run_last : applied;
  }
};

std::size_t bytes_of(const RoundResult& result);  // what it costs while nobody takes it

// One thing to say to one peer; the frame is made when it is popped, and skipped if it is stale.
struct Outgoing {
  FrameType type = FrameType::open;
  bool skip = false;
  bool reply = false;
  std::uint32_t tag = 0;
  std::uint64_t seq = 0;
  std::uint32_t chunk = 0;
};

struct PeerQueue {
  std::deque<Outgoing> control;
  std::deque<Outgoing> results;
  std::deque<Outgoing> contributions;
  void clear();
  bool empty() const { return control.empty() && results.empty() && contributions.empty(); }
};

struct Engine::Impl {
  Impl(PeerId self_id, EngineOptions chosen) : self(self_id), options(chosen) {}

  // engine.cpp
  std::uint64_t begin(BeginArgs args, double now);
  void chunks_ready(std::uint32_t tag, std::uint64_t seq, std::uint32_t chunks, double now);
  void abandon(std::uint32_t tag, std::uint64_t seq, double now);
  void tick(double now);
  double next_deadline() const;
  void settle_all();
  void settle(Tag& tag, Round& round);
  void event(EventKind kind, const Round& round, PeerId peer, std::string detail);
  Tag* find_tag(std::uint32_t tag);
  const Tag* find_tag(std::uint32_t tag) const;
  Round* find_round(std::uint32_t tag, std::uint64_t seq);
  bool may_begin(std::uint32_t tag, std::uint8_t ahead) const;
  bool disputes(std::uint32_t tag, const RoundSpec& spec);
  void end(Round& round, Outcome outcome);
  void adopt_roles();
  const Member* member(PeerId peer) const;
  const Member* member_at(std::uint8_t slot) const;

  // receive.cpp
  Incoming on_header(PeerId from, const Header& header, bool arrived);
  void on_payload(PeerId from, const Header& header, Incoming incoming, double now);
  void deliver(Round& round, const Member& from, const Header& header, Incoming& incoming,
               double now);
  Round* hear(std::uint32_t tag, std::uint64_t seq, const char** why);
  bool follow(Tag& tag, std::uint64_t seq, std::uint8_t ahead);
  Incoming park_header(Round& round, const Header& header);
  void park(Round& round, PeerId from, const Header& header, Incoming incoming);
  void replay(Round& round, double now);
  bool same_spec(Round& round, const Member& from, const Header& header);
  Incoming admit_contribution(const Round& round, const Member& from, const Header& header) const;
  Incoming admit_result(const Round& round, const Member& from, const Header& header) const;
  bool corrupt(Round& round, const Member& from, const Header& header, const Incoming& incoming);
  void take_contribution(Round& round, const Member& from, const Header& header, Incoming& incoming,
                         double now);
  void take_result(Round& round, const Member& from, const Header& header, Incoming& incoming,
                   double now);
  void take_done(Round& round, const Member& from, const Header& header);
  Round* heard_of(const Member& from, const Header& header, const RoundSpec& spec, double now);
  void take_have(const Member& from, const Header& header, const Incoming& incoming, double now);
  void answer_closed(const Member& from, const Header& header);

  // rounds.cpp
  void open_round(Round& round, double now);
  void announce(Round& round);
  void synchronise(Round& round, double now);
  void say_skip(Round& round);
  void contribute_to_own(Round& round);
  void try_combine(Round& round, std::uint32_t chunk, double now);
  void try_combine_all(Round& round, double now);
  void combine_without_bad(Round& round, std::uint32_t chunk);
  void check_complete(Round& round, double now);
  void check_stable(Round& round);
  void name_diverged(Round& round);
  void waive_late(Round& round, double now);
  double weight_share(const Tag& tag, SlotMask in, SlotMask of) const;
  double late_at(const Round& round) const;
  void look_at_owners(Round& round, double now);
  void name_late(Round& round, SlotMask late, const char* detail);

  // send.cpp
  void say(std::uint8_t to, Outgoing what);
  void say_to_all(const Outgoing& what, SlotMask to);
  void offer_contribution(Round& round, std::uint32_t chunk);
  void offer_result(Round& round, std::uint32_t chunk, std::uint8_t to);
  void offer_result_to_all(Round& round, std::uint32_t chunk);
  void offer_all(Round& round, std::uint8_t to);
  bool takes_frames(const Round& round, std::uint8_t slot) const;
  bool next_frame(PeerId to, OutFrame& frame);
  bool make_frame(const Member& to, const Outgoing& what, OutFrame& frame);
  bool make_control(const Member& to, const Outgoing& what, Round& round, OutFrame& frame);
  bool make_chunk(const Member& to, const Outgoing& what, Round& round, OutFrame& frame);
  bool make_old_done(const Outgoing& what, OutFrame& frame);
  void on_link_reset(PeerId peer);

  // views.cpp
  Report freeze(FreezeId id);
  bool install(const Install& plan, double now);
  void install_tag(std::uint32_t id, Tag& tag, const TagPlan& plan, bool reported);
  void install_round(const RoundPlan& plan);
  bool install_chunk(Round& round, std::uint32_t chunk, const ChunkPlan& plan);
  static void set_aside(Round& round);
  void install_unplanned(Round& round, const TagPlan& plan);
  static void remember_stable(Tag& tag, const TagPlan& plan);
  void drop_stray(Tag& tag, std::int64_t stable);
  void adopt_role(Round& round, bool was_active, bool next);
  void resume(Round& round, double now);
  void leave_all();

  const PeerId self;
  const EngineOptions options;

  View view;
  // Who was active in which slot last, in any view we had: who has left may be in sums we learn of
  // only later.
  std::array<PeerId, kMaxPeers> names{};
  Roles roles;
  bool frozen = false;
  FreezeId newest_freeze;
  FreezeId answered;  // by the installed view

  Memory result_memory;

  bool declared = false;
  std::map<std::uint32_t, Tag> tags;
  std::vector<std::pair<std::uint32_t, std::uint64_t>> to_settle;
  std::array<PeerQueue, kMaxPeers> queues;
  std::size_t parked_bytes = 0;
  std::vector<Event> events;
  std::map<PeerId, double> held_up_s;  // of peers in the view
#ifdef DT_PLANT
  Plant plant = Plant::none;
  bool planted(Plant bug) const { return plant == bug; }
#else
  static constexpr bool planted(Plant) { return false; }
#endif
};

}  // namespace decotrain
