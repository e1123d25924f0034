// Chunks of one round: their owners, their memory, and how contributions become values.
#include "round.h"

#include <algorithm>
#include <cmath>

#include "buffers.h"

namespace decotrain {
namespace {

// What a receiver's `keep` points to: it pins the buffer, and its end says that nobody writes.
struct Writer {
  std::shared_ptr<std::byte[]> buffer;
};

struct ResultKeep {
  std::shared_ptr<std::byte[]> results;
  std::vector<std::shared_ptr<const void>> chunks;
};

}  // namespace

void Round::set_spec(const RoundSpec& named) {
  spec = named;
  spec_digest = decotrain::spec_digest(named);
  known = true;
  place_bytes = spec.op == Op::collect ? 0 : encoded_bytes(spec.result, spec.chunk_elements);
}

bool Round::eager() const {
  if (spec.op == Op::collect) return spec.chunk_elements <= kEagerBytes;
  const std::uint64_t chunks_of_round = chunk_count(spec);
  if (chunks_of_round > kEagerBytes) return false;
  const std::size_t one = std::max(encoded_bytes(spec.contribution, spec.chunk_elements),
                                   encoded_bytes(spec.result, spec.chunk_elements));
  if (chunks_of_round > 1) return chunks_of_round * one <= kEagerBytes;
  return std::max(encoded_bytes(spec.contribution, chunk_elements(spec, 0)),
                  encoded_bytes(spec.result, chunk_elements(spec, 0))) <= kEagerBytes;
}

void Round::remember(const View& view) {
  for (const Member& member : view.members) {
    if (member.active) peers[member.slot] = member.peer;
  }
}

void Round::lay_out_fresh(const View& view, const Roles& roles) {
  const std::uint32_t count = chunk_count(spec);
  chunks.assign(count, Chunk{});
  missing = count;
  planned = false;
  remember(view);
  if (spec.op == Op::collect) {
    for (std::uint32_t c = 0; c < count; ++c) {
      const auto slot = static_cast<std::uint8_t>(c);
      if ((roles.active & bit(slot)) != 0) {
        chunks[c].owner = slot;
      } else {
        set_empty(c, view.id);
      }
    }
    return;
  }
  std::vector<const Member*> owners;
  for (const Member& member : view.members) {
    if (member.active && member.share > 0.0) owners.push_back(&member);
  }
  const bool equal = owners.empty();  // nobody offers a share: everybody owns the same
  for (const Member& member : view.members) {
    if (equal && member.active) owners.push_back(&member);
  }
  if (owners.empty()) return;
  const auto turn = static_cast<std::size_t>((tag + seq) % owners.size());
  std::rotate(owners.begin(), owners.begin() + static_cast<std::ptrdiff_t>(turn), owners.end());
  double total = 0.0;
  for (const Member* owner : owners) total += equal ? 1.0 : owner->share;
  double before = 0.0;
  std::uint32_t next = 0;
  for (std::size_t i = 0; i < owners.size(); ++i) {
    before += equal ? 1.0 : owners[i]->share;
    const bool last = i + 1 == owners.size();
    const auto end = static_cast<std::uint32_t>(std::floor(before / total * count + 0.5));
    const std::uint32_t stop = last ? count : std::min(end, count);
    for (; next < stop; ++next) chunks[next].owner = owners[i]->slot;
  }
}

std::size_t Round::contribution_bytes(std::uint32_t chunk) const {
  if (spec.op == Op::collect) return collect_bytes;
  return encoded_bytes(spec.contribution, chunk_elements(spec, chunk));
}

const std::byte* Round::contribution(std::uint32_t chunk) const {
  if (spec.op == Op::collect) return snapshot.bytes;
  return snapshot.bytes + chunk * encoded_bytes(spec.contribution, spec.chunk_elements);
}

SlotMask Round::required(std::uint32_t chunk, const Roles& roles) const {
  if (spec.op != Op::collect) return roles.active;
  return roles.active & bit(static_cast<std::uint8_t>(chunk));
}

// In a collect round nobody sends contributions: only an active slot itself can give its chunk a
// value. A plan, which does not look into specifications, may give it to another: the slot may
// have missed the view in which its chunk was given away, or offer no share.
std::uint8_t Round::home(std::uint32_t chunk, const Roles& roles, std::uint8_t named) const {
  const auto slot = static_cast<std::uint8_t>(chunk);
  return spec.op == Op::collect && (roles.active & bit(slot)) != 0 ? slot : named;
}

Place Round::place(std::uint32_t c, std::size_t bytes) {
  Chunk& chunk = chunks[c];
  if (spec.op == Op::collect || chunk.place_spent || !chunk.writer.expired()) {
    auto fresh = allocate(bytes);
    std::byte* const at = fresh.get();
    return {at, std::shared_ptr<void>(std::move(fresh))};
  }
  if (!results) {
    results = allocate(round_bytes(spec, spec.result));
  }
  auto writer = std::make_shared<Writer>(Writer{results});
  chunk.writer = writer;
  return {results.get() + c * place_bytes, std::move(writer)};
}

void Round::set_value(std::uint32_t c, Place where, std::uint32_t bytes, std::uint64_t value_digest,
                      SlotMask contributors, ViewId born) {
  Chunk& chunk = chunks[c];
  chunk.held = true;
  chunk.bytes = bytes;
  chunk.digest = value_digest;
  chunk.born = born;
  chunk.contributors = contributors;
  chunk.value = bytes > 0 ? where.at : nullptr;
  const bool in_place = results && where.at == results.get() + c * place_bytes;
  if (in_place) {
    chunk.place_spent = true;
    chunk.keep = results;
  } else {
    chunk.keep = std::move(where.keep);
  }
  chunk.contributions.clear();
  chunk.contributions.shrink_to_fit();
  chunk.grace_at = kNever;
  --missing;
}

void Round::drop_value(std::uint32_t c) {
  Chunk& chunk = chunks[c];
  if (!chunk.held) return;
  chunk.held = false;
  chunk.value = nullptr;
  chunk.keep.reset();
  chunk.lost.reset();  // whoever makes the value anew keeps what that one loses
  chunk.bytes = 0;
  ++missing;
}

bool Round::combine_chunk(std::uint32_t c, const Roles& roles, ViewId view,
                          const Engine::Memory& memory) {
  Chunk& chunk = chunks[c];
  std::sort(chunk.contributions.begin(), chunk.contributions.end(),
            [](const auto& a, const auto& b) { return a.slot < b.slot; });
  SlotMask contributors = 0;
  double heaviest = 0.0;
  for (const HeldContribution& one : chunk.contributions) {
    contributors |= bit(one.slot);
    heaviest = std::max(heaviest, one.weight);
  }
  chunk.sender = roles.self;
  if (contributors == 0) {
    set_empty(c, view);
    return true;
  }
  if (spec.op == Op::collect) {
    const HeldContribution own = chunk.contributions.front();
    const Place where{const_cast<std::byte*>(own.bytes), std::const_pointer_cast<void>(own.keep)};
    set_value(c, where, static_cast<std::uint32_t>(collect_bytes),
              decotrain::digest({own.bytes, collect_bytes}), contributors, view);
    return true;
  }
  std::vector<Contribution> from;
  from.reserve(chunk.contributions.size());
  for (const HeldContribution& one : chunk.contributions) {
    const double relative = spec.op == Op::sum ? 1.0 : one.weight / heaviest;
    // A weight too small for a float still counts as present.
    from.push_back({one.bytes, std::max(static_cast<float>(relative), 1e-30f)});
  }
  const std::size_t elements = chunk_elements(spec, c);
  const std::size_t bytes = encoded_bytes(spec.result, elements);
  Place where;
  if (std::shared_ptr<std::byte[]> lent = memory ? memory(bytes) : nullptr) {
    where.at = lent.get();
    where.keep = std::move(lent);
  } else {
    where = place(c, bytes);
  }
  OwnerFeedback feedback;
  std::shared_ptr<float[]> lost;
  if (owner_residual.values != nullptr) {
    lost = std::make_shared_for_overwrite<float[]>(elements);
    feedback = {owner_residual.values + std::size_t{c} * spec.chunk_elements, lost.get()};
  }
  if (!combine(spec.rule, spec.rule_parameter, spec.contribution, from, elements, spec.result,
               where.at, feedback)) {
    return false;
  }
  const std::uint64_t value_digest = decotrain::digest({where.at, bytes});
  chunk.lost = std::move(lost);
  set_value(c, std::move(where), static_cast<std::uint32_t>(bytes), value_digest, contributors,
            view);
  return true;
}

void Round::set_empty(std::uint32_t c, ViewId view) {
  set_value(c, {}, 0, decotrain::digest({}), 0, view);
}

SlotMask Round::drop_not_finite(std::uint32_t c) {
  Chunk& chunk = chunks[c];
  SlotMask dropped = 0;
  std::erase_if(chunk.contributions, [&](const HeldContribution& one) {
    if (valid(spec.contribution, one.bytes, chunk_elements(spec, c))) return false;
    dropped |= bit(one.slot);
    return true;
  });
  chunk.received &= ~dropped;
  chunk.waived |= dropped;
  return dropped;
}

std::pair<std::uint8_t, double> Round::slowest() const {
  double last = 0.0;
  double before = 0.0;
  std::uint8_t who = kNoSlot;
  for (std::uint8_t slot = 0; slot < kMaxPeers; ++slot) {
    if (arrived[slot] <= before) continue;
    before = arrived[slot];
    if (before <= last) continue;
    std::swap(last, before);
    who = slot;
  }
  return {who, before > 0.0 ? last - before : 0.0};
}

std::uint64_t Round::compute_digest() const {
  std::vector<std::byte> bytes(chunks.size() * 16);
  std::byte* at = bytes.data();
  for (const Chunk& chunk : chunks) {
    for (const std::uint64_t word : {chunk.digest, chunk.contributors}) {
      for (int i = 0; i < 8; ++i) *at++ = std::byte(word >> (8 * i) & 0xff);
    }
  }
  return decotrain::digest(bytes);
}

bool Round::withdrawn(std::uint8_t self) const {
  if (!contributes || snapshot.finite) return false;
  for (std::uint32_t c = 0; c < chunks.size(); ++c) {
    // Lacking ours, it may also have been waived.
    if ((chunks[c].contributors & bit(self)) != 0) continue;
    if (!valid(spec.contribution, contribution(c), chunk_elements(spec, c))) return true;
  }
  return false;
}

RoundResult Round::result(Outcome outcome, ViewId view, std::uint8_t self) const {
  RoundResult out;
  out.tag = tag;
  out.seq = seq;
  out.spec = spec;
  out.outcome = outcome;
  out.view = view;
  out.digest = digest;
  out.begun = begun;
  if (outcome != Outcome::stable) return out;
  out.withdrawn = withdrawn(self);
  auto keep = std::make_shared<ResultKeep>();
  keep->results = results;
  SlotMask all = 0;
  for (const Chunk& chunk : chunks) {
    out.contributors.push_back(chunk.contributors);
    out.chunk_bytes.push_back(chunk.bytes);
    out.chunks.push_back(chunk.value);
    all |= chunk.contributors;
    if (chunk.keep && chunk.keep != results) keep->chunks.push_back(chunk.keep);
    if (chunk.lost) {
      const auto c = static_cast<std::uint32_t>(out.chunks.size() - 1);
      out.lost.push_back({c, chunk.lost});
    }
  }
  for (std::uint8_t slot = 0; slot < kMaxPeers; ++slot) {
    if ((all & bit(slot)) != 0) out.peers.emplace_back(slot, peers[slot]);
  }
  out.keep = std::move(keep);
  return out;
}

RoundReport Round::report() const {
  RoundReport out;
  out.tag = tag;
  out.seq = seq;
  if (wanted) {
    out.spec = *wanted;
    out.begun = true;
    out.chunks.resize(chunk_count(*wanted));
    return out;
  }
  out.spec = spec;
  out.begun = begun;
  out.skipped = skipped;
  out.chunks.resize(chunk_count(spec));
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const Chunk& chunk = chunks[c];
    ChunkReport& one = out.chunks[c];
    one.owner = chunk.owner;
    if (chunk.held) {
      one.digest = chunk.digest;
      one.born = chunk.born;
      one.contributors = chunk.contributors;
    }
    one.received = chunk.received;
  }
  return out;
}

}  // namespace decotrain
