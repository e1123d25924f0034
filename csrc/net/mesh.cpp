// Mesh, first part: descriptors, connections and their handshake (docs/links.md).
#include "net/mesh.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace decotrain::net {
namespace {

constexpr std::uint64_t kWakeId = ~std::uint64_t{0};
constexpr std::uint64_t kListenerBit = std::uint64_t{1} << 63;
constexpr int kEventsPerTurn = 64;
constexpr int kAcceptsPerTurn = 64;
constexpr std::size_t kDiscardBytes = 256 << 10;

std::string system_error(const std::string& what, int error) {
  return what + ": " + std::strerror(error);
}

}  // namespace

Clock Mesh::now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

Mesh::Mesh(PeerId self, const std::vector<std::string>& listen_to, MeshOptions options,
           MeshHandler handler)
    : self_(self),
      options_(std::move(options)),
      handler_(std::move(handler)),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      wake_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      spare_(::open("/dev/null", O_RDONLY | O_CLOEXEC)),
      bulk_fears_nothing_(fearless(options_.socket.congestion)),
      discard_(kDiscardBytes),
      jitter_(self) {
  if (!options_.tls_key.empty() || options_.pair_keys) {
    tls_ = std::make_unique<TlsContext>(options_.tls_key, options_.run_fingerprint, self_);
  }
  if (options_.shared_bytes != 0) arena_ = std::make_unique<Arena>(options_.shared_bytes);
  if (!epoll_ || !wake_) throw std::runtime_error(system_error("cannot start the mesh", errno));
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWakeId;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event);
  for (const std::string& text : listen_to) listen(text);
}

Mesh::~Mesh() = default;

void Mesh::listen(const std::string& text) {
  const std::string wanted = text == "unix://" ? fresh_unix_address() : text;
  const auto address = parse_numeric(wanted);
  if (!address) {
    throw std::runtime_error("cannot listen on " + text +
                             ": give tcp://ADDRESS:PORT with a numeric address, or unix://");
  }
  Fd fd = listen_on(*address);
  if (!fd) throw std::runtime_error(system_error("cannot listen on " + text, errno));
  addresses_.push_back(bound_address(fd.get()).text());
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kListenerBit | listeners_.size();
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd.get(), &event);
  listeners_.push_back({std::move(fd), address->is_unix()});
}

void Mesh::shut() {
  for (const auto& [id, s] : streams_) s->channel.close();
  listeners_.clear();
}

void Mesh::wake() {
  const std::uint64_t one = 1;
  // The counter can only be full when a wake-up is pending already.
  [[maybe_unused]] const ssize_t n = ::write(wake_.get(), &one, sizeof one);
}

void Mesh::run_once(Clock until) {
  Clock at = now();
  if (at >= due_) maintain(at);
  pump(at);
  reap();
  int timeout_ms = 0;
  if (ready_.empty()) {
    const double wait_s = std::max(0.0, std::min(until, due_) - now());
    timeout_ms = static_cast<int>(std::ceil(std::min(wait_s, 60.0) * 1000.0));
  }
  std::array<epoll_event, kEventsPerTurn> events{};
  const int n = ::epoll_wait(epoll_.get(), events.data(), kEventsPerTurn, timeout_ms);
  at = now();
  for (int i = 0; i < n; ++i) {
    const epoll_event& event = events[static_cast<std::size_t>(i)];
    if (event.data.u64 == kWakeId) {
      std::uint64_t count = 0;
      [[maybe_unused]] const ssize_t got = ::read(wake_.get(), &count, sizeof count);
    } else if ((event.data.u64 & kListenerBit) != 0) {
      accept_some(listeners_[event.data.u64 & ~kListenerBit], at);
    } else {
      on_ready(event.data.u64, event.events, at);
    }
  }
  std::vector<std::uint64_t> ready;
  ready.swap(ready_);
  for (const std::uint64_t id : ready) serve(id, at);
  pump(at);
  reap();
}

void Mesh::on_ready(std::uint64_t id, std::uint32_t events, Clock at) {
  Stream* s = stream(id);
  if (s == nullptr) return;
  if ((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) s->ended = true;
  if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) s->readable = true;
  if ((events & EPOLLOUT) != 0) {
    s->writable = true;
    s->blocked = false;
  }
  if (s->state == Stream::State::connecting) {
    connected(*s, at);
    if (s->state == Stream::State::closed) return;
  }
  // TLS reads to write and writes to read: whatever happened, both may go on.
  if (s->channel.secured()) s->readable = s->writable = true;
  // A frame that waits for a view would hide the end of its stream.
  if (s->paused && (events & (EPOLLHUP | EPOLLERR)) != 0) {
    close(*s, "closed by the other side", at);
    return;
  }
  mark_ready(*s);
}

void Mesh::serve(std::uint64_t id, Clock at) {
  Stream* s = stream(id);
  if (s == nullptr) return;
  s->queued = false;
  if (s->state == Stream::State::greeting) read_hello(*s, at);
  if (s->live()) read_some(*s, at);
  if (s->state != Stream::State::closed && s->state != Stream::State::connecting) {
    return_loans(*s);
    write_some(*s, at);
  }
}

void Mesh::mark_ready(Stream& s) {
  if (s.queued) return;
  s.queued = true;
  ready_.push_back(s.id);
}

Stream& Mesh::add_stream(Fd fd, bool is_unix, Clock at) {
  auto made = std::make_unique<Stream>();
  Stream& s = *made;
  s.id = ++next_id_;
  s.channel = Channel(std::move(fd), is_unix);
  s.born = s.last_received = s.last_acknowledged = at;
  streams_.emplace(s.id, std::move(made));
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.u64 = s.id;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, s.channel.fd(), &event);
  due(at + options_.handshake_timeout_s);
  return s;
}

void Mesh::accept_some(Listener& listener, Clock at) {
  for (int i = 0; i < kAcceptsPerTurn; ++i) {
    Address from;
    from.length = sizeof from.storage;
    Fd fd(::accept4(listener.fd.get(), from.get(), &from.length, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) {
      if (errno != EMFILE && errno != ENFILE) return;
      // Out of descriptors: give up the spare one to take the connection off the queue (else the
      // listener stays ready for ever), and refuse it.
      emit(MeshEvent::Kind::no_descriptors, 0, "too many open files: a connection was refused");
      spare_.reset();
      Fd refused(::accept4(listener.fd.get(), nullptr, nullptr, SOCK_CLOEXEC));
      refused.reset();
      spare_.reset(::open("/dev/null", O_RDONLY | O_CLOEXEC));
      return;
    }
    const std::uint64_t origin = listener.is_unix ? 1 : from.origin();
    make_room_for_stranger(origin);
    set_options(fd.get(), listener.is_unix, options_.socket);
    Stream& s = add_stream(std::move(fd), listener.is_unix, at);
    s.origin = origin;
    strangers_.push_back(s.id);
    if (listener.is_unix && !s.channel.same_user()) {
      close(s, "a process of another user", at);
    } else if (!listener.is_unix && tls_) {
      s.channel.secure(Tls::accept(*tls_, s.channel.fd()));
    }
  }
}

// A crowd of silent connections must not keep a peer out: the oldest goes, because a peer needs its
// place for one round trip only.
void Mesh::make_room_for_stranger(std::uint64_t origin) {
  std::size_t same = 0;
  std::uint64_t oldest_same = 0;
  for (const std::uint64_t id : strangers_) {
    const Stream* s = stream(id);
    if (s == nullptr || s->origin != origin) continue;
    if (same++ == 0) oldest_same = id;
  }
  std::uint64_t victim = 0;
  if (same >= kMaxStrangersPerOrigin) {
    victim = oldest_same;
  } else if (strangers_.size() >= kMaxStrangers) {
    victim = strangers_.front();
  }
  if (victim == 0) return;
  if (Stream* s = stream(victim)) close(*s, "too many connections without a hello", now());
}

void Mesh::forget_stranger(std::uint64_t id) {
  const auto it = std::find(strangers_.begin(), strangers_.end(), id);
  if (it != strangers_.end()) strangers_.erase(it);
}

void Mesh::connected(Stream& s, Clock at) {
  if (const int error = s.channel.pending_error(); error != 0) {
    close(s, std::strerror(error), at);
    return;
  }
  if (!s.writable) return;
  if (s.channel.is_unix() && !s.channel.same_user()) {
    close(s, "a process of another user", at);
    return;
  }
  s.state = Stream::State::greeting;
  send_hello(s, at);
}

void Mesh::send_hello(Stream& s, Clock) {
  Header hello;
  hello.type = FrameType::hello;
  hello.src = hello.dst = 0;
  hello.tag = kProtocolVersion;
  hello.chunk = s.index;
  hello.spec_digest = arena_ && s.channel.is_unix() ? kHelloTakesMemory : 0;
  hello.seq = host_id();
  hello.a = options_.run_fingerprint;
  hello.b = self_;
  hello.c = s.peer;
  push_control(s, hello);
}

void Mesh::read_hello(Stream& s, Clock at) {
  while (s.readable && s.hello_got < kHeaderBytes) {
    iovec part{s.hello_bytes.data() + s.hello_got, kHeaderBytes - s.hello_got};
    const Moved moved = s.channel.read(&part, 1);
    if (moved.failed) {
      close(s, moved.error != 0 ? std::strerror(moved.error) : "closed before its hello", at);
      return;
    }
    if (moved.blocked) s.readable = false;
    s.hello_got += moved.bytes;
  }
  if (s.hello_got == kHeaderBytes) check_hello(s, at);
}

void Mesh::check_hello(Stream& s, Clock at) {
  const auto hello = parse(s.hello_bytes);
  std::string wrong;
  if (!hello || hello->type != FrameType::hello || hello->payload_bytes != 0) {
    wrong = "no hello of ours";
  } else if (hello->tag != kProtocolVersion) {
    wrong = "protocol version " + std::to_string(hello->tag) + ", ours is " +
            std::to_string(kProtocolVersion);
  } else if (hello->a != options_.run_fingerprint) {
    wrong = "another run or another token";
  } else if (hello->c != self_ || hello->b == 0 || hello->b == self_) {
    wrong = "meant for another peer";
  } else if (s.dialled && hello->b != s.peer) {
    wrong = "another peer answers at this address";
  } else if (!s.channel.vouches_for(hello->b, hello->chunk)) {
    wrong = "a hello of another peer than the one that showed the key";
  }
  if (!wrong.empty()) {
    emit(MeshEvent::Kind::stranger, s.dialled ? s.peer : (hello ? hello->b : 0), wrong);
    close(s, wrong, at);
    return;
  }
  // NOLINTBEGIN(bugprone-unchecked-optional-access): without a hello something was wrong above
  s.peer = hello->b;
  s.index = hello->chunk;
  s.far_takes_memory = s.channel.is_unix() && (hello->spec_digest & kHelloTakesMemory) != 0;
  // NOLINTEND(bugprone-unchecked-optional-access)
  const Link* link = link_of(s.peer);
  if (link == nullptr) {
    s.state = Stream::State::waiting;  // its view may be ahead of ours: set_peers decides
    return;
  }
  opened(s, at);
}

void Mesh::opened(Stream& s, Clock at) {
  Link& link = *link_of(s.peer);
  if (link.streams.size() >= kMaxStreams) {
    close(s, "more streams than a link may have", at);
    return;
  }
  forget_stranger(s.id);
  if (!s.dialled) send_hello(s, at);
  if (s.dialled) --link.dialling;
  s.state = Stream::State::open;
  s.staging = std::make_unique<std::byte[]>(kStagingBytes);
  s.last_received = s.last_acknowledged = s.born = at;
  link.ours = s.dialled;
  start_sharing(s);
  link.streams.push_back(s.id);
  suit_path(link, s);
  if (link.streams.size() == 1) {
    emit(MeshEvent::Kind::link_up, link.peer,
         s.channel.is_unix()   ? "unix"
         : s.channel.secured() ? "tls"
                               : "tcp");
    if (std::exchange(link.lost_frames, false)) handler_.on_link_reset(link.peer);
    for (auto& [peer, other] : links_) {
      if (other.via != link.peer || has_live(peer)) continue;
      if (std::exchange(other.lost_frames, false)) handler_.on_link_reset(peer);
    }
    tell_sources(link);
  }
  due(at);
  mark_ready(s);
}

void Mesh::adopt_waiting(Clock at) {
  const std::deque<std::uint64_t> strangers = strangers_;
  for (const std::uint64_t id : strangers) {
    Stream* s = stream(id);
    if (s == nullptr || s->state != Stream::State::waiting) continue;
    if (link_of(s->peer) != nullptr) opened(*s, at);
  }
}

// What was under way on a stream is gone: both ends compare what they have as soon as they can.
void Mesh::frames_lost(Link& link) {
  if (has_live(link.peer) || (link.via != 0 && has_live(link.via))) {
    link.lost_frames = false;
    handler_.on_link_reset(link.peer);
  } else {
    link.lost_frames = true;
  }
}

void Mesh::close(Stream& s, const std::string& reason, Clock at) {
  if (s.state == Stream::State::closed) return;
  const bool was_live = s.live();
  const bool was_dialling = s.dialled && !was_live;
  s.state = Stream::State::closed;
  stop_sharing(s);
  s.channel.close();
  s.out.clear();
  dead_.push_back(s.id);
  forget_stranger(s.id);
  if (s.in_relay) {
    if (Link* to = link_of(peer_of(s.in.dst))) to->relay_reserved -= s.in.payload_bytes;
    s.in_relay = false;
  }
  s.incoming = {};
  Link* link = link_of(s.peer);
  if (link == nullptr) return;
  if (was_dialling) {
    --link->dialling;
    dial_failed(*link, at);
  }
  if (!was_live) return;
  std::erase(link->streams, s.id);
  link->sent_bytes += s.sent_bytes;
  link->received_bytes += s.received_bytes;
  if (at - s.born > 1.0) link->backoff_s = 0.0;
  dial_failed(*link, at);
  if (link->streams.empty()) {
    link->down_since = at;
    link->target_streams = std::max<std::size_t>(1, options_.streams);
    emit(MeshEvent::Kind::link_down, link->peer, reason);
  }
  frames_lost(*link);
  for (auto& [peer, other] : links_) {
    if (other.via == link->peer && !has_live(peer)) frames_lost(other);
  }
  if (!link->streams.empty()) tell_sources(*link);
}

void Mesh::reap() {
  for (const std::uint64_t id : dead_) streams_.erase(id);
  dead_.clear();
}

void Mesh::emit(MeshEvent::Kind kind, PeerId peer, std::string detail) {
  if (events_.size() < kMaxEvents) events_.push_back({kind, peer, std::move(detail)});
}

std::vector<MeshEvent> Mesh::take_events() { return std::exchange(events_, {}); }

Stream* Mesh::stream(std::uint64_t id) {
  const auto it = streams_.find(id);
  if (it == streams_.end() || it->second->state == Stream::State::closed) return nullptr;
  return it->second.get();
}

Mesh::Link* Mesh::link_of(PeerId peer) {
  const auto it = links_.find(peer);
  return it == links_.end() ? nullptr : &it->second;
}
const Mesh::Link* Mesh::link_of(PeerId peer) const {
  const auto it = links_.find(peer);
  return it == links_.end() ? nullptr : &it->second;
}

PeerId Mesh::peer_of(std::uint8_t slot) const { return slot < kMaxPeers ? slots_[slot] : 0; }

bool Mesh::has_live(PeerId peer) const {
  const Link* link = link_of(peer);
  return link != nullptr && !link->streams.empty();
}

}  // namespace decotrain::net
