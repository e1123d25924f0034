// Engine, view changes: what FREEZE stops and reports, and how an INSTALL's plan becomes the state
// of every open round (docs/protocol.md, "View changes").
#include <algorithm>
#include <bit>
#include <cmath>
#include <set>
#include <stdexcept>

#include "engine_impl.h"

namespace decotrain {

using Impl = Engine::Impl;

namespace {

constexpr std::uint64_t kMaxPlanChunks = 1 << 20;
constexpr std::uint64_t kMaxSeq = std::uint64_t{1} << 62;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("install: ") + what);
}

Roles check_view(const View& view) {
  require(view.id != 0, "the view has no id");
  require(view.members.size() <= kMaxPeers, "too many members");
  Roles roles;
  std::set<PeerId> peers;
  int last = -1;
  for (const Member& one : view.members) {
    require(one.slot < kMaxPeers && one.slot > last, "slots are not ascending");
    require(one.peer != 0 && peers.insert(one.peer).second, "peer ids are not distinct");
    require(std::isfinite(one.share) && one.share >= 0.0 && one.share <= 1e9, "a share is bad");
    last = one.slot;
    roles.all |= bit(one.slot);
    if (one.active) roles.active |= bit(one.slot);
  }
  return roles;
}

void check_chunk(const ChunkPlan& chunk, const RoundPlan& round, const Roles& roles, ViewId view) {
  if (chunk.kind == ChunkPlan::Kind::owner) {
    const bool nobody = chunk.owner == kNoSlot && roles.active == 0;
    require(nobody || (roles.active & bit(chunk.owner)) != 0, "an owner is not active");
    return;
  }
  require(chunk.kind == ChunkPlan::Kind::value, "a chunk's kind is unknown");
  require((chunk.holders & ~roles.all) == 0, "a holder is no member");
  require(chunk.holders != 0 || round.stable, "a value has no holder");
  const bool older = chunk.born != 0 && chunk.born < view;
  require(older || chunk.holders == 0, "a value was not born in an older view");
}

// Everything an INSTALL says comes from the network: sizes, slots and numbers are checked here.
void check(const Install& plan) {
  const Roles roles = check_view(plan.view);
  require((plan.reported & ~roles.all) == 0, "a reporter is no member");
  SlotMask named = 0;
  for (const auto& [slot, peer] : plan.names) {
    require(peer != 0 && slot < kMaxPeers && (named & bit(slot)) == 0, "a name is bad");
    named |= bit(slot);
  }
  std::map<std::uint32_t, std::int64_t> tags;
  for (const TagPlan& tag : plan.tags) {
    const bool fresh = tags.insert({tag.tag, tag.stable}).second;
    require(tag.tag < kMaxTags && fresh, "a tag is bad or named twice");
    require(tag.stable >= -1 && tag.stable < static_cast<std::int64_t>(kMaxSeq), "a bad round");
  }
  std::set<std::pair<std::uint32_t, std::uint64_t>> rounds;
  std::uint64_t chunks = 0;
  for (const RoundPlan& round : plan.rounds) {
    const auto tag = tags.find(round.tag);
    require(tag != tags.end() && round.seq < kMaxSeq, "a bad round");
    const auto seq = static_cast<std::int64_t>(round.seq);
    require(round.stable == (seq <= tag->second), "a round and its tag disagree");
    require(seq <= tag->second + 2 + round.spec.ahead, "a round is too far ahead");
    require(rounds.insert({round.tag, round.seq}).second, "a round is named twice");
    require(*fault(round.spec) == '\0', fault(round.spec));
    require(round.chunks.size() == chunk_count(round.spec), "a wrong number of chunks");
    chunks += round.chunks.size();
    require(chunks <= kMaxPlanChunks, "too many chunks");
    for (const ChunkPlan& chunk : round.chunks) check_chunk(chunk, round, roles, plan.view.id);
  }
}

}  // namespace

Report Impl::freeze(FreezeId id) {
  // A FREEZE that the installed view has answered, or an older one, arrives late: it stops nothing.
  if (id > answered && id >= newest_freeze) {
    newest_freeze = id;
    frozen = !planted(Plant::goes_on);
    // What is stable is so for ever: observers may have the last of it while we are frozen.
    for (PeerQueue& queue : queues) {
      for (std::deque<Outgoing>* of : {&queue.control, &queue.results, &queue.contributions}) {
        std::erase_if(*of, [this](const Outgoing& what) {
          const Tag* const tag = find_tag(what.tag);
          return tag == nullptr || tag->closed.count(what.seq) == 0;
        });
      }
    }
  }
  Report report;
  SlotMask contributors = 0;
  report.installed = view.id;
  report.declared = declared;
  for (const auto& [tag_id, tag] : tags) {
    TagReport one;
    one.tag = tag_id;
    one.state = !declared || tag.state;
    one.covered = std::max(tag.covered(), std::int64_t{-1});
    for (const StableRound& stable : tag.stable) one.stable.emplace_back(stable.seq, stable.digest);
    report.tags.push_back(std::move(one));
    for (const auto& [seq, round] : tag.rounds) {
      if (!round.known || round.settled) continue;
      report.rounds.push_back(round.report());
      for (const ChunkReport& chunk : report.rounds.back().chunks) {
        contributors |= chunk.contributors | chunk.received;
      }
      for (std::size_t c = 0; planted(Plant::value_forgotten) && c < round.chunks.size(); ++c) {
        if (round.chunks[c].sender != roles.self) report.rounds.back().chunks[c].born = 0;
      }
    }
  }
  for (SlotMask left = contributors; left != 0; left &= left - 1) {
    const auto slot = static_cast<std::uint8_t>(std::countr_zero(left));
    if (names[slot] != 0) report.names.emplace_back(slot, names[slot]);
  }
  return report;
}

bool Impl::install(const Install& plan, double now) {
  check(plan);
  if (!frozen && !planted(Plant::goes_on)) return false;
  if (plan.answers != newest_freeze || plan.view.id <= view.id) return false;
  const bool was_active = roles.self_active();
  view = plan.view;
  for (const auto& [slot, peer] : plan.names) names[slot] = peer;
  for (const Member& member : view.members) {
    // A slot that an open round speaks of is given to nobody else: the newest name is right.
    if (member.active) names[member.slot] = member.peer;
  }
  adopt_roles();
  frozen = false;
  answered = plan.answers;
  std::erase_if(held_up_s, [&](const auto& entry) { return member(entry.first) == nullptr; });
  for (PeerQueue& queue : queues) queue.clear();
  if (roles.self == kNoSlot) {
    leave_all();
    return true;
  }
  // Before any round ends: its end looks at the next one, which nobody has spoken of in this view.
  for (auto& [id, tag] : tags) {
    for (std::size_t slot = 0; slot < tag.weights.size(); ++slot) {
      if ((roles.active >> slot & 1) == 0) tag.weights[slot] = 0.0;  // perhaps of another peer soon
    }
    for (auto& [seq, round] : tag.rounds) {
      round.done_from = 0;
      round.stable_by_plan = false;
      round.wanted.reset();
    }
  }
  std::map<std::uint32_t, TagPlan> tag_plans;
  for (const TagPlan& one : plan.tags) tag_plans[one.tag] = one;
  std::set<std::pair<std::uint32_t, std::uint64_t>> planned;
  for (const RoundPlan& one : plan.rounds) planned.insert({one.tag, one.seq});
  for (const auto& [id, one] : tag_plans) tags[id];
  for (auto& [id, tag] : tags) {
    const auto found = tag_plans.find(id);
    const TagPlan tag_plan = found == tag_plans.end() ? TagPlan{id, -1, 0} : found->second;
    tag_plans[id] = tag_plan;
    install_tag(id, tag, tag_plan, (plan.reported & bit(roles.self)) != 0);
    drop_stray(tag, tag_plan.stable);
    settle_all();
    for (auto& [seq, round] : tag.rounds) {
      if (planned.count({id, seq}) == 0) install_unplanned(round, tag_plan);
    }
  }
  for (const RoundPlan& one : plan.rounds) install_round(one);
  settle_all();
  for (auto& [id, tag] : tags) {
    tag.next = static_cast<std::uint64_t>(tag_plans[id].stable + 1);
    remember_stable(tag, tag_plans[id]);
    for (auto& [seq, round] : tag.rounds) {
      adopt_role(round, was_active, seq <= tag.next);
      if (round.begun || round.skips) tag.next = std::max(tag.next, seq + 1);
    }
    for (auto& [seq, round] : tag.rounds) resume(round, now);
  }
  return true;
}

// Our own history against the plan's: having returned a round that the others redo, or with other
// bits, makes our branch void (V11).
void Impl::install_tag(std::uint32_t id, Tag& tag, const TagPlan& plan, bool reported) {
  tag.closed.clear();
  if (tag.stable.empty()) return;
  const StableRound& last = tag.stable.back();
  const auto seq = static_cast<std::int64_t>(last.seq);
  const bool differs =
      seq == plan.stable && plan.digest != 0 && last.digest != 0 && plan.digest != last.digest;
  if (seq <= plan.stable && !differs) return;
  // A plan made from our report continues the state we have applied, even if it goes back behind
  // rounds we know (a new generation).
  if (!reported || differs || tag.applied > plan.stable) {
    tag.applied = kVoid;
    events.push_back({EventKind::diverged, id, last.seq, self,
                      "we returned a round that the view does not know: our state is void"});
  }
  tag.run_first = 0;
  tag.run_last = -1;
  tag.stable.clear();
  std::erase_if(tag.results, [](const auto& one) { return !one.second.begun; });
  for (auto& [number, result] : tag.results) {
    RoundResult lost;
    lost.tag = id;
    lost.seq = number;
    lost.spec = result.spec;
    lost.outcome = Outcome::lost;
    result = std::move(lost);
  }
}

// What the plan knows to be stable is remembered, also by who has not got it: numbers of rounds
// must not be given twice when all who had it are gone.
void Impl::remember_stable(Tag& tag, const TagPlan& plan) {
  if (plan.stable < 0) return;
  const auto seq = static_cast<std::uint64_t>(plan.stable);
  if (!tag.stable.empty() && tag.stable.back().seq >= seq) return;
  tag.remember({seq, plan.digest, 0, 0});
}

// What we have begun goes on only where it follows, without a gap, on the last stable round: other
// numbers are of a branch that is void.
void Impl::drop_stray(Tag& tag, std::int64_t stable) {
  auto following = static_cast<std::uint64_t>(stable + 1);
  for (auto& [seq, round] : tag.rounds) {
    if (!round.begun || static_cast<std::int64_t>(seq) <= stable) continue;
    if (seq == following) {
      ++following;
    } else {
      end(round, Outcome::lost);
    }
  }
}

// A round of ours that the plan does not name: settled by the others, or still to be run.
void Impl::install_unplanned(Round& round, const TagPlan& plan) {
  const auto seq = static_cast<std::int64_t>(round.seq);
  // Only rounds right after the last stable one can be begun now.
  if (seq <= plan.stable || seq > plan.stable + 1 + round.spec.ahead) {
    const bool proven = round.complete && seq == plan.stable && round.digest == plan.digest;
    end(round, proven ? Outcome::stable : Outcome::lost);
    return;
  }
  if (!round.begun) {
    round.settled = true;  // nobody alive has begun it: it is heard of again when someone does
    to_settle.emplace_back(round.tag, round.seq);
    return;
  }
  set_aside(round);
}

// As if it had been begun in no view yet.
void Impl::set_aside(Round& round) {
  round.open = false;
  round.planned = false;
  round.stable_by_plan = false;
  round.complete = false;
  round.skipped = 0;
  round.chunks.clear();
  round.results.reset();  // whoever still writes to it keeps it
}

void Impl::install_round(const RoundPlan& plan) {
  Tag& tag = tags[plan.tag];
  const auto seq = static_cast<std::int64_t>(plan.seq);
  if (seq >= tag.run_first && seq <= tag.run_last) return;  // stable and in our hands
  const auto found = tag.rounds.find(plan.seq);
  const bool lacking = found == tag.rounds.end() || found->second.missing > 0;
  if (plan.stable && seq <= tag.applied && lacking) {  // our state has its effect: no need of it
    if (found != tag.rounds.end()) end(found->second, Outcome::lost);
    return;
  }
  Round& round = tag.rounds[plan.seq];
  round.tag = plan.tag;
  round.seq = plan.seq;
  if (round.known && round.spec != plan.spec) {
    if (round.begun && !plan.stable) {
      // We began while the plan was made. In this view the others' frames do not fit ours.
      set_aside(round);
      return;
    }
    if (round.begun) {
      event(EventKind::spec_mismatch, round, self, "the view runs it with another specification");
      end(round, Outcome::lost);
      return;
    }
    set_aside(round);
    round.known = false;
  }
  if (!round.known) round.set_spec(plan.spec);
  if (round.chunks.empty()) {
    round.chunks.resize(plan.chunks.size());
    round.missing = static_cast<std::uint32_t>(plan.chunks.size());
  }
  round.planned = true;
  round.stable_by_plan = plan.stable;
  round.plan_digest = plan.digest;
  round.complete = false;
  round.peers = names;
  // Values of a stable round count only with its digest: a report may hold values of a branch that
  // was redone and closed since.
  bool possible = !plan.stable || plan.digest != 0;
  for (std::uint32_t c = 0; c < round.chunks.size(); ++c) {
    possible = install_chunk(round, c, plan.chunks[c]) && possible;
  }
  if (!possible) end(round, Outcome::lost);
}

// False when the chunk's value is the view's and nobody has it any more. A value that is not the
// plan's goes; one that is may stay even if our report was not heard (V3: the digest decides).
bool Impl::install_chunk(Round& round, std::uint32_t c, const ChunkPlan& plan) {
  Chunk& chunk = round.chunks[c];
  const SlotMask own = bit(roles.self);
  chunk.result_queued = 0;
  chunk.contribution_queued = false;
  chunk.grace_at = kNever;
  chunk.sender = kNoSlot;
  chunk.holders = 0;
  chunk.owner_has_ours = false;
  const bool value = plan.kind == ChunkPlan::Kind::value;
  if (!value || chunk.digest != plan.digest || chunk.contributors != plan.contributors) {
    if (planted(Plant::value_kept) && chunk.held) return true;
    round.drop_value(c);
  }
  chunk.fixed = value;
  chunk.owner = value ? kNoSlot : round.home(c, roles, plan.owner);
  if (chunk.owner != roles.self) {
    chunk.contributions.clear();
    chunk.received = 0;
    chunk.waived = 0;
  }
  if (value) {
    chunk.digest = plan.digest;
    chunk.born = plan.born;
    chunk.contributors = plan.contributors;
    chunk.holders = plan.holders;
    if (plan.holders != 0) {  // an active holder before an observer, which may be a slow peer
      const SlotMask able = plan.holders & roles.active;
      chunk.sender = static_cast<std::uint8_t>(std::countr_zero(able != 0 ? able : plan.holders));
    }
    if (!chunk.held && (plan.holders & own) != 0) round.parked_lost = true;
    return chunk.held || plan.holders != 0;
  }
  chunk.digest = 0;
  chunk.born = 0;
  chunk.contributors = 0;
  if (chunk.owner == roles.self) {
    chunk.received = 0;
    for (const HeldContribution& one : chunk.contributions) chunk.received |= bit(one.slot);
    if ((plan.received & ~chunk.received) != 0) round.parked_lost = true;  // ask again
  } else {
    chunk.owner_has_ours = (plan.received & own) != 0;
  }
  return true;
}

// A newly active peer has not computed from the view's state: it skips what is open (V5), up to the
// first round that nobody alive knows. It begins that one, and then those after it.
void Impl::adopt_role(Round& round, bool was_active, bool next) {
  if (!roles.self_active()) {
    round.contributes = false;
    round.skips = false;
    round.state_digest = 0;
    return;
  }
  if (!was_active) {
    round.contributes = false;
    round.state_digest = 0;
  }
  // What was skipped and not begun may have a gap before it now.
  if (!was_active || (round.skips && !round.begun)) {
    round.skips = (round.planned || round.begun) && next;
  }
}

void Impl::resume(Round& round, double now) {
  parked_bytes -= round.parked_bytes;
  round.parked_bytes = 0;
  round.parked.clear();
  round.opened = 0;
  round.done_at = kNever;
  round.look_at = kNever;
  round.next_grace = kNever;
  round.named_late = 0;
  round.named_spec = 0;
  round.named_diverged = false;
  round.open = false;
  if (!round.known) return;
  if (round.begun || round.skips || !roles.self_active() || options.grace_s > 0.0) {
    open_round(round, now);
  }
}

void Impl::leave_all() {
  for (auto& [id, tag] : tags) {
    tag.closed.clear();
    for (auto& [seq, round] : tag.rounds) end(round, Outcome::left);
  }
}

}  // namespace decotrain
