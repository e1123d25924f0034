// Engine's face: the caller's calls, time, and what happens to a round when it ends.
#include "engine.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "engine_impl.h"

namespace decotrain {

using Impl = Engine::Impl;

Tag* Impl::find_tag(std::uint32_t tag) {
  const auto found = tags.find(tag);
  return found == tags.end() ? nullptr : &found->second;
}

const Tag* Impl::find_tag(std::uint32_t tag) const {
  const auto found = tags.find(tag);
  return found == tags.end() ? nullptr : &found->second;
}

Round* Impl::find_round(std::uint32_t tag, std::uint64_t seq) {
  Tag* const of = find_tag(tag);
  if (of == nullptr) return nullptr;
  const auto found = of->rounds.find(seq);
  return found == of->rounds.end() ? nullptr : &found->second;
}

const Member* Impl::member(PeerId peer) const {
  for (const Member& one : view.members) {
    if (one.peer == peer) return &one;
  }
  return nullptr;
}

const Member* Impl::member_at(std::uint8_t slot) const {
  for (const Member& one : view.members) {
    if (one.slot == slot) return &one;
  }
  return nullptr;
}

void Impl::adopt_roles() {
  roles = Roles{};
  for (const Member& one : view.members) {
    roles.all |= bit(one.slot);
    if (one.active) roles.active |= bit(one.slot);
    if (one.peer == self) roles.self = one.slot;
  }
}

void Impl::event(EventKind kind, const Round& round, PeerId peer, std::string detail) {
  events.push_back({kind, round.tag, round.seq, peer, std::move(detail)});
}

bool Impl::may_begin(std::uint32_t tag, std::uint8_t ahead) const {
  if (view.id == 0 || roles.self == kNoSlot) return false;
  const Tag* const of = find_tag(tag);
  if (of == nullptr) return true;
  std::size_t open = 0;
  for (const auto& [seq, round] : of->rounds) {
    if (seq >= of->next) break;
    if (!round.begun) return false;  // skipped: what follows is computed from its result
    ++open;
  }
  if (open > ahead) return false;
  return std::none_of(of->results.begin(), of->results.end(),
                      [](const auto& one) { return !one.second.begun; });
}

bool Impl::disputes(std::uint32_t tag, const RoundSpec& spec) {
  Tag* const of = find_tag(tag);
  if (of == nullptr) return false;
  const auto found = of->rounds.find(of->next);
  if (found == of->rounds.end()) return false;
  Round& round = found->second;
  if (!round.known || round.spec == spec || !(round.open || round.planned)) return false;
  if (!round.wanted) event(EventKind::spec_mismatch, round, self, "others run it differently");
  round.wanted = spec;
  return true;
}

std::uint64_t Impl::begin(BeginArgs args, double now) {
  if (args.tag >= kMaxTags) throw std::invalid_argument("tag out of range");
  if (const char* why = fault(args.spec); *why != '\0') throw std::invalid_argument(why);
  if (!std::isfinite(args.weight) || args.weight < 0.0) {
    throw std::invalid_argument("the weight must be finite and not negative");
  }
  if (args.owner_residual.values != nullptr &&
      (args.spec.op == Op::collect || args.spec.ahead > 0)) {
    // A round ahead would add what the one before it has added already.
    throw std::invalid_argument("an owner's residual is for reductions, one round at a time");
  }
  if (args.spec.op == Op::collect && args.collect_bytes > args.spec.chunk_elements) {
    throw std::invalid_argument("more bytes than the collect round allows a peer");
  }
  if (!may_begin(args.tag, args.spec.ahead)) {
    throw std::logic_error("no view, or an earlier round of the tag is open or not taken");
  }
  Tag& tag = tags[args.tag];
  const std::uint64_t seq = tag.next;
  Round& round = tag.rounds[seq];
  round.tag = args.tag;
  round.seq = seq;
  if (round.known && round.spec != args.spec) {
    if (round.open || round.planned) {
      throw std::invalid_argument("the others run this round with another specification");
    }
    for (const Member& one : view.members) {
      if ((round.opened & bit(one.slot)) == 0) continue;
      event(EventKind::spec_mismatch, round, one.peer, "has begun with another specification");
    }
    round.named_spec = round.opened;
    round.opened = 0;
    round.known = false;
  }
  if (!round.known) round.set_spec(args.spec);
  round.begun = true;
  if (roles.self < kMaxPeers) round.arrived[roles.self] = now;
  round.contributes = roles.self_active() && args.weight > 0.0;
  round.skips = roles.self_active() && !round.contributes;
  round.weight = args.weight;
  round.state_digest = roles.self_active() ? args.state_digest : 0;
  round.snapshot = std::move(args.snapshot);
  round.owner_residual = std::move(args.owner_residual);
  round.collect_bytes = args.collect_bytes;
  tag.next = seq + 1;
  if (!frozen) {
    if (round.open) {
      synchronise(round, now);
    } else {
      open_round(round, now);
    }
  }
  settle_all();
  return seq;
}

void Impl::chunks_ready(std::uint32_t tag, std::uint64_t seq, std::uint32_t chunks, double now) {
  Round* const round = find_round(tag, seq);
  if (round == nullptr || round->settled || chunks <= round->snapshot.ready) return;
  const std::uint32_t before = std::exchange(round->snapshot.ready, chunks);
  if (frozen || !round->open) return;
  contribute_to_own(*round);
  const auto end = std::min(chunks, static_cast<std::uint32_t>(round->chunks.size()));
  for (std::uint32_t c = before; c < end; ++c) {
    offer_contribution(*round, c);
    try_combine(*round, c, now);
  }
  check_complete(*round, now);
}

void Impl::abandon(std::uint32_t tag, std::uint64_t seq, double now) {
  Round* const round = find_round(tag, seq);
  if (round == nullptr || round->settled || !round->contributes) return;
  round->contributes = false;
  round->skips = true;
  if (frozen || !round->open) return;
  say_skip(*round);
  try_combine_all(*round, now);
}

void Impl::end(Round& round, Outcome outcome) {
  if (round.settled) return;
  round.settled = true;
  Tag& tag = tags[round.tag];
  if (outcome == Outcome::stable) {
    tag.ahead = std::max(tag.ahead, round.spec.ahead);
    tag.remember({round.seq, round.digest, round.state_digest, view.id});
    const auto seq = static_cast<std::int64_t>(round.seq);
    if (seq != tag.run_last + 1) tag.run_first = seq;
    tag.run_last = seq;
    const auto [slot, seconds] = round.slowest();
    if (const Member* one = member_at(slot)) held_up_s[one->peer] += seconds;
  }
  tag.next = std::max(tag.next, round.seq + 1);
  if (outcome == Outcome::stable || round.begun) {
    // Our caller may still wait for this number from a branch that became void.
    const bool waited = tag.results.count(round.seq) != 0;
    RoundResult& result = tag.results[round.seq];
    result = round.result(outcome, view.id, roles.self);
    result.begun = round.begun || waited;
    for (Chunk& chunk : round.chunks) chunk.lost.reset();  // the result has it, a closed round not
    if (outcome == Outcome::stable) event(EventKind::stable, round, 0, "");
  }
  to_settle.emplace_back(round.tag, round.seq);
  const auto next = tag.rounds.upper_bound(round.seq);
  if (next != tag.rounds.end()) check_stable(next->second);
}

void Tag::remember(const StableRound& round) {
  // A plan names the last stable round before those before it have ended here.
  const auto at =
      std::lower_bound(stable.begin(), stable.end(), round.seq,
                       [](const StableRound& one, std::uint64_t seq) { return one.seq < seq; });
  if (at != stable.end() && at->seq == round.seq) {
    *at = round;
  } else {
    stable.insert(at, round);
  }
  if (stable.size() > std::max(kStableKept, 1 + kept())) stable.pop_front();
}

// What a result that nobody has taken costs.
std::size_t bytes_of(const RoundResult& result) {
  std::size_t bytes = sizeof result;
  for (const std::uint32_t chunk : result.chunk_bytes) bytes += chunk + sizeof(void*);
  return bytes;
}

// Rounds are erased here only, when no one further up the stack can hold one.
void Impl::settle_all() {
  for (const auto& [tag_id, seq] : to_settle) {
    Tag& tag = tags[tag_id];
    const auto found = tag.rounds.find(seq);
    if (found == tag.rounds.end() || !found->second.settled) continue;
    Round& round = found->second;
    parked_bytes -= round.parked_bytes;
    round.snapshot = {};
    round.parked.clear();
    // Who lacks results of it: observers, and whom the plan told that it is stable.
    const bool wanted = round.stable_by_plan || (roles.all & ~roles.active) != 0;
    if (round.complete && wanted) tag.closed.insert_or_assign(seq, std::move(round));
    while (tag.closed.size() > tag.kept()) tag.closed.erase(tag.closed.begin());
    tag.rounds.erase(found);
    // A plan may end as many rounds at once as can be open here: those that we skip as newly
    // active, those that others have begun since, and one that opened by itself.
    const std::size_t most = std::max(options.missed_rounds, 2 * tag.kept() + 1);
    std::size_t missed = 0, missed_bytes = 0;
    for (const auto& [number, result] : tag.results) {
      if (result.begun) continue;
      ++missed;
      missed_bytes += bytes_of(result);
    }
    for (auto one = tag.results.begin(); missed > most && missed_bytes > options.missed_bytes;) {
      if (one->second.begun) {
        ++one;
        continue;
      }
      missed_bytes -= bytes_of(one->second);
      tag.run_first = std::max(tag.run_first, static_cast<std::int64_t>(one->first) + 1);
      one = tag.results.erase(one);
      --missed;
    }
  }
  to_settle.clear();
}

void Impl::tick(double now) {
  for (auto& [id, tag] : tags) {
    for (auto& [seq, round] : tag.rounds) {
      if (frozen || !round.open || round.settled) continue;
      if (round.next_grace <= now) waive_late(round, now);
      if (round.look_at <= now) look_at_owners(round, now);
      if (late_at(round) <= now) name_late(round, ~round.done_from, "");
    }
  }
  settle_all();
}

double Impl::next_deadline() const {
  double next = kNever;
  if (frozen) return next;
  for (const auto& [id, tag] : tags) {
    for (const auto& [seq, round] : tag.rounds) {
      if (!round.open || round.settled) continue;
      next = std::min({next, round.next_grace, round.look_at});
      const SlotMask late = roles.active & ~round.done_from & ~round.named_late;
      if (late != 0) next = std::min(next, late_at(round));
    }
  }
  return next;
}

Engine::Engine(PeerId self, EngineOptions options) : impl_(std::make_unique<Impl>(self, options)) {}
Engine::~Engine() = default;

std::uint64_t Engine::begin(BeginArgs args, double now) {
  return impl_->begin(std::move(args), now);
}

void Engine::chunks_ready(std::uint32_t tag, std::uint64_t seq, std::uint32_t chunks, double now) {
  impl_->chunks_ready(tag, seq, chunks, now);
  impl_->settle_all();
}

void Engine::abandon(std::uint32_t tag, std::uint64_t seq, double now) {
  impl_->abandon(tag, seq, now);
  impl_->settle_all();
}

bool Engine::may_begin(std::uint32_t tag, std::uint8_t ahead) const {
  return impl_->may_begin(tag, ahead);
}

bool Engine::disputes(std::uint32_t tag, const RoundSpec& spec) {
  return impl_->disputes(tag, spec);
}

std::uint64_t Engine::next(std::uint32_t tag) const {
  const Tag* const of = impl_->find_tag(tag);
  return of == nullptr ? 0 : of->next;
}

const std::map<PeerId, double>& Engine::held_up_s() const { return impl_->held_up_s; }

bool Engine::ready(std::uint32_t tag, std::uint64_t seq) const {
  const Tag* const of = impl_->find_tag(tag);
  return of != nullptr && of->results.count(seq) != 0;
}

RoundResult Engine::take_result(std::uint32_t tag, std::uint64_t seq) {
  Tag* const of = impl_->find_tag(tag);
  if (of == nullptr || of->results.count(seq) == 0) {
    throw std::logic_error("this round has no result to take");
  }
  RoundResult result = std::move(of->results[seq]);
  of->results.erase(seq);
  return result;
}

std::vector<std::uint64_t> Engine::missed(std::uint32_t tag) const {
  std::vector<std::uint64_t> seqs;
  if (const Tag* const of = impl_->find_tag(tag); of != nullptr) {
    for (const auto& [seq, result] : of->results) {
      if (!result.begun) seqs.push_back(seq);
    }
  }
  return seqs;
}

void Engine::declare(const std::vector<std::pair<std::uint32_t, std::int64_t>>& covered) {
  for (const auto& [tag, seq] : covered) {
    if (tag >= kMaxTags) throw std::invalid_argument("tag out of range");
  }
  impl_->declared = true;
  for (auto& [id, tag] : impl_->tags) tag.state = false;
  for (const auto& [id, seq] : covered) {
    Tag& tag = impl_->tags[id];
    tag.state = true;
    tag.applied = seq;
    // Results handed over before count no more: the application says what it has.
    tag.run_first = seq + 1;
    tag.run_last = seq;
    for (const auto& [number, result] : tag.results) {
      const bool next = static_cast<std::int64_t>(number) == tag.run_last + 1;
      if (next && result.outcome == Outcome::stable) ++tag.run_last;
    }
  }
}

void Engine::set_covered(std::uint32_t tag, std::int64_t seq) {
  if (tag >= kMaxTags) throw std::invalid_argument("tag out of range");
  impl_->tags[tag].applied = seq;
}

void Engine::set_result_memory(Memory memory) { impl_->result_memory = std::move(memory); }

Incoming Engine::on_header(PeerId from, const Header& header, double /*now*/, bool arrived) {
  Incoming incoming = impl_->on_header(from, header, arrived);
  impl_->settle_all();
  return incoming;
}

void Engine::on_payload(PeerId from, const Header& header, Incoming incoming, double now) {
  impl_->on_payload(from, header, std::move(incoming), now);
  impl_->settle_all();
}

bool Engine::next_frame(PeerId to, OutFrame& frame) { return impl_->next_frame(to, frame); }

bool Engine::has_frames(PeerId to) const {
  const Member* const one = impl_->member(to);
  return one != nullptr && !impl_->queues[one->slot].empty();
}

void Engine::on_link_reset(PeerId peer, double) { impl_->on_link_reset(peer); }

void Engine::tick(double now) { impl_->tick(now); }

double Engine::next_deadline() const { return impl_->next_deadline(); }

Report Engine::freeze(FreezeId id) { return impl_->freeze(id); }

bool Engine::install(const Install& plan, double now) {
  const bool done = impl_->install(plan, now);
  impl_->settle_all();
  return done;
}

const View& Engine::view() const { return impl_->view; }

bool Engine::frozen() const { return impl_->frozen; }

#ifdef DT_PLANT
void Engine::plant(Plant bug) { impl_->plant = bug; }
#endif

std::vector<Event> Engine::take_events() { return std::exchange(impl_->events, {}); }

}  // namespace decotrain
