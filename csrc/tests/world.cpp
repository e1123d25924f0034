#include "world.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace decotrain::test {
namespace {

constexpr std::size_t kOldFramesKept = 64;
constexpr double kTick = 1e-3;

RoundSpec spec_of(const WorldOptions& options) {
  RoundSpec spec;
  spec.op = options.op;
  spec.rule = Rule::sum;
  spec.elements = options.op == Op::collect ? 0 : options.elements;
  spec.chunk_elements = options.chunk_elements;
  spec.ahead = options.ahead;
  return spec;
}

// Of what the caller gets, not of what the engine says about it.
std::uint64_t bits_of(const RoundResult& result) {
  std::vector<std::uint64_t> words;
  for (std::size_t c = 0; c < result.chunks.size(); ++c) {
    words.push_back(digest({result.chunks[c], result.chunk_bytes[c]}));
    words.push_back(result.contributors[c]);
  }
  return digest(std::as_bytes(std::span(words)));
}

}  // namespace

World::World(std::uint32_t seed, WorldOptions chosen) : options_(chosen), rng_(seed) {
  for (std::size_t i = 0; i < options_.peers; ++i) join();
  change_view(false);
}

void World::join() {
  Peer one;
  one.id = 1000 + peers_.size();
  one.slot = static_cast<std::uint8_t>(next_slot_++);
  one.engine = std::make_unique<Engine>(one.id, options_.engine);
#ifdef DT_PLANT
  one.engine->plant(options_.plant);
#endif
  std::vector<std::pair<std::uint32_t, std::int64_t>> covered;
  for (std::uint32_t tag = 0; tag < options_.tags; ++tag) covered.emplace_back(tag, -1);
  one.engine->declare(covered);
  for (std::uint32_t tag = 0; tag < options_.tags; ++tag) one.state[tag] = {};
  peers_.push_back(std::move(one));
}

void World::kill(std::size_t i) {
  peers_[i].alive = false;
  for (auto& [key, stream] : streams_) {
    // What it wrote before it died may still arrive; what was on its way to it is gone.
    if (std::get<1>(key) == i) stream = Stream{};
  }
  forget(peers_[i].id);
}

// What it has seen may be of a branch that the others have left.
void World::forget(PeerId peer) {
  for (auto& [round, digests] : truth_) digests.erase(peer);
  for (auto& [version, chains] : chains_) chains.erase(peer);
}

bool World::active(const Peer& peer) {
  const View& view = peer.engine->view();
  return std::any_of(view.members.begin(), view.members.end(),
                     [&](const Member& one) { return one.peer == peer.id && one.active; });
}

// All who ever held a version of a tag's state, and are of the run still, held the same.
void World::note_state(const Peer& peer, std::uint32_t tag) {
  const State& state = peer.state.at(tag);
  auto& chains = chains_[{tag, state.version}];
  for (const auto& [other, chain] : chains) {
    if (chain == state.chain) continue;
    violations_.push_back("peers " + std::to_string(peer.id) + " and " + std::to_string(other) +
                          " held two states of tag " + std::to_string(tag) + " at version " +
                          std::to_string(state.version));
  }
  chains[peer.id] = state.chain;
}

void World::break_pair(std::size_t a, std::size_t b) {
  for (int k = 0; k < options_.streams; ++k) {
    if (options_.chaos && random(3) == 0) continue;  // this stream of the pair lives
    for (const auto& key : {std::tuple{a, b, k}, std::tuple{b, a, k}}) {
      Stream& stream = streams_[key];
      if (stream.receiving && stream.receiving->target != nullptr) {
        stream.receiving->target[0] ^= std::byte{0xff};  // half a payload was written
      }
      stream = Stream{};
    }
  }
  resets_.emplace_back(a, b);
  resets_.emplace_back(b, a);
}

void World::send_one(std::size_t from, std::size_t to) {
  OutFrame out;
  if (!peers_[from].engine->next_frame(peers_[to].id, out)) return;
  if (!peers_[to].alive) return;
  Frame frame;
  write(out.header, frame.header);
  frame.payload.assign(out.payload, out.payload + out.header.payload_bytes);
  const int k = static_cast<int>(random(static_cast<std::uint64_t>(options_.streams)));
  if (options_.chaos && old_frames_.size() < kOldFramesKept && random(4) == 0) {
    old_frames_.emplace_back(from, to, frame);
  }
  streams_[{from, to, k}].frames.push_back(std::move(frame));
}

bool World::deliver(std::size_t from, std::size_t to, Stream& stream) {
  if (stream.frames.empty()) return false;
  Engine& engine = *peers_[to].engine;
  const Frame& frame = stream.frames.front();
  const auto header = parse(frame.header);
  if (!header) {
    violations_.push_back("a header does not parse");
    return false;
  }
  if (!stream.receiving) {
    Incoming incoming = engine.on_header(peers_[from].id, *header, now);
    if (incoming.accept == Accept::later) return false;
    if (incoming.accept == Accept::refuse) {
      violations_.push_back(std::string("refused: ") + incoming.reason);
    }
    if (incoming.accept != Accept::take) {
      stream.frames.pop_front();
      return true;
    }
    stream.receiving = std::move(incoming);
    if (options_.chaos && random(2) == 0) return true;
  }
  if (!frame.payload.empty()) {
    std::memcpy(stream.receiving->target, frame.payload.data(), frame.payload.size());
  }
  engine.on_payload(peers_[from].id, *header, std::move(*stream.receiving), now);
  stream.receiving.reset();
  stream.frames.pop_front();
  return true;
}

bool World::move(bool) {
  std::vector<std::pair<std::size_t, std::size_t>> senders;
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    for (std::size_t j = 0; j < peers_.size(); ++j) {
      if (i != j && peers_[i].alive && peers_[i].engine->has_frames(peers_[j].id)) {
        senders.emplace_back(i, j);
      }
    }
  }
  if (!resets_.empty() && random(4) == 0) {
    const std::size_t which = random(resets_.size());
    const auto [who, about] = resets_[which];
    resets_.erase(resets_.begin() + static_cast<std::ptrdiff_t>(which));
    if (peers_[who].alive) peers_[who].engine->on_link_reset(peers_[about].id, now);
    return true;
  }
  if (!senders.empty() && random(2) == 0) {
    const auto [i, j] = senders[random(senders.size())];
    send_one(i, j);
    return true;
  }
  std::vector<std::tuple<std::size_t, std::size_t, int>> ready;
  for (const auto& [key, stream] : streams_) {
    if (!stream.frames.empty() && peers_[std::get<1>(key)].alive) ready.push_back(key);
  }
  const std::size_t start = ready.empty() ? 0 : random(ready.size());
  for (std::size_t k = 0; k < ready.size(); ++k) {
    const auto& key = ready[(start + k) % ready.size()];
    if (deliver(std::get<0>(key), std::get<1>(key), streams_[key])) return true;
  }
  if (!senders.empty()) {
    const auto [i, j] = senders[random(senders.size())];
    send_one(i, j);
    return true;
  }
  return !resets_.empty();
}

void World::begin(Peer& peer, std::uint32_t tag) {
  Engine& engine = *peer.engine;
  const auto open = static_cast<std::int64_t>(peer.begun[tag].size());
  const bool full = open > options_.ahead || !engine.may_begin(tag, options_.ahead);
  if (full || peer.needs_fetch) return;
  const State& state = peer.state[tag];
  if (state.version + 1 + open >= static_cast<std::int64_t>(options_.rounds)) return;
  const auto next = static_cast<std::int64_t>(engine.next(tag));
  if (state.version + 1 + open < next) peer.needs_fetch = open == 0;
  if (state.version + 1 + open != next) return;
  BeginArgs args;
  args.tag = tag;
  args.spec = spec_of(options_);
  args.state_digest = options_.ahead == 0 ? state.chain : 0;
  args.weight = options_.chaos && random(12) == 0 ? 0.0 : 1.0;
  auto values = std::make_shared<std::vector<float>>(
      options_.elements, static_cast<float>(std::uint64_t{1} << peer.slot));
  args.snapshot = {reinterpret_cast<const std::byte*>(values->data()), values};
  if (options_.op == Op::collect) args.collect_bytes = options_.elements * sizeof(float);
  const bool later = options_.fills && options_.op != Op::collect && random(3) != 0;
  if (later) {
    std::fill(values->begin(), values->end(), std::numeric_limits<float>::quiet_NaN());
    args.snapshot.ready = 0;
  }
  const std::uint64_t seq = engine.begin(std::move(args), now);
  if (later) filling_.push_back({std::size_t{peer.id - 1000}, tag, seq, 0, values});
  peer.begun[tag].push_back(seq);
}

// The next chunk of some contribution; now and then its peer gives up. False when all are whole.
bool World::fill_one() {
  if (filling_.empty()) return false;
  const auto which = static_cast<std::ptrdiff_t>(random(filling_.size()));
  Filling& one = filling_[static_cast<std::size_t>(which)];
  Peer& peer = peers_[one.peer];
  const std::uint64_t first = std::uint64_t{one.ready} * options_.chunk_elements;
  const bool done = first >= options_.elements;
  if (!peer.alive || done || (options_.chaos && random(40) == 0)) {
    if (peer.alive && !done) peer.engine->abandon(one.tag, one.seq, now);
    filling_.erase(filling_.begin() + which);
    return true;
  }
  const std::uint64_t end = std::min(first + options_.chunk_elements, options_.elements);
  const auto value = static_cast<float>(std::uint64_t{1} << peer.slot);
  for (std::uint64_t i = first; i < end; ++i) (*one.values)[i] = value;
  peer.engine->chunks_ready(one.tag, one.seq, ++one.ready, now);
  return true;
}

void World::begin_some() {
  for (Peer& one : peers_) {
    for (std::uint32_t tag = 0; tag < options_.tags && one.alive; ++tag) {
      if (!options_.chaos || random(2) == 0) begin(one, tag);
    }
  }
}

void World::install(Peer& peer, const Install& made) { peer.engine->install(made, now); }

// Whoever is in a sum is named, also when it has left, and also by who came after that.
void World::check_names(const Peer& peer, const RoundResult& result) {
  for (const auto& [slot, name] : result.peers) {
    // A slot is given once here.
    const auto who = std::find_if(peers_.begin(), peers_.end(),
                                  [slot = slot](const Peer& one) { return one.slot == slot; });
    if (who != peers_.end() && who->id == name) continue;
    violations_.push_back("peer " + std::to_string(peer.id) + " names " + std::to_string(name) +
                          " as the contributor of slot " + std::to_string(slot));
  }
}

// Each contribution is a power of two: the sum names its contributors (promise P4).
void World::check_sum(const Peer& peer, const RoundResult& result) {
  check_names(peer, result);
  for (std::size_t c = 0; c < result.chunks.size(); ++c) {
    std::vector<float> values(result.chunk_bytes[c] / sizeof(float));
    if (!values.empty()) std::memcpy(values.data(), result.chunks[c], result.chunk_bytes[c]);
    const auto expected = static_cast<float>(result.contributors[c]);
    if ((result.contributors[c] == 0) != values.empty()) {
      violations_.push_back("an empty chunk with contributors");
    }
    for (const float value : values) {
      if (value == expected) continue;
      violations_.push_back("peer " + std::to_string(peer.id) + ": a sum is " +
                            std::to_string(value) + ", not " + std::to_string(expected));
      return;
    }
  }
}

void World::apply(Peer& peer, std::uint32_t tag, const RoundResult& result) {
  State& state = peer.state[tag];
  const auto seq = static_cast<std::int64_t>(result.seq);
  if (result.outcome != Outcome::stable || seq > state.version + 1) {
    if (result.outcome == Outcome::stable && active(peer) && !peer.needs_fetch) {
      violations_.push_back("peer " + std::to_string(peer.id) + " is active, but round " +
                            std::to_string(tag) + "/" + std::to_string(seq) +
                            " came to it at version " + std::to_string(state.version));
    }
    if (seq > state.version) {
      peer.needs_fetch = true;
      declare(peer);
    }
    return;
  }
  check_sum(peer, result);
  const std::uint64_t bits = bits_of(result);
  auto& digests = truth_[{tag, result.seq}];
  for (const auto& [other, digest] : digests) {
    if (digest == bits) continue;
    violations_.push_back("round " + std::to_string(tag) + "/" + std::to_string(result.seq) +
                          ": peers " + std::to_string(peer.id) + " and " + std::to_string(other) +
                          " returned different bits");
  }
  digests[peer.id] = bits;
  if (seq <= state.version) return;  // the fetched state has it
  const std::uint64_t words[3] = {state.chain, result.seq, bits};
  state.chain = digest(std::as_bytes(std::span(words)));
  state.version = seq;
  note_state(peer, tag);
  peer.engine->set_covered(tag, seq);
}

void World::take_all() {
  for (Peer& one : peers_) {
    if (!one.alive) continue;
    for (const Event& event : one.engine->take_events()) {
      if (event.kind == EventKind::diverged && event.peer == one.id) {
        one.needs_fetch = true;  // our branch is void
        forget(one.id);
      } else if (event.kind == EventKind::diverged || event.kind == EventKind::refused ||
                 event.kind == EventKind::spec_mismatch) {
        violations_.push_back("event at peer " + std::to_string(one.id) + ": " + event.detail);
      }
    }
    for (std::uint32_t tag = 0; tag < options_.tags; ++tag) {
      std::deque<std::uint64_t>& mine = one.begun[tag];
      while (!mine.empty() && one.engine->ready(tag, mine.front())) {
        const RoundResult result = one.engine->take_result(tag, mine.front());
        mine.pop_front();
        apply(one, tag, result);
      }
      for (const std::uint64_t seq : one.engine->missed(tag)) {
        apply(one, tag, one.engine->take_result(tag, seq));
      }
    }
  }
}

void World::declare(Peer& peer) {
  std::vector<std::pair<std::uint32_t, std::int64_t>> covered;
  for (const auto& [tag, state] : peer.state) covered.emplace_back(tag, state.version);
  peer.engine->declare(covered);
}

// From an active peer that has all its own state, as if by the shared-state transfer.
void World::fetch(Peer& peer) {
  const Peer* best = nullptr;
  for (const Peer& other : peers_) {
    const View& view = other.engine->view();
    if (!other.alive || other.needs_fetch || other.id == peer.id || view.id != view_id_) continue;
    for (const Member& member : view.members) {
      if (member.peer == other.id && member.active) best = &other;
    }
  }
  if (best == nullptr) return;
  peer.state = best->state;
  peer.needs_fetch = false;
  for (const auto& [tag, state] : peer.state) note_state(peer, tag);
  declare(peer);
}

void World::check() {
  std::map<std::pair<std::uint32_t, std::int64_t>, std::uint64_t> chains;
  for (const Peer& one : peers_) {
    if (!one.alive || one.needs_fetch) continue;
    for (const auto& [tag, state] : one.state) {
      const auto [at, fresh] = chains.try_emplace({tag, state.version}, state.chain);
      if (!fresh && at->second != state.chain) {
        violations_.push_back("two states of tag " + std::to_string(tag) + " at version " +
                              std::to_string(state.version));
      }
    }
  }
}

void World::late_install() {
  if (installs_.empty()) return;
  const std::size_t back = 1 + random(std::min<std::size_t>(installs_.size(), 3));
  Peer& late = peers_[random(peers_.size())];
  if (late.alive) install(late, installs_[installs_.size() - back]);
}

void World::act() {
  now += kTick;
  const std::uint64_t dice = random(1000);
  std::vector<std::size_t> living;
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    if (peers_[i].alive) living.push_back(i);
  }
  if (dice < 2 && living.size() > 2) {
    kill(living[random(living.size())]);
    if (random(3) != 0) change_view(true);
  } else if (dice < 6) {
    change_view(true);
  } else if (dice < 8 && peers_.size() < 8) {
    join();
    change_view(true);
  } else if (dice < 20 && living.size() > 1) {
    const std::size_t a = living[random(living.size())];
    const std::size_t b = living[random(living.size())];
    if (a != b) break_pair(a, b);
  } else if (dice < 40 && !old_frames_.empty()) {
    auto [from, to, frame] = old_frames_[random(old_frames_.size())];
    const int k = static_cast<int>(random(static_cast<std::uint64_t>(options_.streams)));
    if (peers_[to].alive && peers_[from].alive) streams_[{from, to, k}].frames.push_back(frame);
  } else if (dice < 45 && !installs_.empty()) {
    late_install();
  } else if (dice < 100) {
    begin_some();
  } else if (dice < 150) {
    take_all();
    for (Peer& one : peers_) {
      if (one.alive && one.needs_fetch && random(4) == 0) fetch(one);
      if (one.alive) one.engine->tick(now);
    }
  } else if (!options_.fills || random(4) != 0 || !fill_one()) {
    move(false);
  }
  check();
}

bool World::run_until_quiet(int bound) {
  for (int i = 0; i < bound; ++i) {
    now += kTick;
    if (move(false)) continue;
    if (fill_one()) continue;
    take_all();
    for (Peer& one : peers_) {
      if (one.alive) one.engine->tick(now);
    }
    if (!move(false)) return true;
  }
  return false;
}

void World::heal() {
  options_.chaos = false;
  old_frames_.clear();
  for (int i = 0; i < 4; ++i) {
    change_view(false);
    run_until_quiet(100000);
    for (Peer& one : peers_) {
      if (one.alive && one.needs_fetch) fetch(one);
    }
  }
  for (std::uint64_t i = 0; i < 2 * options_.rounds + 2; ++i) {
    begin_some();
    run_until_quiet(100000);
    take_all();
    for (Peer& one : peers_) {
      if (one.alive && one.needs_fetch) fetch(one);
    }
    check();
  }
}

}  // namespace decotrain::test
