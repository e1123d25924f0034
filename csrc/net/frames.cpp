// Mesh, second part: frames in, frames out, frames for others.
#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>
#include <span>
#include <utility>

#include "net/mesh.h"

namespace decotrain::net {
namespace {

constexpr std::size_t kFramesPerWrite = 16;
constexpr std::size_t kGatherBytes = 256 << 10;     // small frames share a system call up to this
constexpr std::size_t kLargeFrameBytes = 64 << 10;  // worth timing
constexpr std::size_t kBulkBytes = 128 << 10;       // in one turn: more than a small round has
constexpr double kPause_s = 0.5;
constexpr int kTurnsPerServe = 4;  // system calls for one stream before others have their turn

std::span<const std::byte> staged_bytes(const Stream& s) {
  return {s.staging.get() + s.staged_from, s.staged()};
}

// All bytes of the next header have come.
bool header_here(const Stream& s) {
  const std::size_t bytes = header_bytes(staged_bytes(s));
  return bytes != 0 && s.staged() >= bytes;
}

}  // namespace

// ---- in

void Mesh::got(Stream& s, std::size_t bytes, Clock at) {
  s.received_bytes += bytes;
  s.last_received = at;
}

void Mesh::read_some(Stream& s, Clock at) {
  for (int turn = 0; turn < kTurnsPerServe;) {
    if (s.paused) return;
    if (s.in_payload) {
      if (s.in_got < s.in.payload_bytes) {
        if (s.staged() == 0) {
          if (!s.readable) return;
          ++turn;
        }
        const Moved moved = fill_payload(s);
        if (moved.failed)
          return close(s, moved.error != 0 ? std::strerror(moved.error) : "closed", at);
        if (moved.bytes != 0) got(s, moved.bytes, at);
      }
      if (s.in_got < s.in.payload_bytes) continue;
      finish_frame(s, at);
    } else if (s.has_header || header_here(s)) {
      if (!next_header(s, at)) return;
      // Payloads that are here already cost no system call, and time all the same.
      turn += s.in_payload && s.in_got >= kLargeFrameBytes ? 1 : 0;
    } else {
      if (!s.readable) return;
      ++turn;
      std::memmove(s.staging.get(), s.staging.get() + s.staged_from, s.staged());
      s.staged_to -= std::exchange(s.staged_from, 0);
      iovec part{s.staging.get() + s.staged_to, kStagingBytes - s.staged_to};
      const std::size_t wanted = part.iov_len;
      const Moved moved = s.channel.read(&part, 1);
      if (moved.failed)
        return close(s, moved.error != 0 ? std::strerror(moved.error) : "closed", at);
      s.staged_to += moved.bytes;
      if (moved.bytes != 0) got(s, moved.bytes, at);
      if (moved.blocked || (moved.bytes < wanted && !s.ended && !moved.cut_short))
        s.readable = false;
    }
  }
  mark_ready(s);
}

bool Mesh::next_header(Stream& s, Clock at) {
  if (!s.has_header) {
    const auto bytes = staged_bytes(s).first(header_bytes(staged_bytes(s)));
    const std::size_t type = type_of(bytes);
    const bool known = type < Stream::kTypes;
    const HeaderBytes whole = lengthen(bytes, known ? s.received_last[type] : HeaderBytes{});
    const auto header = known ? parse(whole) : std::nullopt;
    // The type of a short header is said twice, and has to be the same.
    if (!header || static_cast<std::size_t>(header->type) != type) {
      emit(MeshEvent::Kind::refused, s.peer, "bytes that are no frame");
      close(s, "bytes that are no frame", at);
      return false;
    }
    if (may_be_short(header->type)) s.received_last[type] = whole;
    s.staged_from += bytes.size();
    s.in = *header;
    s.has_header = true;
  }
  return offer(s, at);
}

// False when reading has to stop (paused or closed).
bool Mesh::offer(Stream& s, Clock at) {
  const FrameType type = s.in.type;
  const bool liveness = type == FrameType::ping || type == FrameType::pong;
  s.in_from = s.peer;
  s.in_relay = false;
  const bool has_arrived = s.sharing && s.sharing->announced;
  if (type == FrameType::hello || (liveness && s.in.payload_bytes != 0)) {
    s.incoming = {Accept::refuse, nullptr, {}, "a hello or ping out of place"};
  } else if (liveness) {
    on_liveness_frame(s, at);
    return true;
  } else if (type > FrameType::state) {
    return on_sharing_frame(s, at);
  } else if (has_arrived && !fits(*s.sharing->announced, s.in.payload_bytes)) {
    s.incoming = {Accept::refuse, nullptr, {}, "a payload beyond its memory"};
  } else if ((s.in.flags & kFlagRelayed) == 0) {
    s.incoming = handler_.on_header(s.peer, s.in, has_arrived);
  } else if (s.in.dst == own_slot_) {
    s.in_from = peer_of(s.in.src);
    Header direct = s.in;
    direct.flags &= static_cast<std::uint8_t>(~kFlagRelayed);
    // Of a peer that we do not know yet: its view is ahead of ours.
    s.incoming = s.in_from != 0 ? handler_.on_header(s.in_from, direct, has_arrived)
                                : Incoming{Accept::later, nullptr, {}, ""};
  } else {
    s.incoming = offer_relayed(s);
  }
  if (s.incoming.accept == Accept::later) {
    s.paused = true;
    return false;
  }
  if (s.incoming.accept == Accept::refuse) {
    emit(MeshEvent::Kind::refused, s.in_from, s.incoming.reason);
    close(s, std::string("refused: ") + s.incoming.reason, at);
    return false;
  }
  if (!s.in_relay) s.in.flags &= static_cast<std::uint8_t>(~kFlagRelayed);
  s.has_header = false;
  s.in_payload = true;
  s.in_got = 0;
  if (has_arrived) take_loan(s);
  return true;
}

void Mesh::on_liveness_frame(Stream& s, Clock at) {
  s.has_header = false;
  Link& link = *link_of(s.peer);
  if (s.in.type == FrameType::pong) {
    if (s.ping_sent != 0) {
      const double rtt_s = at - s.ping_sent;
      link.rtt_s = link.rtt_s == 0.0 ? rtt_s : std::min(rtt_s, link.rtt_s * 1.05);
      s.ping_sent = 0;
    }
  } else if ((s.in.flags & kFlagRelayed) != 0) {
    // A relay says that frames between us and that peer may be lost.
    const PeerId far = peer_of(s.in.src);
    if (Link* other = link_of(far)) frames_lost(*other);
  } else {
    Header pong = s.in;
    pong.type = FrameType::pong;
    push_control(s, pong);
    mark_ready(s);
  }
}

// Only the peer at the other end may send through us, and only to a peer of the view.
Incoming Mesh::offer_relayed(Stream& s) {
  const Link* from = link_of(s.peer);
  if (from == nullptr || own_slot_ == kNoSlot) return {Accept::later, nullptr, {}, ""};
  if (from->slot != s.in.src) return {Accept::refuse, nullptr, {}, "relayed frame of another peer"};
  Link* to = link_of(peer_of(s.in.dst));
  if (to == nullptr) return {Accept::later, nullptr, {}, ""};  // not in our view yet
  to->relay_sources |= SlotMask{1} << s.in.src;
  const std::size_t held = to->relay_bytes + to->relay_reserved;
  if (held != 0 && held + s.in.payload_bytes > kRelayBytes) {
    // A slow destination slows its sources; a missing one must not, its frames are sent again when
    // tell_sources has said that they were lost.
    if (to->streams.empty()) return {Accept::drop, nullptr, {}, "no link to the destination"};
    return {Accept::later, nullptr, {}, ""};
  }
  auto payload = std::make_shared<std::vector<std::byte>>(s.in.payload_bytes);
  to->relay_reserved += s.in.payload_bytes;
  s.in_relay = true;
  return {Accept::take, payload->data(), payload, ""};
}

Moved Mesh::fill_payload(Stream& s) {
  const std::size_t left = s.in.payload_bytes - s.in_got;
  const bool take = s.incoming.accept == Accept::take;
  if (s.staged() != 0) {
    const std::size_t n = std::min(left, s.staged());
    if (take) std::memcpy(s.incoming.target + s.in_got, s.staging.get() + s.staged_from, n);
    s.staged_from += n;
    s.in_got += n;
    return {};
  }
  s.staged_from = s.staged_to = 0;
  const std::size_t room = take ? options_.io_bytes : discard_.size();
  std::array<iovec, 2> parts{};
  parts[0] = {take ? s.incoming.target + s.in_got : discard_.data(), std::min(left, room)};
  parts[1] = {s.staging.get(), kStagingBytes};
  const std::size_t body = parts[0].iov_len;
  const bool with_staging = body == left;
  // Behind a large frame comes another: its header, and no payload that would be copied twice.
  parts[1].iov_len = body >= kLargeFrameBytes ? kHeaderBytes : kStagingBytes;
  const std::size_t wanted = body + (with_staging ? parts[1].iov_len : 0);
  const Moved moved = s.channel.read(parts.data(), with_staging ? 2 : 1);
  s.in_got += std::min(body, moved.bytes);
  if (moved.bytes > body) s.staged_to = moved.bytes - body;
  if (moved.blocked || (moved.bytes < wanted && !s.ended && !moved.cut_short)) s.readable = false;
  return moved;
}

void Mesh::finish_frame(Stream& s, Clock) {
  s.in_payload = false;
  Incoming incoming = std::exchange(s.incoming, {});
  if (!s.in_relay) {
    if (incoming.accept == Accept::take) handler_.on_payload(s.in_from, s.in, std::move(incoming));
    return;
  }
  s.in_relay = false;
  Link* to = link_of(peer_of(s.in.dst));
  if (to == nullptr) return;  // left the view meanwhile
  to->relay_reserved -= std::min<std::size_t>(to->relay_reserved, s.in.payload_bytes);
  to->relay_bytes += s.in.payload_bytes;
  to->relay.push_back({s.in, std::static_pointer_cast<std::vector<std::byte>>(incoming.keep)});
}

// ---- out

void Mesh::push_control(Stream& s, const Header& header) {
  Stream::Out out;
  out.frame.header = header;
  write(header, out.header);
  // Ahead of what waits, behind the frame that is partly out.
  s.out.insert(s.out.begin() + (s.out_sent > 0 ? 1 : 0), std::move(out));
}

void Mesh::write_some(Stream& s, Clock at) {
  if (!s.writable) return;
  const Moved before = s.channel.flush();
  if (before.failed) return close(s, std::strerror(before.error), at);
  if (before.blocked) {
    s.writable = false;
    s.blocked = true;
    return;
  }
  for (int turn = 0; turn < kTurnsPerServe; ++turn) {
    if (!s.writable) return;
    if (s.out.empty() && !(s.live() && refill(s))) return;
    std::array<iovec, 2 * (kFramesPerWrite + 1)> parts{};
    int count = 0;
    std::size_t skip = s.out_sent;
    std::size_t wanted = 0;
    const int descriptor = s.out_sent == 0 ? s.out.front().descriptor : -1;
    for (const Stream::Out& out : s.out) {
      // What comes with a descriptor goes alone.
      if (count != 0 && (descriptor >= 0 || out.descriptor >= 0)) break;
      if (count + 2 > static_cast<int>(parts.size()) || wanted >= options_.io_bytes) break;
      const std::array<std::pair<const std::byte*, std::size_t>, 2> pieces{
          {{out.header.data(), out.header_bytes}, {out.frame.payload, out.payload_bytes()}}};
      for (const auto& [from, size] : pieces) {
        const std::size_t n = size - std::min(size, skip);
        if (n == 0) {
          skip -= size;
          continue;
        }
        const std::size_t offered =
            std::min(n, options_.io_bytes - std::min(wanted, options_.io_bytes));
        if (offered == 0) break;
        parts[static_cast<std::size_t>(count++)] = {const_cast<std::byte*>(from) + skip, offered};
        wanted += offered;
        skip = 0;
        if (offered < n) break;
      }
    }
    const Moved moved = s.channel.write(parts.data(), count, descriptor);
    if (moved.failed) return close(s, std::strerror(moved.error), at);
    if (moved.blocked) {
      s.writable = false;
      s.blocked = true;
    }
    if (moved.bytes != 0) wrote(s, moved.bytes, at);
  }
  if (s.writable) mark_ready(s);
}

void Mesh::wrote(Stream& s, std::size_t bytes, Clock at) {
  s.sent_bytes += bytes;
  if (!s.channel.is_unix()) tcp_sent_bytes_ += bytes;
  if (!s.owes) {
    s.owes = true;
    s.last_acknowledged = at;
    due(at + options_.link_timeout_s);
  }
  s.out_sent += bytes;
  while (!s.out.empty()) {
    const std::size_t size = s.out.front().bytes();
    if (s.out_sent < size) break;
    s.out_sent -= size;
    if (size >= kLargeFrameBytes && s.frame_started != 0) {
      s.frame_s += 0.25 * ((at - s.frame_started) - s.frame_s);
    }
    s.frame_started = at;
    s.out.pop_front();
  }
}

void Mesh::push_back(Stream& s, Stream::Out out) {
  HeaderBytes whole;
  write(out.frame.header, whole);
  assert(may_be_short(out.frame.header.type));
  HeaderBytes& last = s.sent_last[static_cast<std::size_t>(out.frame.header.type)];
  out.header_bytes = shorten(whole, last, out.header);
  last = whole;
  s.out.push_back(std::move(out));
}

// Takes frames for an empty stream: one large one, or small ones up to a bound. Within a host no
// other stream would be faster, so there as many as one system call moves.
bool Mesh::refill(Stream& s) {
  Link* link = link_of(s.peer);
  if (link == nullptr) return false;
  std::size_t bytes = 0;
  const std::size_t enough = s.local ? options_.io_bytes : kGatherBytes;
  while (s.out.size() < kFramesPerWrite && bytes < enough) {
    Stream::Out out;
    if (!next_for(*link, out.frame)) break;
    if (s.sharing && lend(s, out.frame)) {
      bytes += out.frame.header.payload_bytes;
      out.lent = true;
    }
    bytes += out.bytes();
    push_back(s, std::move(out));
  }
  s.frame_started = now();
  if (bytes >= kBulkBytes) start_bulk(s, *link);
  return !s.out.empty();
}

// Many bytes are about to go. Small rounds are left to the kernel's own control: BBR spreads them
// over time, at the low rate that it has seen of them.
void Mesh::start_bulk(Stream& s, const Link& link) {
  const Clock at = s.frame_started;
  const bool after_pause = at - std::exchange(s.bulk_at, at) > kPause_s;
  if (std::exchange(s.chooses, false)) {
    s.channel.choose_congestion(options_.socket.congestion);
  } else if (after_pause && link.ceiling > 0.0) {
    // What BBR knows is from before the pause: it would stop in the middle of a round to measure
    // the delay again, and begin at what a few words in the pause carried. The ceiling is what to
    // trust.
    s.channel.restart_control();
  }
}

bool Mesh::next_for(Link& link, OutFrame& frame) {
  if (!link.relay.empty()) {
    Relayed next = std::move(link.relay.front());
    link.relay.pop_front();
    const bool was_full = link.relay_bytes > kRelayBytes / 2;
    link.relay_bytes -= next.header.payload_bytes;
    if (was_full && link.relay_bytes <= kRelayBytes / 2) resume_paused();
    frame.header = next.header;
    frame.payload = next.payload->data();
    frame.keep = next.payload;
    return true;
  }
  link.turn = !link.turn;
  if (link.turn && next_routed(link, frame)) return true;
  if (handler_.next_frame(link.peer, frame)) return true;
  return !link.turn && next_routed(link, frame);
}

// A frame for a peer that is reached through this one.
bool Mesh::next_routed(Link& link, OutFrame& frame) {
  if (own_slot_ == kNoSlot) return false;
  for (auto& [peer, other] : links_) {
    if (other.via != link.peer || !other.streams.empty() || !handler_.has_frames(peer)) continue;
    if (!handler_.next_frame(peer, frame)) continue;
    frame.header.flags |= kFlagRelayed;
    frame.header.src = own_slot_;
    frame.header.dst = other.slot;
    return true;
  }
  return false;
}

bool Mesh::anything_for(const Link& link) const {
  if (!link.relay.empty() || handler_.has_frames(link.peer)) return true;
  for (const auto& [peer, other] : links_) {
    if (other.via == link.peer && other.streams.empty() && handler_.has_frames(peer)) return true;
  }
  return false;
}

void Mesh::resume_paused() {
  for (auto& [id, s] : streams_) {
    if (!s->paused || !s->live()) continue;
    s->paused = false;
    s->last_received = now();  // the pause was ours
    mark_ready(*s);
  }
}

void Mesh::reoffer(Clock) { resume_paused(); }

// Frames may have appeared for any link since the last turn.
void Mesh::pump(Clock at) {
  for (auto& [peer, link] : links_) {
    if (link.streams.empty()) continue;
    const std::vector<std::uint64_t> ids = link.streams;
    for (const std::uint64_t id : ids) {
      Stream* s = stream(id);
      if (s == nullptr || !s->writable || s->queued) continue;
      return_loans(*s);
      if (s->out.empty() && !anything_for(link)) break;
      write_some(*s, at);
    }
    note_busy(link, at);
  }
  note_uplink(at);
}

// Frames that went through us to this peer may be lost: their senders must compare with it.
void Mesh::tell_sources(Link& link) {
  const SlotMask sources = std::exchange(link.relay_sources, 0);
  for (std::uint8_t slot = 0; slot < kMaxPeers; ++slot) {
    if ((sources >> slot & 1) == 0) continue;
    const Link* source = link_of(peer_of(slot));
    if (source == nullptr || source->streams.empty()) continue;
    Stream* s = stream(source->streams.front());
    if (s == nullptr) continue;
    Header lost;
    lost.type = FrameType::ping;
    lost.flags = kFlagRelayed;
    lost.src = link.slot;
    lost.dst = slot;
    push_control(*s, lost);
    mark_ready(*s);
  }
}

}  // namespace decotrain::net
