// TLS of the data plane: who knows the key gets through and nobody else, whatever arrives when.
#include <doctest/doctest.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <string>

#include "mesh_peer.h"

namespace decotrain::net {
namespace {

using Bytes = std::vector<std::byte>;

const std::string kKey(kTlsKeyBytes, 'k');
constexpr std::uint64_t kRun = 7;
constexpr PeerId kAlice = 100, kBob = 101;

struct Pair {
  Fd a, b;
};

// Two ends of a TCP connection, non-blocking, with little room in the kernel.
Pair connected_pair() {
  Fd listener = listen_on(*parse_numeric("tcp://127.0.0.1:0"));
  SocketOptions options;
  Pair pair;
  pair.a = start_connect(bound_address(listener.get()), options);
  pollfd wait{listener.get(), POLLIN, 0};
  REQUIRE(::poll(&wait, 1, 10'000) == 1);
  pair.b.reset(::accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  REQUIRE(static_cast<bool>(pair.b));
  const int room = 16 << 10;
  (void)setsockopt(pair.a.get(), SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
  return pair;
}

// What arrives at a raw socket until it is quiet or has ended; nothing: it has ended.
Bytes drain(int fd, int quiet_ms = 20) {
  Bytes out;
  pollfd wait{fd, POLLIN, 0};
  while (::poll(&wait, 1, quiet_ms) == 1) {
    std::array<std::byte, 4096> part{};
    const ssize_t n = ::recv(fd, part.data(), part.size(), MSG_DONTWAIT);
    if (n <= 0) break;
    out.insert(out.end(), part.begin(), part.begin() + n);
  }
  return out;
}

bool ended(int fd) {
  char byte = 0;
  const ssize_t n = ::recv(fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
  return n == 0 || (n < 0 && errno != EAGAIN);
}

Moved read_one(Tls& tls) {
  std::byte byte{};
  iovec part{&byte, 1};
  return tls.read(&part, 1);
}

// Both go on until neither has anything to say.
void shake(Tls& a, Tls& b) {
  for (int i = 0; i < 1000 && !(a.ready() && b.ready()); ++i) {
    const bool lost = read_one(a).failed | read_one(b).failed;
    if (lost) return;
  }
}

struct Ends {
  Pair sockets = connected_pair();
  TlsContext alice, bob;
  std::unique_ptr<Tls> a, b;

  explicit Ends(const std::string& bobs_key = kKey, std::uint64_t bobs_run = kRun, PeerId to = kBob,
                PeerId bobs_id = kBob, std::uint64_t records_per_key = 1 << 23)
      : alice(kKey, kRun, kAlice, records_per_key),
        bob(bobs_key, bobs_run, bobs_id, records_per_key),
        a(Tls::dial(alice, sockets.a.get(), to, 3)),
        b(Tls::accept(bob, sockets.b.get())) {}
};

// Sends `data` from one to the other in pieces of random sizes.
void carry(Tls& from, Tls& to, const Bytes& data, unsigned seed) {
  std::mt19937 random(seed);
  Bytes got;
  std::size_t sent = 0;
  for (int idle = 0; got.size() < data.size() && idle < 100'000;) {
    std::vector<iovec> parts;
    std::size_t offered = 0;
    while (parts.size() < 5 && sent + offered < data.size()) {
      const std::size_t limit = std::size_t{1} << (random() % 20);
      const std::size_t n = std::min(data.size() - sent - offered, 1 + random() % limit);
      parts.push_back({const_cast<std::byte*>(data.data()) + sent + offered, n});
      offered += n;
    }
    const Moved out = from.write(parts.data(), static_cast<int>(parts.size()));
    REQUIRE_FALSE(out.failed);
    if (out.blocked) REQUIRE(out.bytes == 0);
    sent += out.bytes;
    Bytes room(1 + random() % 300'000);
    const std::size_t half = random() % room.size();
    std::array<iovec, 2> into{{{room.data(), half}, {room.data() + half, room.size() - half}}};
    const Moved in = to.read(into.data(), 2);
    REQUIRE_FALSE(in.failed);
    got.insert(got.end(), room.begin(), room.begin() + static_cast<std::ptrdiff_t>(in.bytes));
    idle = in.bytes + out.bytes == 0 ? idle + 1 : 0;
  }
  CHECK(got == data);
}

}  // namespace

TEST_CASE("tls: both ends agree, name each other, and carry bytes of any size both ways") {
  Ends ends;
  shake(*ends.a, *ends.b);
  REQUIRE(ends.a->ready());
  REQUIRE(ends.b->ready());
  CHECK(ends.a->vouches_for(kBob, 3));
  CHECK(ends.b->vouches_for(kAlice, 3));
  CHECK_FALSE(ends.b->vouches_for(kBob, 3));
  CHECK_FALSE(ends.b->vouches_for(kAlice, 4));
  carry(*ends.a, *ends.b, bytes_of(3 << 20, 1), 1);
  carry(*ends.b, *ends.a, bytes_of(3 << 20, 2), 2);
}

TEST_CASE("tls: keys are changed on the way") {
  Ends ends(kKey, kRun, kBob, kBob, 10);
  shake(*ends.a, *ends.b);
  carry(*ends.a, *ends.b, bytes_of(3 << 20, 1), 3);
  carry(*ends.b, *ends.a, bytes_of(1 << 20, 2), 4);
}

TEST_CASE("tls: who does not fit gets no byte") {
  const auto refused = [](Ends&& ends) {
    (void)read_one(*ends.a);  // sends the first flight
    for (int i = 0; i < 100 && !read_one(*ends.b).failed; ++i) {
    }
    CHECK_FALSE(ends.b->ready());
    CHECK(drain(ends.sockets.a.get()).empty());
    CHECK(ended(ends.sockets.a.get()));
    CHECK(read_one(*ends.a).failed);
    CHECK_FALSE(ends.a->ready());
  };
  SUBCASE("another key") { refused(Ends(std::string(kTlsKeyBytes, 'x'))); }
  SUBCASE("another run") { refused(Ends(kKey, kRun + 1)); }
  SUBCASE("meant for another peer") { refused(Ends(kKey, kRun, kBob + 1)); }
  SUBCASE("from ourselves: a reflection") { refused(Ends(kKey, kRun, kAlice, kAlice)); }
}

TEST_CASE("tls: a dialler refuses whoever does not know the key") {
  Ends ends;
  (void)read_one(*ends.a);
  CHECK(drain(ends.sockets.b.get()).size() > 100);
  const Bytes nonsense = bytes_of(300, 5);
  REQUIRE(::send(ends.sockets.b.get(), nonsense.data(), nonsense.size(), MSG_NOSIGNAL) == 300);
  bool failed = false;
  for (int i = 0; i < 1000 && !failed; ++i) failed = read_one(*ends.a).failed;
  CHECK(failed);
}

TEST_CASE("tls: a first flight that is played again leads nowhere") {
  Ends ends;
  (void)read_one(*ends.a);
  const Bytes recorded = drain(ends.sockets.b.get());
  const Pair other = connected_pair();
  const auto again = Tls::accept(ends.bob, other.b.get());
  REQUIRE(::send(other.a.get(), recorded.data(), recorded.size(), MSG_NOSIGNAL) ==
          static_cast<ssize_t>(recorded.size()));
  Bytes answer;
  for (int i = 0; i < 100 && answer.empty(); ++i) {
    (void)read_one(*again);
    answer = drain(other.a.get(), 1);
  }
  CHECK_FALSE(answer.empty());  // its greeting, which says nothing without the key
  REQUIRE(::send(other.a.get(), recorded.data(), recorded.size(), MSG_NOSIGNAL) > 0);
  bool failed = false;
  for (int i = 0; i < 1000 && !failed; ++i) failed = read_one(*again).failed;
  CHECK(failed);
  CHECK_FALSE(again->ready());
}

TEST_CASE("tls: a handshake in single bytes is a handshake, and may stop at each of them") {
  Bytes flight;
  {
    Ends ends;
    (void)read_one(*ends.a);
    flight = drain(ends.sockets.b.get());
  }
  const Pair pair = connected_pair();
  const TlsContext bob(kKey, kRun, kBob);
  const auto b = Tls::accept(bob, pair.b.get());
  for (std::size_t i = 0; i < flight.size(); ++i) {
    CHECK_FALSE(read_one(*b).failed);
    CHECK(b->unsent_bytes() == 0);
    CHECK(drain(pair.a.get(), 0).empty());  // nothing before the last byte
    REQUIRE(::send(pair.a.get(), flight.data() + i, 1, MSG_NOSIGNAL) == 1);
    pollfd wait{pair.b.get(), POLLIN, 0};
    REQUIRE(::poll(&wait, 1, 10'000) == 1);
  }
  CHECK_FALSE(read_one(*b).failed);
  CHECK_FALSE(drain(pair.a.get()).empty());
}

TEST_CASE("tls: a first flight with any bit turned gets no byte") {
  Bytes flight;
  {
    Ends ends;
    (void)read_one(*ends.a);
    flight = drain(ends.sockets.b.get());
  }
  std::mt19937 random(11);
  const TlsContext bob(kKey, kRun, kBob);
  for (std::size_t at = 0; at < flight.size(); at += 1 + random() % 4) {
    const Pair pair = connected_pair();
    const auto b = Tls::accept(bob, pair.b.get());
    Bytes bent = flight;
    bent[at] ^= static_cast<std::byte>(1 << (random() % 8));
    REQUIRE(::send(pair.a.get(), bent.data(), bent.size(), MSG_NOSIGNAL) > 0);
    ::shutdown(pair.a.get(), SHUT_WR);
    bool failed = false;
    for (int i = 0; i < 1000 && !failed; ++i) failed = read_one(*b).failed;
    CAPTURE(at);
    CHECK(failed);
    // Two bytes are nobody's: the record's version is ignored (RFC 8446, 5.1).
    if (at != 1 && at != 2) CHECK(drain(pair.a.get(), 0).empty());
  }
}

TEST_CASE("tls: a stranger's flood of handshake bytes ends") {
  const Pair pair = connected_pair();
  const TlsContext bob(kKey, kRun, kBob);
  const auto b = Tls::accept(bob, pair.b.get());
  // A first message that says it is 64 KiB long, in records of the largest size.
  Bytes flood{std::byte{22}, std::byte{3}, std::byte{1}, std::byte{0x40}, std::byte{0},
              std::byte{1},  std::byte{1}, std::byte{0}, std::byte{0}};
  flood.resize(5 + 0x4000);
  bool failed = false;
  std::size_t taken = 0;
  for (int i = 0; i < 1000 && !failed; ++i) {
    const std::size_t at = taken % flood.size();
    const ssize_t n = ::send(pair.a.get(), flood.data() + at, flood.size() - at, MSG_NOSIGNAL);
    if (n > 0) taken += static_cast<std::size_t>(n);
    failed = read_one(*b).failed;
  }
  CHECK(failed);
  CHECK(drain(pair.a.get()).empty());
}

TEST_CASE("tls: a record with a bit turned ends the connection, and the poller hears of it") {
  Ends ends;
  shake(*ends.a, *ends.b);
  const Pair tap = connected_pair();
  Bytes data = bytes_of(1000, 1);
  iovec part{data.data(), data.size()};
  CHECK(ends.a->write(&part, 1).bytes == data.size());
  Bytes record = drain(ends.sockets.b.get());
  REQUIRE(record.size() > data.size());
  CHECK(std::search(record.begin(), record.end(), data.begin(), data.begin() + 16) == record.end());
  record[record.size() / 2] ^= std::byte{1};
  REQUIRE(::send(ends.sockets.a.get(), record.data(), record.size(), MSG_NOSIGNAL) > 0);
  pollfd wait{ends.sockets.b.get(), POLLIN, 0};
  REQUIRE(::poll(&wait, 1, 10'000) == 1);
  Bytes room(2000);
  part = {room.data(), room.size()};
  const Moved moved = ends.b->read(&part, 1);
  CHECK(moved.failed);
  CHECK(moved.error == EPROTO);
  wait.events = POLLRDHUP;
  CHECK(::poll(&wait, 1, 0) == 1);
}

TEST_CASE("tls: a key of another size is no key") {
  CHECK_THROWS_AS(TlsContext("short", kRun, kBob), std::invalid_argument);
}

// ---- the mesh with a key

namespace {

MeshOptions keyed() {
  MeshOptions options = fast_options();
  options.tls_key = kKey;
  return options;
}

}  // namespace

TEST_CASE("a mesh with a key speaks TLS over TCP, and to strangers not a byte") {
  TestPeers peers = make_peers(2, {"tcp://127.0.0.1:0"}, keyed());
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  CHECK(peers[0]->mesh.stats()[0].is_tls);
  const Address address = *parse_numeric(peers[0]->mesh.addresses()[0]);
  Fd fd = start_connect(address, {});
  Header hello;  // what would be right without a key
  hello.type = FrameType::hello;
  hello.src = hello.dst = 0;
  hello.tag = kProtocolVersion;
  hello.a = 7;
  hello.b = 999;
  hello.c = peers[0]->id;
  std::array<std::byte, kHeaderBytes> bytes{};
  write(hello, bytes);
  REQUIRE(run_until(
      peers, [&] { return ::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) > 0; }));
  REQUIRE(run_until(peers, [&] { return ended(fd.get()); }));
  CHECK(drain(fd.get()).empty());
  CHECK(peers[0]->mesh.strangers() == 0);
  CHECK(all_up(peers));
}

TEST_CASE("a mesh with a key and one with another, or none, do not meet") {
  MeshOptions other = fast_options();
  SUBCASE("another key") { other.tls_key = std::string(kTlsKeyBytes, 'x'); }
  SUBCASE("none") {}
  TestPeers peers = make_peers(1, {"tcp://127.0.0.1:0"}, keyed());
  peers.push_back(std::make_unique<TestPeer>(101, std::uint8_t{1},
                                             std::vector<std::string>{"tcp://127.0.0.1:0"}, other));
  introduce(peers);
  peers[0]->send(101, 1, bytes_of(1000, 1));
  peers[1]->send(100, 0, bytes_of(1000, 1));
  run_until(peers, [] { return false; }, 0.5);
  for (const auto& peer : peers) {
    CHECK_FALSE(peer->mesh.stats()[0].up);
    CHECK(peer->got.empty());
  }
}

TEST_CASE("where pairs have keys of their own, one cannot speak for another") {
  MeshOptions options = fast_options();
  options.pair_keys = true;
  TestPeers peers = make_peers(3, {"tcp://127.0.0.1:0"}, options);
  const auto key_of = [](std::size_t i, std::size_t j) {
    return std::string(kTlsKeyBytes, static_cast<char>('a' + (1U << i | 1U << j)));
  };
  const auto seen_by = [&](std::size_t me, std::size_t with) {  // whose keys `me` holds
    std::vector<PeerInfo> all;
    for (std::size_t i = 0; i < 3; ++i) {
      all.push_back(peers[i]->info());
      if (i != me) all.back().pair_key = key_of(with, i);
    }
    return all;
  };
  for (std::size_t i = 0; i < 3; ++i) peers[i]->mesh.set_peers(seen_by(i, i), Mesh::now());
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  CHECK(peers[0]->mesh.stats()[0].is_tls);

  // The third is left out. It comes back under the second's name, with every key it ever held.
  const std::vector<PeerInfo> two{seen_by(0, 0)[0], seen_by(0, 0)[1]};
  peers[0]->mesh.set_peers(two, Mesh::now());
  REQUIRE(run_until(peers, [&] { return !peers[2]->mesh.stats()[0].up; }));
  TestPeers liars;
  liars.push_back(std::make_unique<TestPeer>(PeerId{101}, std::uint8_t{1},
                                             std::vector<std::string>{}, options));
  std::vector<PeerInfo> all = seen_by(1, 2);
  all.resize(2);  // itself, and the one it dials
  liars[0]->mesh.set_peers(all, Mesh::now());
  liars[0]->send(100, 0, bytes_of(1000, 1));
  run_until(
      liars,
      [&] {
        for (auto& peer : peers) peer->mesh.run_once(Mesh::now());
        return false;
      },
      0.5);
  CHECK_FALSE(liars[0]->mesh.stats()[0].up);
  CHECK(peers[0]->got.empty());
  CHECK(peers[0]->mesh.stats()[0].up);  // the second one itself is not disturbed
}

TEST_CASE("who knows the key and lies about who it is stays out") {
  TestPeers peers = make_peers(2, {"tcp://127.0.0.1:0"}, keyed());
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  const TlsContext context(kKey, kRun, 555);  // shows the key as 555, says that it is 101
  Fd fd = start_connect(*parse_numeric(peers[0]->mesh.addresses()[0]), {});
  const auto tls = Tls::dial(context, fd.get(), 100, 0);
  Header hello;
  hello.type = FrameType::hello;
  hello.src = hello.dst = 0;
  hello.tag = kProtocolVersion;
  hello.a = 7;
  hello.b = 101;
  hello.c = 100;
  std::array<std::byte, kHeaderBytes> bytes{};
  write(hello, bytes);
  bool sent = false;
  REQUIRE(run_until(peers, [&] {
    iovec part{bytes.data(), bytes.size()};
    if (!sent) sent = tls->write(&part, 1).bytes != 0;
    return peers[0]->saw(MeshEvent::Kind::stranger, 101);
  }));
  CHECK(peers[0]->events.back().detail.find("another peer") != std::string::npos);
  CHECK(peers[0]->mesh.stats()[0].streams == 1);
}

}  // namespace decotrain::net
