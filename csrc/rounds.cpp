// Engine, the life of a round in one view: open, contribute, combine, complete, agree.
#include <algorithm>
#include <bit>
#include <cstdio>

#include "engine_impl.h"

namespace decotrain {

using Impl = Engine::Impl;

namespace {

constexpr double kLooks = 4.0;  // at owners that may be late, in each bound

}  // namespace

void Impl::open_round(Round& round, double now) {
  round.open = true;
  round.opened_at = now;
  round.few_at = kNever;
  round.look_at = options.done_bound_s > 0.0 ? now + options.done_bound_s / kLooks : kNever;
  if (!round.planned) round.lay_out_fresh(view, roles);
  announce(round);
  synchronise(round, now);
  replay(round, now);
}

// Large rounds wait for this; small ones need it only where the specification is not known.
void Impl::announce(Round& round) {
  const bool everyone = !round.eager() || options.grace_s > 0.0 || round.parked_lost;
  const SlotMask to = everyone ? roles.all : roles.all & ~roles.active;
  const FrameType type = round.parked_lost ? FrameType::have : FrameType::open;
  round.parked_lost = false;
  say_to_all({.type = type, .tag = round.tag, .seq = round.seq}, to);
}

// Does and says everything that follows from what is known now; doing it twice does no harm.
void Impl::synchronise(Round& round, double now) {
  if (round.skips) say_skip(round);
  contribute_to_own(round);
  for (std::uint32_t c = 0; c < round.chunks.size(); ++c) {
    offer_contribution(round, c);
    offer_result_to_all(round, c);
  }
  try_combine_all(round, now);
}

void Impl::say_skip(Round& round) {
  round.skipped |= bit(roles.self);
  SlotMask owners = 0;
  for (const Chunk& chunk : round.chunks) {
    if (!chunk.held) owners |= bit(chunk.owner);
  }
  say_to_all({.type = FrameType::contribution, .skip = true, .tag = round.tag, .seq = round.seq},
             owners);
}

void Impl::contribute_to_own(Round& round) {
  if (!round.contributes) return;
  const SlotMask own = bit(roles.self);
  tags[round.tag].weights[roles.self] = round.weight;
  for (std::uint32_t c = 0; c < round.chunks.size(); ++c) {
    Chunk& chunk = round.chunks[c];
    const bool ours_to_give =
        round.spec.op != Op::collect || static_cast<std::uint8_t>(c) == roles.self;
    if (chunk.owner != roles.self || chunk.held || !ours_to_give || c >= round.snapshot.ready ||
        ((chunk.received | chunk.waived) & own) != 0) {
      continue;
    }
    chunk.received |= own;
    chunk.contributions.push_back(
        {roles.self, round.weight, round.contribution(c), round.snapshot.keep});
  }
}

void Impl::try_combine(Round& round, std::uint32_t c, double now) {
  Chunk& chunk = round.chunks[c];
  if (chunk.owner != roles.self || chunk.held || chunk.fixed || !round.open || round.settled) {
    return;
  }
  const SlotMask required = round.required(c, roles);
  const SlotMask in = required & (chunk.received | chunk.waived | round.skipped);
  if (in != required) {
    if (options.grace_s > 0.0 && chunk.grace_at == kNever &&
        weight_share(tags[round.tag], in, required) >= options.quorum) {
      chunk.grace_at = now + options.grace_s;
      round.next_grace = std::min(round.next_grace, chunk.grace_at);
    }
    return;
  }
  if (!round.combine_chunk(c, roles, view.id, result_memory)) combine_without_bad(round, c);
  offer_result_to_all(round, c);
}

// What the peers `in` weigh, of all. A peer weighs what it did the last time: what it will give is
// not known before it is in. Who was not heard of yet weighs as much as the others on average.
double Impl::weight_share(const Tag& tag, SlotMask in, SlotMask of) const {
  double known = 0.0;
  int count = 0;
  for (SlotMask left = of; left != 0; left &= left - 1) {
    const double weight = tag.weights[std::countr_zero(left)];
    known += weight;
    count += weight > 0.0 ? 1 : 0;
  }
  const double usual = count > 0 ? known / count : 1.0;
  double there = 0.0;
  double all = 0.0;
  for (SlotMask left = of; left != 0; left &= left - 1) {
    const int slot = std::countr_zero(left);
    const double weight = tag.weights[slot] > 0.0 ? tag.weights[slot] : usual;
    all += weight;
    there += (in & bit(static_cast<std::uint8_t>(slot))) != 0 ? weight : 0.0;
  }
  return there / all;
}

// Contributions of plain floats are looked at one by one only when their sum is not finite: a NaN
// or an infinity in one of them always shows there.
void Impl::combine_without_bad(Round& round, std::uint32_t c) {
  const SlotMask bad = round.drop_not_finite(c);
  for (const Member& one : view.members) {
    if ((bad & bit(one.slot)) == 0) continue;
    event(EventKind::refused, round, one.peer, "chunk " + std::to_string(c) + " is not finite");
  }
  if (bad != 0 && round.combine_chunk(c, roles, view.id, result_memory)) return;
  round.set_empty(c, view.id);
  event(EventKind::refused, round, self,
        "the combined value of chunk " + std::to_string(c) + " is not finite: left empty");
}

void Impl::try_combine_all(Round& round, double now) {
  for (std::uint32_t c = 0; c < round.chunks.size(); ++c) try_combine(round, c, now);
  check_complete(round, now);
}

void Impl::check_complete(Round& round, double now) {
  if (!round.open || round.missing > 0 || round.complete) return;
  round.complete = true;
  round.digest = round.compute_digest();
  if (roles.self_active()) {
    round.done_from |= bit(roles.self);
    round.done[roles.self] = {round.digest, round.state_digest};
    round.done_at = now;
    say_to_all({.type = FrameType::done, .tag = round.tag, .seq = round.seq}, roles.all);
  }
  check_stable(round);
}

void Impl::check_stable(Round& round) {
  if (!round.complete || round.settled) return;
  // Rounds of a tag end in order: a result is of no use before the one that it follows.
  for (const auto& [seq, other] : tags[round.tag].rounds) {
    if (seq < round.seq && !other.settled) return;
  }
  if (planted(Plant::apply_before_stable)) {
    end(round, Outcome::stable);
    return;
  }
  if (round.stable_by_plan) {
    end(round, round.digest == round.plan_digest ? Outcome::stable : Outcome::lost);
    return;
  }
  if (roles.active == 0 || (roles.active & ~round.done_from) != 0) return;
  bool equal = true;
  std::uint64_t state = round.begun ? round.state_digest : 0;
  for (SlotMask left = roles.active; left != 0; left &= left - 1) {
    const DoneSaid& said = round.done[static_cast<std::size_t>(std::countr_zero(left))];
    equal = equal && said.digest == round.digest;
    if (state == 0) state = said.state;
    equal = equal && (said.state == 0 || said.state == state);
  }
  if (equal) {
    end(round, Outcome::stable);
  } else {
    name_diverged(round);
  }
}

// One event for each peer outside the majority; one with peer 0 when there is none. All active
// peers see the same DONEs and so name the same peers.
void Impl::name_diverged(Round& round) {
  if (round.named_diverged) return;
  round.named_diverged = true;
  std::string detail;
  std::map<std::pair<std::uint64_t, std::uint64_t>, SlotMask> camps;
  for (SlotMask left = roles.active; left != 0; left &= left - 1) {
    const auto slot = static_cast<std::uint8_t>(std::countr_zero(left));
    const DoneSaid& said = round.done[slot];
    camps[{said.digest, said.state}] |= bit(slot);
    char text[64];
    std::snprintf(text, sizeof text, "%s%u=%016llx/%016llx", detail.empty() ? "" : ",",
                  static_cast<unsigned>(slot), static_cast<unsigned long long>(said.digest),
                  static_cast<unsigned long long>(said.state));
    detail += text;
  }
  SlotMask majority = 0;
  for (const auto& [said, camp] : camps) {
    if (2 * std::popcount(camp) > std::popcount(roles.active)) majority = camp;
  }
  if (majority == 0) event(EventKind::diverged, round, 0, detail);
  for (const Member& one : view.members) {
    if (majority != 0 && one.active && (majority & bit(one.slot)) == 0) {
      event(EventKind::diverged, round, one.peer, detail);
    }
  }
}

// When who has not said DONE is late: two bounds after our own, and not before it has had twice our
// time, so that on slow links nobody is late for being a little slower. Two, because it may itself
// wait for an owner's results, and names that owner sooner.
double Impl::late_at(const Round& round) const {
  if (options.done_bound_s <= 0.0) return kNever;
  return round.done_at + std::max(2.0 * options.done_bound_s, round.done_at - round.opened_at);
}

void Impl::name_late(Round& round, SlotMask late, const char* detail) {
  late &= roles.active & ~round.named_late;
  round.named_late |= late;
  for (const Member& one : view.members) {
    if ((late & bit(one.slot)) != 0) event(EventKind::late_done, round, one.peer, detail);
  }
}

// Without its results nobody gets to say DONE. When most have sent all of theirs, the few that have
// not are given as long again.
void Impl::look_at_owners(Round& round, double now) {
  round.look_at = round.complete ? kNever : now + options.done_bound_s / kLooks;
  SlotMask lacking = 0;
  for (const Chunk& chunk : round.chunks) {
    if (!chunk.held) lacking |= bit(chunk.fixed ? chunk.sender : chunk.owner);
  }
  lacking &= ~bit(roles.self);
  if (lacking == 0 || 2 * std::popcount(lacking) >= std::popcount(roles.active)) {
    round.few_at = kNever;
    return;
  }
  round.few_at = std::min(round.few_at, now);
  const double patience = std::max(options.done_bound_s, round.few_at - round.opened_at);
  if (now - round.few_at >= patience) name_late(round, lacking, "its results are late");
}

void Impl::waive_late(Round& round, double now) {
  round.next_grace = kNever;
  for (std::uint32_t c = 0; c < round.chunks.size(); ++c) {
    Chunk& chunk = round.chunks[c];
    if (chunk.held || chunk.owner != roles.self) continue;
    if (chunk.grace_at > now) {
      round.next_grace = std::min(round.next_grace, chunk.grace_at);
      continue;
    }
    const SlotMask late =
        round.required(c, roles) & ~(chunk.received | chunk.waived | round.skipped);
    chunk.waived |= late;
    for (const Member& one : view.members) {
      if ((late & ~round.named_waived & bit(one.slot)) == 0) continue;
      event(EventKind::waived, round, one.peer, "");
    }
    round.named_waived |= late;
    try_combine(round, c, now);
  }
  check_complete(round, now);
}

}  // namespace decotrain
