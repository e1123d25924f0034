// Mesh over real sockets of this host: frames arrive whole, links come back, strangers do no harm.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>

#include "mesh_peer.h"

namespace decotrain::net {
namespace {

const std::vector<std::string> kTcp4 = {"tcp://127.0.0.1:0"};
const std::string kKey(kTlsKeyBytes, 'k');
const std::vector<std::string> kUnixOnly = {"unix://"};

void exchange(const std::vector<std::string>& listen, std::size_t streams, bool unix_expected,
              const std::string& key = "") {
  MeshOptions options = fast_options();
  options.link_timeout_s = 10.0;  // a busy machine is no dead link: frames would be lost with it
  options.handshake_timeout_s = 10.0;
  options.streams = streams;
  options.tls_key = key;
  TestPeers peers = make_peers(3, listen, options);
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  const std::size_t sizes[] = {0, 1, 63, 64, 5000, 16384, 20000, 1 << 20, 3 << 20};
  exchange_all(peers, sizes);
  for (auto& peer : peers) {
    for (const LinkStats& link : peer->mesh.stats()) {
      CHECK(link.is_unix == unix_expected);
      CHECK(link.is_tls == (!key.empty() && !unix_expected));
    }
  }
}

}  // namespace

TEST_CASE("a long path gets more streams, unless one does not mind loss") {
  CHECK(net::streams_for(0.0, true) == 1);
  CHECK(net::streams_for(0.001, true) == 1);
  CHECK(net::streams_for(0.015, true) == 4);
  CHECK(net::streams_for(0.09, true) == 8);
  CHECK(net::streams_for(0.001, false) == 1);
  CHECK(net::streams_for(0.02, false) == 1);
  CHECK(net::streams_for(0.09, false) == 2);
}

TEST_CASE("a control that is restarted keeps its name and forgets what it has measured") {
  Fd listener = listen_on(*parse_numeric("tcp://127.0.0.1:0"));
  Channel near(start_connect(bound_address(listener.get()), {}), false);
  near.choose_congestion("bbr");
  if (near.congestion() != "bbr") {
    MESSAGE("not tried: this kernel offers no BBR");
    return;
  }
  pollfd wait{listener.get(), POLLIN, 0};
  REQUIRE(poll(&wait, 1, 10'000) == 1);
  const Fd far(accept(listener.get(), nullptr, nullptr));
  const auto rate = [&] {
    std::array<std::uint32_t, 5> bbr{};  // rate (two words), delay, two gains
    socklen_t size = sizeof bbr;
    REQUIRE(getsockopt(near.fd(), IPPROTO_TCP, TCP_CC_INFO, bbr.data(), &size) == 0);
    return bbr[0] + (std::uint64_t{bbr[1]} << 32);
  };
  std::vector<std::byte> bytes(64 << 10);
  while (rate() == 0) {
    iovec part{bytes.data(), bytes.size()};
    REQUIRE_FALSE(near.write(&part, 1).failed);
    (void)!read(far.get(), bytes.data(), bytes.size());
  }
  near.restart_control();
  CHECK(near.congestion() == "bbr");
  CHECK(rate() == 0);
}

TEST_CASE("frames of every size arrive whole") {
  SUBCASE("tcp") { exchange(kTcp4, 1, false); }
  SUBCASE("tcp, 4 streams") { exchange(kTcp4, 4, false); }
  SUBCASE("tcp, IPv6") { exchange({"tcp://[::1]:0"}, 1, false); }
  SUBCASE("unix") { exchange(kUnixOnly, 1, true); }
  SUBCASE("tls") { exchange(kTcp4, 1, false, kKey); }
  SUBCASE("tls, 4 streams, IPv6") { exchange({"tcp://[::1]:0"}, 4, false, kKey); }
  SUBCASE("unix, with a key") { exchange(kUnixOnly, 1, true, kKey); }
  SUBCASE("unix is preferred") { exchange({"tcp://127.0.0.1:0", "unix://"}, 2, true); }
}

TEST_CASE("force_tcp ignores Unix addresses") {
  MeshOptions options = fast_options();
  options.force_tcp = true;
  TestPeers peers = make_peers(2, {"unix://", "tcp://127.0.0.1:0"}, options);
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  for (const LinkStats& link : peers[0]->mesh.stats()) CHECK_FALSE(link.is_unix);
}

TEST_CASE("a peer that cannot be dialled dials") {
  TestPeers peers = make_peers(1, kTcp4, fast_options());
  peers.push_back(
      std::make_unique<TestPeer>(999, std::uint8_t{1}, std::vector<std::string>{}, fast_options()));
  introduce(peers);
  CHECK(run_until(peers, [&] { return all_up(peers); }));
}

TEST_CASE("a connection of a peer that we do not know yet waits for the view") {
  TestPeers peers = make_peers(2, kTcp4, fast_options());
  const std::vector<PeerInfo> all = {peers[0]->info(), peers[1]->info()};
  peers[0]->mesh.set_peers(all, Mesh::now());
  REQUIRE(run_until(peers, [&] { return peers[1]->mesh.strangers() == 1; }));
  run_until(peers, [] { return false; }, 0.05);
  CHECK_FALSE(all_up(peers));
  peers[1]->mesh.set_peers(all, Mesh::now());
  CHECK(run_until(peers, [&] { return all_up(peers); }));
}

TEST_CASE("strangers") {
  TestPeers peers = make_peers(2, kTcp4, fast_options());
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  const Address address = *parse_numeric(peers[0]->mesh.addresses()[0]);

  SUBCASE("a crowd of silent ones takes bounded room and is sent away") {
    std::vector<Fd> crowd;
    for (int i = 0; i < 100; ++i) crowd.push_back(start_connect(address, {}));
    run_until(peers, [] { return false; }, 0.1);
    CHECK(peers[0]->mesh.strangers() <= kMaxStrangersPerOrigin);
    peers[1]->send(peers[0]->id, 0, bytes_of(100, 1));
    CHECK(run_until(peers, [&] { return peers[0]->got.size() == 1; }));
    CHECK(run_until(peers, [&] { return peers[0]->mesh.strangers() == 0; }));
    // One of them gets in the way of nobody who comes later.
    peers.push_back(std::make_unique<TestPeer>(50, std::uint8_t{2}, kTcp4, fast_options()));
    introduce(peers);
    CHECK(run_until(peers, [&] { return all_up(peers); }));
  }
  SUBCASE("garbage is answered with nothing and closed") {
    Fd fd = start_connect(address, {});
    const std::vector<std::byte> garbage = bytes_of(4096, 3);
    REQUIRE(run_until(
        peers, [&] { return ::send(fd.get(), garbage.data(), garbage.size(), MSG_NOSIGNAL) > 0; }));
    char answer = 0;
    ssize_t n = -1;
    REQUIRE(run_until(peers, [&] {
      n = ::recv(fd.get(), &answer, 1, MSG_DONTWAIT);
      return n >= 0 || errno != EAGAIN;
    }));
    CHECK(n <= 0);
    CHECK(peers[0]->saw(MeshEvent::Kind::stranger));
    CHECK(all_up(peers));
  }
  SUBCASE("another run is named") {
    MeshOptions other = fast_options();
    other.run_fingerprint = 8;
    TestPeer stranger(50, 2, kTcp4, other);
    stranger.mesh.set_peers({stranger.info(), peers[0]->info()}, Mesh::now());
    CHECK(run_until(peers, [&] {
      stranger.mesh.run_once(Mesh::now());
      return peers[0]->saw(MeshEvent::Kind::stranger, 50);
    }));
    CHECK(peers[0]->events.back().detail == "another run or another token");
  }
}

TEST_CASE("a peer that stops is noticed, and the link comes back when it goes on") {
  MeshOptions options = fast_options();
  options.link_timeout_s = 0.5;
  options.ping_interval_s = 0.1;
  bool much = false;
  SUBCASE("idle: no answer to a ping") {}
  SUBCASE("idle, tls") { options.tls_key = kKey; }
  SUBCASE("in the middle of much data") { much = true; }
  SUBCASE("in the middle of much data, tls") {
    much = true;
    options.tls_key = kKey;
  }
  TestPeers peers = make_peers(2, kTcp4, options);
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  for (int i = 0; much && i < 8; ++i) peers[0]->send(peers[1]->id, 1, bytes_of(4 << 20, 1));
  TestPeers alone;
  alone.push_back(std::move(peers[0]));
  REQUIRE(run_until(alone, [&] { return alone[0]->saw(MeshEvent::Kind::link_down, 101); }));
  CHECK(alone[0]->mesh.stats()[0].streams == 0);
  peers[0] = std::move(alone[0]);
  CHECK(run_until(peers, [&] {
    return peers[0]->resets[101] > 0 && peers[1]->resets[100] > 0 && all_up(peers);
  }));
  peers[0]->queues.clear();
  peers[0]->send(peers[1]->id, 1, bytes_of(10, 9), 77);
  CHECK(run_until(peers,
                  [&] { return !peers[1]->got.empty() && peers[1]->got.back().header.seq == 77; }));
}

TEST_CASE("a frame that is not taken now stops its stream until it is offered again") {
  TestPeers peers = make_peers(2, kTcp4, fast_options());
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  peers[1]->answer = Accept::later;
  peers[0]->send(peers[1]->id, 1, bytes_of(3000, 1), 1);
  peers[0]->send(peers[1]->id, 1, bytes_of(3000, 1), 2);
  run_until(peers, [] { return false; }, 0.1);
  CHECK(peers[1]->got.empty());
  peers[1]->answer = Accept::take;
  peers[1]->mesh.reoffer(Mesh::now());
  REQUIRE(run_until(peers, [&] { return peers[1]->got.size() == 2; }));
  CHECK(peers[1]->got[0].header.seq == 1);
}

TEST_CASE("a dropped payload is read and forgotten, a refused one ends the stream") {
  TestPeers peers = make_peers(2, kTcp4, fast_options());
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  peers[1]->answer = Accept::drop;
  peers[0]->send(peers[1]->id, 1, bytes_of(1 << 20, 1), 1);
  REQUIRE(run_until(peers, [&] { return peers[1]->mesh.stats()[0].received_bytes > (1 << 20); }));
  peers[1]->answer = Accept::take;
  peers[0]->send(peers[1]->id, 1, bytes_of(9, 1), 2);
  REQUIRE(run_until(peers, [&] { return peers[1]->got.size() == 1; }));
  CHECK(peers[1]->got[0].header.seq == 2);
  peers[1]->answer = Accept::refuse;
  peers[0]->send(peers[1]->id, 1, bytes_of(9, 1), 3);
  CHECK(run_until(peers, [&] { return peers[1]->saw(MeshEvent::Kind::refused, 100); }));
  CHECK(peers[1]->events.back().detail != "");
}

TEST_CASE("a cut pair talks through a third") {
  TestPeers peers = make_peers(3, kTcp4, fast_options());
  std::vector<PeerInfo> all;
  for (const auto& peer : peers) all.push_back(peer->info());
  // 0 and 1 cannot reach each other: neither knows an address of the other.
  for (std::size_t i = 0; i < 3; ++i) {
    std::vector<PeerInfo> seen = all;
    if (i < 2) seen[1 - i].addresses.clear();
    peers[i]->mesh.set_peers(seen, Mesh::now());
  }
  peers[0]->mesh.set_route(101, 102);
  peers[1]->mesh.set_route(100, 102);
  for (unsigned i = 0; i < 40; ++i) {
    peers[0]->send(101, 1, bytes_of(1 << 20, i), i);
    peers[1]->send(100, 0, bytes_of(1 << 20, i + 1), i);
  }
  REQUIRE(run_until(
      peers, [&] { return peers[0]->got.size() == 40 && peers[1]->got.size() == 40; }, 30.0));
  CHECK(peers[2]->got.empty());
  for (const Got& frame : peers[1]->got) {
    CHECK(frame.from == 100);
    CHECK((frame.header.flags & kFlagRelayed) == 0);
    CHECK(frame.payload == bytes_of(1 << 20, unsigned(frame.header.seq)));
  }
  SUBCASE("and hears when the relay lost its frames") {
    const int before = peers[0]->resets[101];
    TestPeers rest;  // 1 dies: the relay's link to it breaks, then a new one comes up
    peers[0]->send(101, 1, bytes_of(100, 1));
    peers[1]->mesh.set_peers({all[1]}, Mesh::now());
    run_until(peers, [] { return false; }, 0.05);
    std::vector<PeerInfo> seen = all;
    seen[0].addresses.clear();
    peers[1]->mesh.set_peers(seen, Mesh::now());
    CHECK(run_until(peers, [&] { return peers[0]->resets[101] > before; }));
  }
}

TEST_CASE("running out of descriptors refuses connections and spins nowhere") {
  TestPeers peers = make_peers(2, kTcp4, fast_options());
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  const Address address = *parse_numeric(peers[0]->mesh.addresses()[0]);
  Fd mine = start_connect(address, {});
  Fd other = start_connect(address, {});
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  rlimit tight = before;
  tight.rlim_cur = 3;  // every new descriptor is above it
  setrlimit(RLIMIT_NOFILE, &tight);
  const bool said =
      run_until(peers, [&] { return peers[0]->saw(MeshEvent::Kind::no_descriptors); });
  setrlimit(RLIMIT_NOFILE, &before);
  CHECK(said);
  peers[1]->send(peers[0]->id, 0, bytes_of(100, 1));
  CHECK(run_until(peers, [&] { return peers[0]->got.size() == 1; }));
}

TEST_CASE("eight peers that start at once find each other") {
  TestPeers peers = make_peers(8, {"tcp://127.0.0.1:0", "unix://"}, fast_options());
  introduce(peers);
  CHECK(run_until(peers, [&] { return all_up(peers); }));
}

}  // namespace decotrain::net
