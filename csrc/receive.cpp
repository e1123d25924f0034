// Engine, receiving: where a frame's payload goes, and what a whole frame changes.
//
// Every check is made twice where a payload lies between: the view, the round and the chunk may
// have moved on while the bytes came in.
#include <algorithm>
#include <bit>
#include <cmath>

#include "buffers.h"
#include "engine_impl.h"

namespace decotrain {

using Impl = Engine::Impl;

namespace {

constexpr std::size_t kMaxHaveBytes = kSpecBytes + std::size_t{2} * ((kMaxChunks + 7) / 8);

Incoming dropped(const char* why) { return {Accept::drop, nullptr, nullptr, why}; }
Incoming refused(const char* why) { return {Accept::refuse, nullptr, nullptr, why}; }

Incoming fresh_target(std::size_t bytes) {
  if (bytes == 0) return {Accept::take, nullptr, nullptr, ""};
  auto block = allocate(bytes);
  std::byte* const at = block.get();
  return {Accept::take, at, std::shared_ptr<void>(std::move(block)), ""};
}

// Memory of another process may change after it was looked at. Plain floats can be anything and do
// no harm; what holds scales, lengths or indices is copied before it is checked.
bool may_stay(const RoundSpec& spec, bool contributed) {
  const Codec codec = contributed ? spec.contribution : spec.result;
  return spec.op != Op::collect && codec <= Codec::f16;
}

bool is_chunk_frame(const Header& header) {
  return header.type == FrameType::contribution || header.type == FrameType::result;
}

bool test(const std::byte* map, std::size_t i) {
  return (map[i / 8] & std::byte(1u << (i % 8))) != std::byte{0};
}

}  // namespace

Incoming Impl::on_header(PeerId from, const Header& header, bool arrived) {
  if (header.view > view.id) return {Accept::later, nullptr, nullptr, "of a newer view"};
  if (header.view < view.id && !planted(Plant::stale_frame)) return dropped("of an older view");
  if (frozen) return dropped("frozen");
  const Member* const peer = member(from);
  if (peer == nullptr || roles.self == kNoSlot) return dropped("not of this view");
  if (header.src != peer->slot || header.dst != roles.self || peer->slot == roles.self) {
    return refused("wrong slots");
  }
  if (header.tag >= kMaxTags) return refused("tag out of range");
  switch (header.type) {
    case FrameType::open:
      if (header.payload_bytes != kSpecBytes) return refused("OPEN of a wrong length");
      return fresh_target(header.payload_bytes);
    case FrameType::have:
      if (header.payload_bytes < kSpecBytes || header.payload_bytes > kMaxHaveBytes) {
        return refused("HAVE of a wrong length");
      }
      return fresh_target(header.payload_bytes);
    case FrameType::done:
      if (header.payload_bytes != 0) return refused("DONE with a payload");
      return fresh_target(0);
    case FrameType::contribution:
    case FrameType::result:
      break;
    default:
      return refused("not a frame of rounds");
  }
  const char* why = "";
  Round* const round = hear(header.tag, header.seq, &why);
  if (round == nullptr) return dropped(why);
  if (!round->open) return park_header(*round, header);
  if (!same_spec(*round, *peer, header)) return dropped("another specification");
  Incoming verdict = header.type == FrameType::result ? admit_result(*round, *peer, header)
                                                      : admit_contribution(*round, *peer, header);
  if (verdict.accept != Accept::take || header.payload_bytes == 0) return verdict;
  const bool contributed = header.type == FrameType::contribution;
  if (arrived && may_stay(round->spec, contributed)) return verdict;
  if (contributed) return fresh_target(header.payload_bytes);
  Place where = round->place(header.chunk, header.payload_bytes);
  return {Accept::take, where.at, std::move(where.keep), ""};
}

void Impl::on_payload(PeerId from, const Header& header, Incoming incoming, double now) {
  if (incoming.accept != Accept::take || frozen) return;
  if (header.view != view.id && !planted(Plant::stale_frame)) return;
  const Member* const peer = member(from);
  if (peer == nullptr || header.src != peer->slot) return;
  if (header.type == FrameType::open || header.type == FrameType::have) {
    take_have(*peer, header, incoming, now);
    return;
  }
  const char* why = "";
  Round* const round = hear(header.tag, header.seq, &why);
  if (round == nullptr) return;
  if (!round->open) {
    park(*round, from, header, std::move(incoming));
  } else {
    deliver(*round, *peer, header, incoming, now);
  }
}

namespace {

// The last round that others, who have `ahead` open, can be in as long as we lack a DONE that they
// have. A round that opened by itself keeps its number for our caller; the next one may begin. No
// more than that: whoever has all DONEs would run ahead alone, and leave us more rounds to end at
// once than results are kept.
std::uint64_t last_heard(const Tag& tag, std::uint64_t ahead) {
  const auto current = tag.rounds.find(tag.next);
  const bool opened = current != tag.rounds.end() && current->second.open;
  return tag.next + (opened ? 1 : 0) + ahead;
}

}  // namespace

// The round a frame speaks of, if frames of it can matter now: open, or one of the next of its tag.
// How many may be begun before the next one is stable is only known with its specification.
Round* Impl::hear(std::uint32_t tag_id, std::uint64_t seq, const char** why) {
  Tag& tag = tags[tag_id];
  const auto found = tag.rounds.find(seq);
  if (found != tag.rounds.end()) {
    *why = "the round is settled";
    return found->second.settled ? nullptr : &found->second;
  }
  if (seq < tag.next || seq > last_heard(tag, kMaxAhead)) {
    *why = seq < tag.next ? "the round is settled" : "the round is too far ahead";
    return nullptr;
  }
  Round& round = tag.rounds[seq];
  round.tag = tag_id;
  round.seq = seq;
  return &round;
}

Incoming Impl::park_header(Round& round, const Header& header) {
  if (header.payload_bytes > kEagerBytes ||
      parked_bytes + header.payload_bytes + kParkedOverhead > options.parked_bytes) {
    round.parked_lost = true;
    return dropped("no room for early frames");
  }
  return fresh_target(header.payload_bytes);
}

void Impl::park(Round& round, PeerId from, const Header& header, Incoming incoming) {
  const std::size_t cost = header.payload_bytes + kParkedOverhead;
  if (parked_bytes + cost > options.parked_bytes) {
    round.parked_lost = true;
    return;
  }
  parked_bytes += cost;
  round.parked_bytes += cost;
  round.parked.push_back({from, header, std::move(incoming)});
  if (round.named_open) return;
  round.named_open = true;
  event(EventKind::open, round, from, "");
}

void Impl::replay(Round& round, double now) {
  parked_bytes -= round.parked_bytes;
  round.parked_bytes = 0;
  for (ParkedFrame& frame : std::exchange(round.parked, {})) {
    const Member* const from = member(frame.from);
    if (from != nullptr) deliver(round, *from, frame.header, frame.incoming, now);
  }
}

void Impl::deliver(Round& round, const Member& from, const Header& header, Incoming& incoming,
                   double now) {
  if (round.settled) return;
  if (header.type == FrameType::done) {
    take_done(round, from, header);
    return;
  }
  if (!is_chunk_frame(header) || !same_spec(round, from, header)) return;
  const Incoming verdict = header.type == FrameType::result
                               ? admit_result(round, from, header)
                               : admit_contribution(round, from, header);
  if (verdict.accept == Accept::refuse) event(EventKind::refused, round, from.peer, verdict.reason);
  if (verdict.accept != Accept::take) return;
  if (header.type == FrameType::result) {
    take_result(round, from, header, incoming, now);
  } else if ((header.flags & kFlagSkip) != 0) {
    round.skipped |= bit(from.slot);
    try_combine_all(round, now);
  } else {
    take_contribution(round, from, header, incoming, now);
  }
}

bool Impl::same_spec(Round& round, const Member& from, const Header& header) {
  if (header.spec_digest == round.spec_digest) return true;
  if ((round.named_spec & bit(from.slot)) == 0) {
    round.named_spec |= bit(from.slot);
    event(EventKind::spec_mismatch, round, from.peer, "its frames name another specification");
  }
  return false;
}

Incoming Impl::admit_contribution(const Round& round, const Member& from,
                                  const Header& header) const {
  if ((header.flags & kFlagSkip) != 0) {
    if (header.payload_bytes != 0 || header.chunk != kAllChunks) return refused("malformed SKIP");
    return from.active ? fresh_target(0) : dropped("observers do not contribute");
  }
  if (round.spec.op == Op::collect) return refused("a contribution in a collect round");
  if (header.chunk >= round.chunks.size()) return refused("no such chunk");
  if (header.payload_bytes != round.contribution_bytes(header.chunk)) {
    return refused("a contribution of a wrong length");
  }
  const Chunk& chunk = round.chunks[header.chunk];
  if (!from.active) return dropped("observers do not contribute");
  if (chunk.owner != roles.self) return dropped("not our chunk");
  const bool again = planted(Plant::counted_twice) && !chunk.held;
  const bool late = planted(Plant::waived_added) && (chunk.waived & bit(from.slot)) != 0;
  if (again || late) return {Accept::take, nullptr, nullptr, ""};
  if (chunk.held) return dropped("the chunk has its value");
  if (((chunk.received | chunk.waived | round.skipped) & bit(from.slot)) != 0) {
    return dropped("counted before");
  }
  return {Accept::take, nullptr, nullptr, ""};
}

Incoming Impl::admit_result(const Round& round, const Member& from, const Header& header) const {
  if (header.chunk >= round.chunks.size()) return refused("no such chunk");
  if (round.spec.op == Op::collect) {
    if (header.payload_bytes > round.spec.chunk_elements) return refused("a result too long");
    if (header.a != 0 && header.a != bit(static_cast<std::uint8_t>(header.chunk))) {
      return refused("a result of another slot");
    }
    if (header.a == 0 && header.payload_bytes != 0) return refused("an empty result with bytes");
  } else {
    const std::size_t elements = chunk_elements(round.spec, header.chunk);
    const std::size_t bytes = header.a == 0 ? 0 : encoded_bytes(round.spec.result, elements);
    if (header.payload_bytes != bytes) return refused("a result of a wrong length");
  }
  const Chunk& chunk = round.chunks[header.chunk];
  if (chunk.held) return dropped("held before");
  if (chunk.fixed) {
    if (header.b != chunk.digest || header.a != chunk.contributors || header.c != chunk.born) {
      return dropped("not the value of the plan");
    }
  } else if (planted(Plant::stale_frame)) {
    return {Accept::take, nullptr, nullptr, ""};
  } else if (chunk.owner != from.slot || header.c != view.id) {
    return dropped("not from the chunk's owner");
  }
  return {Accept::take, nullptr, nullptr, ""};
}

// True when the payload is not what its sender hashed; asks for it again, not for ever.
bool Impl::corrupt(Round& round, const Member& from, const Header& header,
                   const Incoming& incoming) {
  if (digest({incoming.target, header.payload_bytes}) == header.b) return false;
  event(EventKind::refused, round, from.peer, "a payload does not match its digest");
  if (++round.corrupt[from.slot] <= kCorruptAsked) {
    say(from.slot, {.type = FrameType::have, .tag = round.tag, .seq = round.seq});
  }
  return true;
}

void Impl::take_contribution(Round& round, const Member& from, const Header& header,
                             Incoming& incoming, double now) {
  Chunk& chunk = round.chunks[header.chunk];
  if (planted(Plant::waived_added) && chunk.held) round.drop_value(header.chunk);
  const auto weight = std::bit_cast<double>(header.a);
  // Plain floats are looked at when they are combined (combine_without_bad). Scales must be right
  // before anything is decoded with them, lengths before they are compared.
  const bool plain = round.spec.contribution <= Codec::f16 && round.spec.rule != Rule::norm_clip;
  const bool sound = std::isfinite(weight) && weight > 0.0 &&
                     (plain || valid(round.spec.contribution, incoming.target,
                                     chunk_elements(round.spec, header.chunk)));
  if (sound) {
    chunk.received |= bit(from.slot);
    tags[round.tag].weights[from.slot] = weight;
    round.arrived[from.slot] = now;
    chunk.contributions.push_back({from.slot, weight, incoming.target, incoming.keep});
  } else {
    chunk.waived |= bit(from.slot);
    event(EventKind::refused, round, from.peer,
          "chunk " + std::to_string(header.chunk) + " is not finite or has no valid weight");
  }
  try_combine(round, header.chunk, now);
  check_complete(round, now);
}

void Impl::take_result(Round& round, const Member& from, const Header& header, Incoming& incoming,
                       double now) {
  if (corrupt(round, from, header, incoming)) return;
  const bool forged =
      header.a != 0 && round.spec.op != Op::collect &&
      !valid(round.spec.result, incoming.target, chunk_elements(round.spec, header.chunk));
  if (forged) {  // no owner makes it: left out like one whose bits diverged, and made again
    event(EventKind::diverged, round, from.peer,
          "its result of chunk " + std::to_string(header.chunk) + " cannot be decoded");
    return;
  }
  round.set_value(header.chunk, {incoming.target, incoming.keep}, header.payload_bytes, header.b,
                  header.a, header.c);
  check_complete(round, now);
}

void Impl::take_done(Round& round, const Member& from, const Header& header) {
  if (!from.active) return;
  round.done_from |= bit(from.slot);
  round.done[from.slot] = {header.a, header.b};
  check_stable(round);
}

// An observer forgets rounds the others have left: who begins a round has the results of all before
// it but `ahead`. True when it has to, to hear of this one.
bool Impl::follow(Tag& tag, std::uint64_t seq, std::uint8_t ahead) {
  if (roles.self_active()) return false;
  // Its sender still serves the last that are stable, as many as may be open.
  const std::uint64_t oldest = seq - std::min(seq, std::uint64_t{1} + ahead);
  const auto last = std::find_if(tag.rounds.begin(), tag.rounds.end(),
                                 [](const auto& one) { return !one.second.settled; });
  const std::uint64_t here = last == tag.rounds.end() ? tag.next : last->first;
  if (std::min(here, tag.next) >= oldest) return false;
  for (auto& [number, round] : tag.rounds) {
    if (number < oldest) end(round, Outcome::lost);
  }
  std::uint64_t next = seq;
  for (auto& [number, round] : tag.rounds) {
    if (number >= tag.next && number < next && !round.settled && !round.begun) next = number;
  }
  tag.next = next;
  return true;
}

// Frames that say "I have begun": an observer takes part by itself.
Round* Impl::heard_of(const Member& from, const Header& header, const RoundSpec& spec, double now) {
  Tag& tag = tags[header.tag];
  const char* why = "";
  const bool skipped = follow(tag, header.seq, spec.ahead);
  Round* const round = hear(header.tag, header.seq, &why);
  // An observer has begun none and follows whatever the others are in.
  const bool far = roles.self_active() && header.seq > last_heard(tag, spec.ahead);
  if (round == nullptr || (far && !round->open)) return nullptr;
  // Frames of it may have been dropped as too far ahead.
  round->parked_lost = round->parked_lost || (skipped && !round->open);
  if (round->known && round->spec_digest != decotrain::spec_digest(spec)) {
    same_spec(*round, from, header);
    return nullptr;
  }
  if (!round->known) round->set_spec(spec);
  if (!round->begun && !round->named_open) {
    round->named_open = true;
    event(EventKind::open, *round, from.peer, "");
  }
  if (!round->open && (!roles.self_active() || options.grace_s > 0.0)) open_round(*round, now);
  return round;
}

// OPEN, and HAVE, which is an OPEN with bitmaps.
void Impl::take_have(const Member& from, const Header& header, const Incoming& incoming,
                     double now) {
  const auto spec = unpack_spec({incoming.target, kSpecBytes});
  const bool maps = header.type == FrameType::have;
  const std::size_t map_bytes = maps && spec ? (chunk_count(*spec) + 7) / 8 : 0;
  if (!spec || header.spec_digest != decotrain::spec_digest(*spec) ||
      header.payload_bytes != kSpecBytes + 2 * map_bytes) {
    events.push_back({EventKind::refused, header.tag, header.seq, from.peer, "a malformed OPEN"});
    return;
  }
  Round* const round = heard_of(from, header, *spec, now);
  if (round == nullptr) {
    answer_closed(from, header);
    return;
  }
  const bool first = (round->opened & bit(from.slot)) == 0;
  round->opened |= bit(from.slot);
  if (!round->open && maps) round->parked_lost = true;  // a stream broke: ask when we open
  if (!round->open || round->settled) return;
  if (!maps) {
    if (first) offer_all(*round, from.slot);
    return;
  }
  const std::byte* const results = incoming.target + kSpecBytes;
  for (std::uint32_t c = 0; c < round->chunks.size(); ++c) {
    Chunk& chunk = round->chunks[c];
    chunk.holders =
        test(results, c) ? chunk.holders | bit(from.slot) : chunk.holders & ~bit(from.slot);
    if (chunk.owner == from.slot) chunk.owner_has_ours = test(results + map_bytes, c);
  }
  offer_all(*round, from.slot);
  const Outgoing what{.type = FrameType::done, .tag = round->tag, .seq = round->seq};
  if (round->skips) {
    Outgoing skip = what;
    skip.type = FrameType::contribution;
    skip.skip = true;
    say(from.slot, skip);
  }
  if (round->complete && roles.self_active()) say(from.slot, what);
  if ((header.flags & kFlagReply) == 0) {
    Outgoing reply = what;
    reply.type = FrameType::have;
    reply.reply = true;
    say(from.slot, reply);
  }
}

// Who asks for a round that is stable here lacks our DONE, or, as an observer, results.
void Impl::answer_closed(const Member& from, const Header& header) {
  Tag& tag = tags[header.tag];
  say(from.slot, {.type = FrameType::done, .tag = header.tag, .seq = header.seq});
  const auto closed = tag.closed.find(header.seq);
  if (closed == tag.closed.end()) return;
  closed->second.opened |= bit(from.slot);
  offer_all(closed->second, from.slot);
}

}  // namespace decotrain
