// Engine, sending: what is queued for whom, and how a queue entry becomes a frame.
//
// Queues hold intentions, not frames: a frame is made when a stream has room for it, from the
// state of that moment, and an intention that has become pointless is skipped.
#include <algorithm>
#include <bit>

#include "buffers.h"
#include "engine_impl.h"

namespace decotrain {

using Impl = Engine::Impl;

namespace {

std::uint8_t lowest(SlotMask slots) { return static_cast<std::uint8_t>(std::countr_zero(slots)); }

}  // namespace

void PeerQueue::clear() {
  control.clear();
  results.clear();
  contributions.clear();
}

void Impl::say(std::uint8_t to, Outgoing what) {
  if (to == roles.self || (roles.all & bit(to)) == 0) return;
  PeerQueue& queue = queues[to];
  if (what.type == FrameType::result) {
    queue.results.push_back(what);
  } else if (what.type == FrameType::contribution && !what.skip) {
    queue.contributions.push_back(what);
  } else {
    queue.control.push_back(what);
  }
}

void Impl::say_to_all(const Outgoing& what, SlotMask to) {
  for (SlotMask left = to & roles.all; left != 0; left &= left - 1) say(lowest(left), what);
}

bool Impl::takes_frames(const Round& round, std::uint8_t slot) const {
  return round.eager() || (round.opened & bit(slot)) != 0;
}

void Impl::offer_contribution(Round& round, std::uint32_t c) {
  Chunk& chunk = round.chunks[c];
  if (!round.contributes || c >= round.snapshot.ready || chunk.held || chunk.fixed ||
      chunk.owner_has_ours || chunk.contribution_queued || chunk.owner == roles.self ||
      chunk.owner == kNoSlot || round.spec.op == Op::collect || !takes_frames(round, chunk.owner)) {
    return;
  }
  chunk.contribution_queued = true;
  say(chunk.owner, {.type = FrameType::contribution,
                    .skip = false,
                    .reply = false,
                    .tag = round.tag,
                    .seq = round.seq,
                    .chunk = c});
}

void Impl::offer_result(Round& round, std::uint32_t c, std::uint8_t to) {
  Chunk& chunk = round.chunks[c];
  if (!chunk.held || chunk.sender != roles.self || (chunk.holders & bit(to)) != 0 ||
      (chunk.result_queued & bit(to)) != 0 || to == roles.self || !takes_frames(round, to)) {
    return;
  }
  chunk.result_queued |= bit(to);
  say(to, {.type = FrameType::result,
           .skip = false,
           .reply = false,
           .tag = round.tag,
           .seq = round.seq,
           .chunk = c});
}

void Impl::offer_result_to_all(Round& round, std::uint32_t c) {
  for (const Member& one : view.members) offer_result(round, c, one.slot);
}

// Everything that `to` lacks, as far as we know.
void Impl::offer_all(Round& round, std::uint8_t to) {
  for (std::uint32_t c = 0; c < round.chunks.size(); ++c) {
    if (round.chunks[c].owner == to) offer_contribution(round, c);
    offer_result(round, c, to);
  }
}

// Contributions go before results: what follows from a contribution has another way to go, and the
// link would stand idle for that long at the end of the round if the last ones came late.
bool Impl::next_frame(PeerId to, OutFrame& frame) {
  const Member* const receiver = member(to);
  if (receiver == nullptr) return false;
  PeerQueue& queue = queues[receiver->slot];
  for (std::deque<Outgoing>* of : {&queue.control, &queue.contributions, &queue.results}) {
    while (!of->empty()) {
      const Outgoing what = of->front();
      of->pop_front();
      if (make_frame(*receiver, what, frame)) return true;
    }
  }
  return false;
}

bool Impl::make_frame(const Member& to, const Outgoing& what, OutFrame& frame) {
  frame = OutFrame{};
  frame.header.type = what.type;
  frame.header.src = roles.self;
  frame.header.dst = to.slot;
  frame.header.view = view.id;
  frame.header.tag = what.tag;
  frame.header.seq = what.seq;
  frame.header.chunk = what.chunk;
  Round* round = find_round(what.tag, what.seq);
  if (round == nullptr || round->settled) {
    if (what.type == FrameType::done) return make_old_done(what, frame);
    Tag* const tag = find_tag(what.tag);
    const bool useful = what.type == FrameType::result || what.type == FrameType::open;
    if (!useful || tag == nullptr) return false;
    const auto closed = tag->closed.find(what.seq);
    if (closed == tag->closed.end()) return false;
    round = &closed->second;
  }
  frame.header.spec_digest = round->spec_digest;
  if (what.type == FrameType::result || (what.type == FrameType::contribution && !what.skip)) {
    return make_chunk(to, what, *round, frame);
  }
  return make_control(to, what, *round, frame);
}

bool Impl::make_old_done(const Outgoing& what, OutFrame& frame) {
  const Tag* const tag = find_tag(what.tag);
  if (tag == nullptr || !roles.self_active()) return false;
  for (const StableRound& one : tag->stable) {
    if (one.seq != what.seq || one.view != view.id) continue;
    frame.header.a = one.digest;
    frame.header.b = one.state;
    return true;
  }
  return false;
}

bool Impl::make_chunk(const Member& to, const Outgoing& what, Round& round, OutFrame& frame) {
  Chunk& chunk = round.chunks[what.chunk];
  if (what.type == FrameType::result) {
    chunk.result_queued &= ~bit(to.slot);
    if (!chunk.held || chunk.sender != roles.self) return false;
    frame.header.payload_bytes = chunk.bytes;
    frame.header.a = chunk.contributors;
    frame.header.b = chunk.digest;
    frame.header.c = chunk.born;
    frame.payload = chunk.value;
    frame.keep = chunk.keep;
    return true;
  }
  chunk.contribution_queued = false;
  if (!round.contributes || chunk.held || chunk.owner != to.slot) return false;
  frame.payload = round.contribution(what.chunk);
  frame.header.payload_bytes = static_cast<std::uint32_t>(round.contribution_bytes(what.chunk));
  frame.header.a = std::bit_cast<std::uint64_t>(round.weight);
  frame.keep = round.snapshot.keep;
  return true;
}

bool Impl::make_control(const Member& to, const Outgoing& what, Round& round, OutFrame& frame) {
  frame.header.chunk = kAllChunks;
  if (what.type == FrameType::done) {
    if (!round.complete || !roles.self_active()) return false;
    frame.header.a = round.digest;
    frame.header.b = round.state_digest;
    return true;
  }
  if (what.type == FrameType::contribution) {
    frame.header.flags = kFlagSkip;
    return round.skips;
  }
  if (!round.open) return false;
  const auto spec = pack(round.spec);
  const std::size_t map_bytes =
      what.type == FrameType::have ? (round.chunks.size() + 7) / 8 : std::size_t{0};
  auto payload = allocate(spec.size() + 2 * map_bytes);
  std::copy(spec.begin(), spec.end(), payload.get());
  std::byte* const results = payload.get() + spec.size();
  std::fill_n(results, 2 * map_bytes, std::byte{0});
  for (std::size_t c = 0; map_bytes > 0 && c < round.chunks.size(); ++c) {
    const Chunk& chunk = round.chunks[c];
    const auto one = std::byte(1u << (c % 8));
    if (chunk.held) results[c / 8] |= one;
    // A chunk with a value needs no contribution either.
    const bool theirs = (chunk.received | chunk.waived) & bit(to.slot);
    if (chunk.owner == roles.self && (theirs || chunk.held)) results[map_bytes + c / 8] |= one;
  }
  if (what.reply) frame.header.flags = kFlagReply;
  frame.header.payload_bytes = static_cast<std::uint32_t>(spec.size() + 2 * map_bytes);
  frame.payload = payload.get();
  frame.keep = std::move(payload);
  return true;
}

// Both sides say what they hold of every open round, and the last DONEs of each tag, whose rounds
// may be closed here and open there.
void Impl::on_link_reset(PeerId peer) {
  const Member* const other = member(peer);
  if (other == nullptr || frozen || peer == self) return;
  for (auto& [id, tag] : tags) {
    for (const StableRound& one : tag.stable) {
      if (one.view != view.id || one.seq + tag.kept() <= tag.stable.back().seq) continue;
      say(other->slot, {.type = FrameType::done, .tag = id, .seq = one.seq});
    }
    for (auto& [seq, round] : tag.rounds) {
      if (round.settled) continue;
      round.parked_lost = round.parked_lost || !round.open;
      if (!round.open) continue;
      say(other->slot, {.type = FrameType::have, .tag = id, .seq = seq});
    }
  }
}

}  // namespace decotrain
