// Mesh, third part: who is dialled when, which stream has stopped moving, how many a link needs.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "net/mesh.h"

namespace decotrain::net {
namespace {

constexpr double kIdleTurn_s = 1.0;
constexpr double kGrowthMinRtt_s = 0.005;  // below it one stream fills the path
constexpr double kLongPath_s = 0.02;
// From here on 2 streams of BBR: while one of them measures the delay the other one goes on. On a
// shorter path that takes little, and where a slow uplink is shared by several links one stream for
// each is steadier.
constexpr double kMeasuredLong_s = 0.05;
constexpr double kGrowthMinBytes = 256 << 10;   // bandwidth x delay below which more is no use
constexpr double kGrowthMinBytesBbr = 2 << 20;  // for each stream: what the kernel buffers for it
constexpr double kGrowthGain = 1.15;
constexpr double kGrowthPause_s = 30.0;
constexpr double kPaceMin_s = 0.1;       // between two measurements of a path,
constexpr double kPaceRoundTrips = 2.0;  // and at least so many of its round trips
constexpr double kUnsent_s = 0.02;       // of a stream's rate, what waits in the kernel
constexpr std::size_t kUnsentMinBytes = 16 << 10;
constexpr double kUplinkDecay = 0.9;  // for each judgement
constexpr double kJudgeBusy_s = 0.5;  // time with something to send before the rate is judged

}  // namespace

std::size_t streams_for(double rtt_s, bool fears_loss) {
  if (rtt_s < kGrowthMinRtt_s) return 1;
  if (!fears_loss) return rtt_s < kMeasuredLong_s ? 1 : 2;
  return rtt_s < kLongPath_s ? 4 : 8;
}

void Mesh::set_peers(const std::vector<PeerInfo>& peers, Clock at) {
  slots_.fill(0);
  own_slot_ = kNoSlot;
  std::map<PeerId, bool> named;
  std::map<PeerId, std::string> keys;
  for (const PeerInfo& info : peers) {
    if (info.slot < kMaxPeers) slots_[info.slot] = info.peer;
    if (info.peer == self_) {
      own_slot_ = info.slot;
      can_be_dialled_ = !info.addresses.empty();
      continue;
    }
    named[info.peer] = true;
    if (!info.pair_key.empty()) keys[info.peer] = info.pair_key;
    const auto [it, fresh] = links_.try_emplace(info.peer);
    Link& link = it->second;
    if (fresh) {
      link.peer = info.peer;
      link.down_since = at;
      link.target_streams = std::clamp<std::size_t>(options_.streams, 1, kMaxStreams);
    }
    link.slot = info.slot;
    link.addresses.clear();
    for (const std::string& text : info.addresses) {
      const auto address = parse_numeric(text);
      if (!address || (address->is_unix() && options_.force_tcp)) continue;
      // Unix sockets first: the fastest way to a peer of this host.
      link.addresses.insert(address->is_unix() ? link.addresses.begin() : link.addresses.end(),
                            *address);
    }
  }
  if (tls_) tls_->set_keys(std::move(keys));
  for (const auto& [id, s] : streams_) {
    if (s->peer == 0 || s->state == Stream::State::waiting) continue;
    if (s->state != Stream::State::closed && !named.contains(s->peer)) {
      close(*s, "not in the view", at);
    }
  }
  std::erase_if(links_, [&](const auto& entry) {
    if (named.contains(entry.first)) return false;
    gone_.sent_bytes += entry.second.sent_bytes;
    gone_.received_bytes += entry.second.received_bytes;
    return true;
  });
  for (auto& [peer, link] : links_) {
    if (link.via != 0 && !named.contains(link.via)) link.via = 0;
  }
  adopt_waiting(at);
  resume_paused();
  due(at);
}

void Mesh::set_route(PeerId peer, PeerId via) {
  Link* link = link_of(peer);
  if (link == nullptr || link->via == via || via == peer) return;
  link->via = link_of(via) != nullptr ? via : 0;
  // What went another way before may be lost.
  if (link->streams.empty()) frames_lost(*link);
}

void Mesh::maintain(Clock at) {
  due_ = at + kIdleTurn_s;
  // When we have not run ourselves (a suspended process, a machine without air), the silence of
  // others says nothing about them: they get their time again.
  if (maintained_at_ != 0 && at - maintained_at_ > kIdleTurn_s + options_.link_timeout_s / 4.0) {
    for (auto& [id, s] : streams_) {
      s->born = s->last_received = s->last_acknowledged = at;
      if (s->ping_sent != 0) s->ping_sent = at;
    }
  }
  maintained_at_ = at;
  std::vector<std::uint64_t> ids;
  ids.reserve(streams_.size());
  for (const auto& [id, s] : streams_) ids.push_back(id);
  for (const std::uint64_t id : ids) {
    if (Stream* s = stream(id)) maintain_stream(*s, at);
  }
  for (auto& [peer, link] : links_) maintain_link(link, at);
  trim_arena(at);
}

void Mesh::maintain_stream(Stream& s, Clock at) {
  if (!s.live()) {
    if (at - s.born >= options_.handshake_timeout_s) return close(s, "no hello in time", at);
    return due(s.born + options_.handshake_timeout_s);
  }
  const double timeout_s = std::max(options_.link_timeout_s, 4.0 * s.frame_s);
  const std::size_t unacknowledged = s.channel.unacknowledged_bytes();
  const auto taken =
      static_cast<std::int64_t>(s.sent_bytes) - static_cast<std::int64_t>(unacknowledged);
  s.owes = unacknowledged != 0 || !s.out.empty();
  if (taken > s.acknowledged_bytes || !s.owes) {
    s.acknowledged_bytes = std::max(s.acknowledged_bytes, taken);
    s.last_acknowledged = at;
  }
  if (s.owes && at - s.last_acknowledged > timeout_s) {
    return close(s, "took no bytes for " + std::to_string(timeout_s) + " s", at);
  }
  const bool part_of_frame = s.in_payload || s.has_header || s.staged() != 0;
  if (part_of_frame && !s.paused && at - s.last_received > timeout_s) {
    return close(s, "stopped within a frame for " + std::to_string(timeout_s) + " s", at);
  }
  if (s.ping_sent != 0 && !s.paused) {
    const Clock heard = std::max(s.last_received, s.owes ? s.last_acknowledged : 0.0);
    if (at - std::max(heard, s.ping_sent) > timeout_s) {
      return close(s, "no answer to a ping for " + std::to_string(timeout_s) + " s", at);
    }
  } else if (s.ping_sent == 0 && at - s.last_received >= options_.ping_interval_s) {
    Header ping;
    ping.type = FrameType::ping;
    ping.src = ping.dst = 0;
    push_control(s, ping);
    s.ping_sent = at;
    mark_ready(s);
  }
  due(at + std::min(options_.ping_interval_s, timeout_s) / 4.0);
}

void Mesh::maintain_link(Link& link, Clock at) {
  judge_rate(link, at);
  if (link.dialling != 0 || link.streams.size() >= link.target_streams) return;
  if (!dials(link, at)) {
    if (!link.addresses.empty() && link.streams.empty()) {
      due(link.down_since + options_.dial_patience_s);
    }
    return;
  }
  if (at < link.may_dial_at) return due(link.may_dial_at);
  dial(link, at);
}

// The smaller id dials, so that two peers do not cross; the larger one when that does not work out,
// or when it cannot be dialled itself.
bool Mesh::dials(const Link& link, Clock at) const {
  if (link.addresses.empty()) return false;
  if (!link.streams.empty()) return link.ours;
  if (self_ < link.peer || !can_be_dialled_) return true;
  return at - link.down_since >= options_.dial_patience_s;
}

const Address* Mesh::pick_address(Link& link) {
  if (link.addresses.empty()) return nullptr;
  return &link.addresses[link.next_address % link.addresses.size()];
}

void Mesh::dial(Link& link, Clock at) {
  const Address* address = pick_address(link);
  if (address == nullptr) return;
  Fd fd = start_connect(*address, options_.socket);
  if (!fd) return dial_failed(link, at);
  Stream& s = add_stream(std::move(fd), address->is_unix(), at);
  s.state = Stream::State::connecting;
  s.dialled = true;
  s.peer = link.peer;
  s.index = static_cast<std::uint32_t>(link.streams.size());
  if (tls_ && !address->is_unix()) {
    s.channel.secure(Tls::dial(*tls_, s.channel.fd(), s.peer, s.index));
  }
  ++link.dialling;
}

void Mesh::dial_failed(Link& link, Clock at) {
  ++link.next_address;
  link.backoff_s = std::clamp(link.backoff_s * 2.0, options_.backoff_min_s, options_.backoff_max_s);
  std::uniform_real_distribution<double> jitter(0.5, 1.5);
  link.may_dial_at = at + link.backoff_s * jitter(jitter_);
  due(link.may_dial_at);
}

// Busy: the kernel has no room and there is more to send. Only then a rate says what the path can
// do.
void Mesh::note_busy(Link& link, Clock at) {
  bool busy = false;
  std::uint64_t sent = 0;
  for (const std::uint64_t id : link.streams) {
    const Stream* s = stream(id);
    if (s == nullptr) continue;
    busy = busy || (s->blocked && !s->out.empty());
    sent += s->sent_bytes;
  }
  if (link.busy_since != 0 && sent >= link.busy_mark) {
    link.busy_s += at - link.busy_since;
    link.watch.busy_s += at - link.busy_since;
    link.busy_bytes += sent - link.busy_mark;
  }
  link.busy_since = busy ? at : 0;
  link.busy_mark = sent;
  if (is_paced(link) && (busy || link.watch.busy_s > 0.0)) pace(link, at);
}

bool Mesh::is_paced(const Link& link) const {
  // A ceiling keeps CUBIC's windows from growing: what it then carries is learnt as all there is.
  return options_.socket.pace && !link.fears_loss && link.rtt_s >= kGrowthMinRtt_s;
}

// What the kernel says of a link's streams is added to `sum`; how many they are.
std::size_t Mesh::add_progress(const Link& link, PathProgress& sum) {
  std::size_t asked = 0;
  for (const std::uint64_t id : link.streams) {
    const Stream* s = stream(id);
    const auto one = s != nullptr ? s->channel.progress() : std::nullopt;
    if (!one) continue;
    ++asked;
    sum += *one;
  }
  return asked;
}

// Looks at what the kernel says of the streams and sets ceilings anew.
void Mesh::pace(Link& link, Clock at) {
  const double turn_s = std::max(kPaceMin_s, kPaceRoundTrips * link.rtt_s);
  if (!link.watch.due(at, turn_s)) return;
  PathProgress sum;
  const std::size_t asked = add_progress(link, sum);
  link.watch.look(sum, asked, at, turn_s);
  share_out();
}

// The same for all long links together.
void Mesh::pace_uplink(Clock at) {
  double rtt_s = 0.0;
  for (const auto& [peer, link] : links_) {
    if (is_paced(link)) rtt_s = std::max(rtt_s, link.rtt_s);
  }
  const double turn_s = std::max(kPaceMin_s, kPaceRoundTrips * rtt_s);
  if (rtt_s == 0.0 || !uplink_watch_.due(at, turn_s)) return;
  PathProgress sum;
  std::size_t asked = 0;
  for (const auto& [peer, link] : links_) {
    if (is_paced(link)) asked += add_progress(link, sum);
  }
  uplink_watch_.look(sum, asked, at, turn_s);
}

// Ceilings of all long links, alike for those that are about alike. The streams of a link get the
// same share: which of them a frame takes is decided as they have room.
void Mesh::share_out() {
  std::vector<Link*> paced;
  std::vector<double> learnt;
  for (auto& [peer, link] : links_) {
    if (link.streams.empty() || link.watch.pacer.ceiling() == 0.0) continue;
    paced.push_back(&link);
    learnt.push_back(link.watch.pacer.ceiling());
  }
  const std::vector<double> ceilings = level(learnt, uplink_watch_.pacer.ceiling());
  for (std::size_t i = 0; i < paced.size(); ++i) {
    paced[i]->ceiling = ceilings[i];
    const double each = ceilings[i] / static_cast<double>(paced[i]->streams.size());
    const auto unsent = static_cast<std::size_t>(kUnsent_s * each);
    for (const std::uint64_t id : paced[i]->streams) {
      Stream* s = stream(id);
      if (s == nullptr) continue;
      s->channel.limit_rate(each);
      s->channel.limit_unsent(
          std::clamp(unsent, kUnsentMinBytes, options_.socket.long_notsent_bytes));
    }
  }
}

// What this machine can send, all links together: owners' shares follow it. One slow receiver does
// not fill the uplink: it counts as full while most links have more to send than they take.
void Mesh::note_uplink(Clock at) {
  std::size_t waiting = 0;
  std::size_t up = 0;
  for (const auto& [peer, link] : links_) {
    const Stream* s = link.streams.empty() ? nullptr : stream(link.streams.front());
    if (s == nullptr || s->channel.is_unix()) continue;
    ++up;
    waiting += link.busy_since != 0 ? 1 : 0;
  }
  if (uplink_since_ != 0) {
    uplink_busy_s_ += at - uplink_since_;
    uplink_watch_.busy_s += at - uplink_since_;
    uplink_bytes_ += tcp_sent_bytes_ - uplink_mark_;
  }
  uplink_since_ = 2 * waiting > up ? at : 0;
  uplink_mark_ = tcp_sent_bytes_;
  if (uplink_watch_.busy_s > 0.0) pace_uplink(at);
  if (uplink_busy_s_ < kJudgeBusy_s) return;
  const double rate_bps = 8.0 * static_cast<double>(uplink_bytes_) / uplink_busy_s_;
  // One slow receiver holds less than all of the uplink busy: high figures last.
  uplink_bps_ = std::max(rate_bps, kUplinkDecay * uplink_bps_);
  uplink_busy_s_ = 0.0;
  uplink_bytes_ = 0;
}

// A long path takes more streams, and less in the kernel: what waits there has chosen its stream,
// and a slow one would hold up the end of a round.
void Mesh::suit_path(Link& link, Stream& s) {
  const double rtt_s = s.channel.rtt_s();
  if (link.rtt_s == 0.0) link.rtt_s = rtt_s;
  if (rtt_s >= kGrowthMinRtt_s) {
    s.channel.limit_unsent(options_.socket.long_notsent_bytes);
    s.chooses = !options_.socket.congestion.empty();
  }
  // Megabytes between two sockets of one host leave the cache on their way (measured: a quarter
  // of the processor time of a large round).
  s.local = s.channel.same_host();
  if (!s.channel.is_unix() && s.local) {
    s.channel.limit_in_flight(options_.socket.local_buffer_bytes);
  }
  link.fears_loss = s.channel.fears_loss() && !(s.chooses && bulk_fears_nothing_);
  if (options_.streams != 0) return;
  link.target_streams = std::max(link.target_streams, streams_for(link.rtt_s, link.fears_loss));
}

// Doubles the streams of a long path as long as that makes it faster.
void Mesh::judge_rate(Link& link, Clock at) {
  if (link.busy_s < kJudgeBusy_s) return;
  link.rate_bps = 8.0 * static_cast<double>(link.busy_bytes) / link.busy_s;
  link.busy_s = 0.0;
  link.busy_bytes = 0;
  if (options_.streams != 0 || !link.ours || at < link.no_growth_until) return;
  if (link.streams.size() < link.target_streams || link.target_streams >= kMaxStreams) return;
  const double in_flight_bytes = link.rate_bps / 8.0 * link.rtt_s;
  const double worth_it_bytes = link.fears_loss
                                    ? kGrowthMinBytes
                                    : kGrowthMinBytesBbr * static_cast<double>(link.streams.size());
  if (link.rtt_s < kGrowthMinRtt_s || in_flight_bytes < worth_it_bytes) return;
  if (link.rate_bps > link.rate_before * kGrowthGain) {
    link.rate_before = link.rate_bps;
    link.target_streams = std::min(kMaxStreams, link.target_streams * 2);
  } else {
    link.no_growth_until = at + kGrowthPause_s;
    link.rate_before = 0.8 * link.rate_bps;
  }
}

Mesh::Traffic Mesh::traffic() const {
  Traffic sum = gone_;
  for (const LinkStats& link : stats()) {
    sum.sent_bytes += link.sent_bytes;
    sum.received_bytes += link.received_bytes;
  }
  return sum;
}

std::vector<LinkStats> Mesh::stats() const {
  std::vector<LinkStats> out;
  for (const auto& [peer, link] : links_) {
    LinkStats stats;
    stats.peer = peer;
    stats.up = !link.streams.empty();
    stats.ours = link.ours;
    stats.streams = link.streams.size();
    stats.sent_bytes = link.sent_bytes;
    stats.received_bytes = link.received_bytes;
    stats.rtt_s = link.rtt_s;
    stats.rate_bps = link.rate_bps;
    stats.pace_bps = 8.0 * link.ceiling;
    stats.via = link.via;
    for (const std::uint64_t id : link.streams) {
      const auto it = streams_.find(id);
      if (it == streams_.end()) continue;
      stats.is_unix = stats.is_unix || it->second->channel.is_unix();
      stats.is_tls = stats.is_tls || it->second->channel.secured();
      stats.congestion = it->second->channel.congestion();
      stats.sent_bytes += it->second->sent_bytes;
      stats.received_bytes += it->second->received_bytes;
      if (const Sharing* sharing = it->second->sharing.get()) {
        stats.is_shared = stats.is_shared || sharing->lends;
        stats.sent_bytes += sharing->lent_bytes;
        stats.received_bytes += sharing->borrowed_bytes;
      }
    }
    out.push_back(stats);
  }
  return out;
}

}  // namespace decotrain::net
