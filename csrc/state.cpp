// Serving and fetching shared state, chunk by chunk.
#include "state.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "buffers.h"

namespace decotrain {
namespace {

constexpr double kBusyPause_s = 0.02;   // an update takes milliseconds
constexpr double kBehindPause_s = 0.1;  // a peer at an older version catches up by itself
constexpr double kDamagedPause_s = 1.0;
constexpr double kSilence_s = 15.0;        // no answer at all: ask elsewhere
constexpr double kSecondAskAfter_s = 2.0;  // at the end: ask an idle peer for what a slow one owes
constexpr std::uint32_t kDamagedMax = 3;   // then that peer is not asked any more
constexpr double kNever = std::numeric_limits<double>::infinity();

}  // namespace

// ---- StateStore

void StateStore::publish(std::uint32_t tag, StatePieces pieces, std::uint64_t version,
                         std::shared_ptr<const void> keep, std::uint64_t kind) {
  auto fragment = std::make_shared<Fragment>();
  fragment->pieces = std::move(pieces);
  fragment->version = version;
  fragment->kind = kind;
  fragment->keep = std::move(keep);
  withdraw(tag);
  const std::lock_guard lock(mutex_);
  fragments_[tag] = std::move(fragment);
}

void StateStore::withdraw(std::uint32_t tag) {
  std::shared_ptr<Fragment> old;
  {
    const std::lock_guard lock(mutex_);
    const auto it = fragments_.find(tag);
    if (it == fragments_.end()) return;
    old = std::move(it->second);
    fragments_.erase(it);
  }
  const std::lock_guard reading(old->mutex);  // nobody reads the buffers after this call
  old->updating = true;
}

void StateStore::begin_update(std::uint32_t tag) {
  const auto fragment = find(tag);
  if (!fragment) return;
  const std::lock_guard lock(fragment->mutex);
  fragment->updating = true;
}

void StateStore::end_update(std::uint32_t tag, std::uint64_t version) {
  const auto fragment = find(tag);
  if (!fragment) return;
  const std::lock_guard lock(fragment->mutex);
  fragment->version = version;
  fragment->updating = false;
}

std::optional<std::uint64_t> StateStore::version(std::uint32_t tag) const {
  const auto fragment = find(tag);
  if (!fragment) return std::nullopt;
  const std::lock_guard lock(fragment->mutex);
  return fragment->version;
}

std::shared_ptr<StateStore::Fragment> StateStore::find(std::uint32_t tag) const {
  const std::lock_guard lock(mutex_);
  const auto it = fragments_.find(tag);
  return it == fragments_.end() ? nullptr : it->second;
}

void StateStore::on_request(PeerId from, const Header& header) {
  if (header.payload_bytes != 0 || header.a % kStateChunkBytes != 0) return;
  std::deque<Header>& asked = asked_[from];
  if (asked.size() < kStateQueuedMax) asked.push_back(header);
}

bool StateStore::has_reply(PeerId to) const {
  const auto it = asked_.find(to);
  return it != asked_.end() && !it->second.empty() && *reply_bytes_ < kStateReplyBytesMax;
}

bool StateStore::next_reply(PeerId to, OutFrame& frame) {
  if (!has_reply(to)) return false;
  std::deque<Header>& asked = asked_[to];
  const Header request = asked.front();
  asked.pop_front();
  // The copy, and with it the bound, lives as long as the frame does.
  auto count = reply_bytes_;
  count->fetch_add(kStateChunkBytes);
  std::shared_ptr<std::byte[]> copy = allocate(kStateChunkBytes);
  std::byte* const bytes = copy.get();
  frame = {};
  Header& reply = frame.header;
  reply.type = FrameType::state;
  reply.tag = request.tag;
  reply.spec_digest = request.spec_digest;
  reply.a = request.a;
  reply.chunk = static_cast<std::uint32_t>(read(request, reply, bytes));
  frame.payload = bytes;
  frame.keep = std::shared_ptr<const void>(bytes, [copy, count](const void*) mutable {
    copy.reset();
    count->fetch_sub(kStateChunkBytes);
  });
  return true;
}

StateAnswer StateStore::read(const Header& request, Header& reply, std::byte* out) const {
  const auto fragment = find(request.tag);
  if (!fragment) return StateAnswer::unknown;
  const std::lock_guard lock(fragment->mutex);
  reply.seq = fragment->version;
  const StatePieces& pieces = fragment->pieces;
  const std::uint64_t piece = request.a / kStateChunkBytes;
  reply.c = pieces.bytes();
  reply.b = fragment->kind;
  const bool alike = request.b == 0 || fragment->kind == 0 || request.b == fragment->kind;
  if (pieces.bytes() != request.c || piece >= pieces.size() || !alike) return StateAnswer::unknown;
  if (fragment->updating) return StateAnswer::busy;
  if (request.seq != kAnyVersion && request.seq != fragment->version) {
    return StateAnswer::other_version;
  }
  const std::size_t bytes = pieces.bytes_of(piece);
  pieces.read(piece, out);
  reply.payload_bytes = static_cast<std::uint32_t>(bytes);
  reply.b = digest({out, bytes});
  return StateAnswer::here;
}

void StateStore::forget(PeerId peer) { asked_.erase(peer); }

// ---- StateFetch

StateFetch::StateFetch(std::uint32_t tag, std::uint32_t id, StatePieces into,
                       const std::vector<PeerId>& peers, bool follows, std::uint64_t kind)
    : tag_(tag),
      id_(id),
      into_(std::move(into)),
      follows_(follows),
      kind_(kind),
      pieces_(into_.size()) {
  progress_.total_bytes = into_.bytes();
  left_ = pieces_.size();
  heads_left_ = into_.heads();
  for (std::uint32_t i = 0; i < pieces_.size(); ++i) todo_.push_back(i);
  set_peers(peers);
}

void StateFetch::set_peers(const std::vector<PeerId>& peers) {
  std::map<PeerId, Server> next;
  for (const PeerId peer : peers) {
    const auto it = servers_.find(peer);
    if (it != servers_.end()) {
      next[peer] = std::move(it->second);
      servers_.erase(it);
    } else {
      next[peer] = {};
    }
  }
  for (auto& [peer, server] : servers_) give_back(server);
  servers_ = std::move(next);
}

std::size_t StateFetch::asked() const {
  std::size_t count = 0;
  for (const auto& [peer, server] : servers_) count += server.asked.size();
  return count;
}

StateProgress StateFetch::progress() const {
  StateProgress progress = progress_;
  progress.under_way = asked();
  for (const auto& [peer, server] : servers_) {
    progress.other_bytes = server.other_bytes;
    if (server.other_bytes == 0) break;
  }
  return progress;
}

// What this server should be asked for next.
std::optional<std::uint32_t> StateFetch::pick(const Server& server, double now) const {
  // A small fragment comes from all of them, too.
  const std::size_t fair = (left_ + servers_.size() - 1) / servers_.size();
  if (done() || server.asked.size() >= std::min(kStateAskedMax, fair) || now < server.not_before ||
      server.damaged >= kDamagedMax) {
    return std::nullopt;
  }
  if (paused_ || (follows_ && asked() + held_.size() >= kStateHeldMax)) return std::nullopt;
  // One request only until the version is known.
  if (!progress_.version && !server.asked.empty()) return std::nullopt;
  // The single elements first: what others become may depend on them.
  if (!todo_.empty() && heads_left_ != 0 && todo_.front() >= into_.heads()) return std::nullopt;
  if (!todo_.empty()) return todo_.front();
  if (!server.asked.empty()) return std::nullopt;
  for (std::uint32_t i = 0; i < pieces_.size(); ++i) {
    if (pieces_[i].late && !held_.contains(i)) return i;
  }
  return std::nullopt;
}

bool StateFetch::has_request(PeerId peer, double now) const {
  const auto it = servers_.find(peer);
  return it != servers_.end() && pick(it->second, now).has_value();
}

bool StateFetch::next_request(PeerId peer, double now, Header& header) {
  const auto it = servers_.find(peer);
  if (it == servers_.end()) return false;
  Server& server = it->second;
  const auto piece = pick(server, now);
  if (!piece) return false;
  if (!todo_.empty()) todo_.pop_front();
  if (server.asked.empty()) server.heard = now;
  server.asked.push_back(*piece);
  pieces_[*piece] = {.done = false, .queued = false, .late = false, .asked_at = now};
  header = {};
  header.type = FrameType::state_request;
  header.tag = tag_;
  header.seq = follows_ ? kAnyVersion : progress_.version.value_or(kAnyVersion);
  header.spec_digest = id_;
  header.a = *piece * kStateChunkBytes;
  header.b = kind_;
  header.c = progress_.total_bytes;
  return true;
}

// Answers to what we asked, and nothing else, become memory.
bool StateFetch::current(const Header& header) const {
  return header.tag == tag_ && header.spec_digest == id_ && header.a % kStateChunkBytes == 0 &&
         header.a / kStateChunkBytes < pieces_.size();
}

// What an answer says of its sender's fragment, if it has one.
bool StateFetch::fits(const Header& header) const {
  const bool alike = kind_ == 0 || header.b == 0 || header.b == kind_;
  return header.c == 0 || (header.c == progress_.total_bytes && alike);
}

Incoming StateFetch::on_header(PeerId from, const Header& header, double now) {
  const auto it = servers_.find(from);
  if (it == servers_.end() || !current(header)) return {};
  const auto piece = static_cast<std::uint32_t>(header.a / kStateChunkBytes);
  Server& server = it->second;
  server.heard = now;
  if (header.payload_bytes != 0) {
    if (std::find(server.asked.begin(), server.asked.end(), piece) == server.asked.end() ||
        header.payload_bytes != into_.bytes_of(piece)) {
      return {};
    }
    const std::shared_ptr<std::byte[]> place = allocate(kStateChunkBytes);
    return {Accept::take, place.get(), place, ""};
  }
  if (std::erase(server.asked, piece) == 0) return {};
  queue(piece);
  const bool newer = progress_.version && header.seq > *progress_.version;
  switch (static_cast<StateAnswer>(header.chunk)) {
    case StateAnswer::busy:
      server.not_before = now + kBusyPause_s;
      break;
    case StateAnswer::other_version:
      if (newer)
        restart(header.seq);
      else
        server.not_before = now + kBehindPause_s;
      break;
    default:
      server.other_bytes = fits(header) ? 0 : header.c;
      server.not_before = now + kDamagedPause_s;
      break;
  }
  return {};
}

void StateFetch::on_payload(PeerId from, const Header& header, Incoming payload, double now) {
  const auto it = servers_.find(from);
  if (it == servers_.end() || !current(header)) return;
  Server& server = it->second;
  server.heard = now;
  server.other_bytes = 0;
  const auto piece = static_cast<std::uint32_t>(header.a / kStateChunkBytes);
  if (std::erase(server.asked, piece) == 0 || pieces_[piece].done) return;
  const std::size_t bytes = into_.bytes_of(piece);
  if (header.payload_bytes != bytes || digest({payload.target, bytes}) != header.b) {
    ++progress_.damaged;
    ++server.damaged;
    server.not_before = now + kDamagedPause_s;
    queue(piece);
    return;
  }
  take(piece, header.seq, std::move(payload), server, now);
}

void StateFetch::take(std::uint32_t piece, std::uint64_t version, Incoming payload, Server& server,
                      double now) {
  const std::uint64_t ours = progress_.version.value_or(version);
  if (version == ours && !locked_) {
    progress_.version = version;
    store(piece, payload.target);
  } else if (version < ours) {
    server.not_before = now + kBehindPause_s;
    queue(piece);
  } else if (follows_) {
    held_[piece] = {version, std::move(payload)};
  } else {
    restart(version);
    store(piece, payload.target);
  }
}

void StateFetch::pause() { paused_ = true; }

bool StateFetch::lock() {
  locked_ = !done();
  return locked_;
}

void StateFetch::advance(std::uint64_t version) {
  progress_.version = version;
  paused_ = locked_ = false;
  for (auto it = held_.begin(); it != held_.end();) {
    const auto& [piece, held] = *it;
    if (held.version > version) {
      ++it;
      continue;
    }
    if (held.version == version && !pieces_[piece].done) {
      store(piece, held.payload.target);
    } else {
      queue(piece);
    }
    it = held_.erase(it);
  }
}

// Somebody has to be asked for it again.
void StateFetch::queue(std::uint32_t piece) {
  Piece& one = pieces_[piece];
  if (one.done || one.queued) return;
  one.queued = true;
  one.late = false;
  todo_.push_front(piece);
}

void StateFetch::store(std::uint32_t piece, const std::byte* payload) {
  into_.write(piece, payload);
  if (pieces_[piece].queued) std::erase(todo_, piece);
  pieces_[piece] = {.done = true, .queued = false, .late = false, .asked_at = 0.0};
  --left_;
  if (piece < into_.heads()) --heads_left_;
  progress_.bytes += into_.bytes_of(piece);
}

// The version moved: pieces of two versions make no state. Answers under way are of the old one.
void StateFetch::restart(std::uint64_t version) {
  progress_.version = version;
  progress_.bytes = 0;
  ++progress_.restarts;
  todo_.clear();
  for (std::uint32_t i = 0; i < pieces_.size(); ++i) {
    pieces_[i] = {};
    todo_.push_back(i);
  }
  left_ = pieces_.size();
  heads_left_ = into_.heads();
  for (auto& [peer, server] : servers_) server.asked.clear();
}

void StateFetch::give_back(Server& server) {
  for (const std::uint32_t piece : std::exchange(server.asked, {})) queue(piece);
}

void StateFetch::on_link_reset(PeerId peer) {
  const auto it = servers_.find(peer);
  if (it != servers_.end()) give_back(it->second);
}

// After it, every time in next_deadline() lies ahead.
void StateFetch::tick(double now) {
  for (auto& [peer, server] : servers_) {
    if (now >= server.not_before) server.not_before = 0.0;
    if (server.asked.empty() || now - server.heard < kSilence_s) continue;
    give_back(server);
    server.not_before = now + kDamagedPause_s;
  }
  if (!todo_.empty()) return;
  for (Piece& piece : pieces_) {
    if (!piece.done && !piece.late && now - piece.asked_at >= kSecondAskAfter_s) piece.late = true;
  }
}

double StateFetch::next_deadline() const {
  if (done()) return kNever;
  double next = kNever;
  for (const auto& [peer, server] : servers_) {
    if (!server.asked.empty()) next = std::min(next, server.heard + kSilence_s);
    if (server.not_before > 0.0) next = std::min(next, server.not_before);
  }
  if (!todo_.empty()) return next;
  for (const Piece& piece : pieces_) {
    if (!piece.done && !piece.late) next = std::min(next, piece.asked_at + kSecondAskAfter_s);
  }
  return next;
}

}  // namespace decotrain
