// Shared state: stores and a fetch joined by a list of frames, no sockets and no time but ours.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>

#include "state.h"

namespace decotrain {
namespace {

constexpr std::size_t kBytes = 20 * kStateChunkBytes + 12345;

std::vector<std::byte> content(std::uint64_t version, std::size_t bytes = kBytes) {
  std::vector<std::byte> out(bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    out[i] = static_cast<std::byte>((i * 31 + (i >> 12) + version * 77) & 0xff);
  }
  return out;
}

StatePieces in_pieces(std::vector<std::byte>& bytes) {
  const std::span<std::byte> all(bytes);
  const auto array = [&](std::size_t at, std::size_t n) {
    return StateArray{all.subspan(at, n), n};
  };
  if (bytes.size() < 100000) return StatePieces({array(0, bytes.size())});
  return StatePieces(
      {array(0, 1000), array(1000, 0), array(1000, 70000), array(71000, bytes.size() - 71000)});
}

struct Server {
  std::vector<std::byte> bytes;
  StateStore store;
  bool alive = true;
  bool damages = false;
  int replies = 0;

  explicit Server(std::uint64_t version) : bytes(content(version)) {
    store.publish(3, in_pieces(bytes), version, {});
  }
  void move_to(std::uint64_t version) {
    store.begin_update(3);
    bytes = content(version);
    store.publish(3, in_pieces(bytes), version, {});
  }
};

constexpr PeerId kNewcomer = 99;

// One exchange with every server; false when nothing moved.
bool turn(StateFetch& fetch, std::map<PeerId, Server*>& servers, double now) {
  bool moved = false;
  fetch.tick(now);
  for (auto& [peer, server] : servers) {
    Header request;
    while (fetch.next_request(peer, now, request)) {
      moved = true;
      std::array<std::byte, kHeaderBytes> bytes;
      write(request, bytes);
      if (server->alive) server->store.on_request(kNewcomer, *parse(bytes));
    }
    OutFrame frame;
    if (!server->alive || !server->store.next_reply(kNewcomer, frame)) continue;
    moved = true;
    ++server->replies;
    const Incoming incoming = fetch.on_header(peer, frame.header, now);
    if (incoming.accept != Accept::take) continue;
    REQUIRE(frame.header.payload_bytes <= kStateChunkBytes);
    std::memcpy(incoming.target, frame.payload, frame.header.payload_bytes);
    if (server->damages) incoming.target[7] ^= std::byte{1};
    fetch.on_payload(peer, frame.header, incoming, now);
  }
  return moved;
}

bool run(StateFetch& fetch, std::map<PeerId, Server*>& servers, double& now, int turns = 1000) {
  for (int i = 0; i < turns && !fetch.done(); ++i) {
    if (!turn(fetch, servers, now)) {
      const double next = fetch.next_deadline();
      REQUIRE(next > now);  // else a real loop would spin
      if (next > now + 1e6) return false;
      now = next;
    }
  }
  return fetch.done();
}

}  // namespace

TEST_CASE("a fragment comes from all servers, whole and in its version") {
  Server a(4), b(4), c(4);
  std::map<PeerId, Server*> servers = {{1, &a}, {2, &b}, {3, &c}};
  std::vector<std::byte> into(kBytes);
  StateFetch fetch(3, 1, in_pieces(into), {1, 2, 3}, false);
  double now = 1.0;
  REQUIRE(run(fetch, servers, now));
  CHECK(into == content(4));
  CHECK(fetch.progress().version == 4);
  CHECK(fetch.progress().bytes == kBytes);
  CHECK(fetch.progress().restarts == 0);
  CHECK(a.replies > 0);
  CHECK(b.replies > 0);
  CHECK(c.replies > 0);
  CHECK(a.store.reply_bytes() == 0);
}

TEST_CASE("the version moves: everything is asked for again, nothing is mixed") {
  Server a(4), b(4);
  std::map<PeerId, Server*> servers = {{1, &a}, {2, &b}};
  std::vector<std::byte> into(kBytes);
  StateFetch fetch(3, 1, in_pieces(into), {1, 2}, false);
  double now = 1.0;
  for (int i = 0; i < 3; ++i) turn(fetch, servers, now);
  REQUIRE_FALSE(fetch.done());
  a.move_to(5);
  for (int i = 0; i < 3; ++i) turn(fetch, servers, now);
  b.move_to(5);
  REQUIRE(run(fetch, servers, now));
  CHECK(into == content(5));
  CHECK(fetch.progress().version == 5);
  CHECK(fetch.progress().restarts == 1);
}

TEST_CASE("the version moves all the time: a fetch that follows keeps what it has") {
  Server a(4), b(4);
  std::map<PeerId, Server*> servers = {{1, &a}, {2, &b}};
  std::vector<std::byte> into(kBytes);
  StateFetch fetch(3, 1, in_pieces(into), {1, 2}, true);
  std::uint64_t newest = 4;
  std::size_t before = 0;
  for (double now = 1.0; !fetch.done(); now += 0.2) {
    REQUIRE(now < 20.0);
    for (int i = 0; i < 2; ++i) turn(fetch, servers, now);
    a.move_to(++newest);  // b is one behind
    for (int i = 0; i < 2; ++i) turn(fetch, servers, now);
    b.move_to(newest);
    CHECK(fetch.progress().bytes >= before);  // nothing is thrown away
    before = fetch.progress().bytes;
    fetch.pause();
    Header request;
    CHECK_FALSE(fetch.next_request(1, now, request));
    if (!fetch.lock()) break;
    const std::uint64_t version = *fetch.progress().version;
    if (version == newest) continue;
    for (std::byte& one : into) one = std::byte(std::to_integer<int>(one) + 77);
    fetch.advance(version + 1);
  }
  CHECK(newest > 6);
  CHECK(fetch.progress().restarts == 0);
  CHECK(into == content(*fetch.progress().version));
}

TEST_CASE("pieces hold the same elements of equal arrays; single elements come first") {
  constexpr std::size_t n = 700000;
  std::vector<std::byte> weights(4 * n), moments(2 * n), other(std::size_t{3} * 5000), count(8);
  const StatePieces pieces({{weights, n}, {count, 1}, {other, 5000}, {moments, n}, {{}, 0}});
  CHECK(pieces.heads() == 1);
  CHECK(pieces.bytes_of(0) == 8);
  CHECK(pieces.bytes() == weights.size() + moments.size() + other.size() + count.size());
  std::vector<std::byte> out(kStateChunkBytes);
  for (std::size_t i = 0; i < n; ++i) {  // the same mark on each element of an index
    const auto mark = std::byte(i / 1000 % 251);
    std::fill_n(weights.begin() + std::ptrdiff_t(4 * i), 4, mark);
    std::fill_n(moments.begin() + std::ptrdiff_t(2 * i), 2, mark);
  }
  for (std::size_t piece = 1; piece < pieces.size(); ++piece) {
    REQUIRE(pieces.bytes_of(piece) <= kStateChunkBytes);
    std::map<std::byte, std::size_t> marks;
    pieces.read(piece, out.data());
    for (std::size_t i = 0; i < pieces.bytes_of(piece); ++i) ++marks[out[i]];
    for (const auto& [mark, bytes] : marks) CHECK((mark == std::byte{0} || bytes % 6 == 0));
    std::fill(out.begin(), out.end(), std::byte{0});
    pieces.write(piece, out.data());
  }
  CHECK(std::all_of(moments.begin(), moments.end(), [](std::byte b) { return b == std::byte{}; }));
  CHECK_THROWS_AS(StatePieces({{count, 3}}), std::invalid_argument);
}

TEST_CASE("a server that is being written to is asked again, and not in a circle") {
  Server a(4);
  std::map<PeerId, Server*> servers = {{1, &a}};
  std::vector<std::byte> into(kBytes);
  StateFetch fetch(3, 1, in_pieces(into), {1}, false);
  double now = 1.0;
  a.store.begin_update(3);
  CHECK_FALSE(run(fetch, servers, now, 20));
  CHECK(a.replies <= 20);
  a.store.end_update(3, 6);
  REQUIRE(run(fetch, servers, now));
  CHECK(fetch.progress().version == 6);
}

TEST_CASE("a damaged piece is asked for again; who damages much is not asked any more") {
  Server good(4), bad(4);
  bad.damages = true;
  std::map<PeerId, Server*> servers = {{1, &bad}, {2, &good}};
  std::vector<std::byte> into(kBytes);
  StateFetch fetch(3, 1, in_pieces(into), {1, 2}, false);
  double now = 1.0;
  REQUIRE(run(fetch, servers, now));
  CHECK(into == content(4));
  CHECK(fetch.progress().damaged >= 1);
  CHECK(fetch.progress().damaged <= kStateAskedMax + 3);
}

TEST_CASE("servers that die in between") {
  Server a(4), b(4);
  std::map<PeerId, Server*> servers = {{1, &a}, {2, &b}};
  std::vector<std::byte> into(kBytes);
  StateFetch fetch(3, 1, in_pieces(into), {1, 2}, false);
  double now = 1.0;
  for (int i = 0; i < 2; ++i) turn(fetch, servers, now);
  a.alive = false;
  SUBCASE("one, noticed by its link") {
    fetch.on_link_reset(1);
    fetch.set_peers({2});
  }
  SUBCASE("one, silently: the other is asked for what it owes") {}
  SUBCASE("both: another one goes on from there") {
    b.alive = false;
    fetch.set_peers({});
    const std::size_t before = fetch.progress().bytes;
    CHECK(before > 0);
    CHECK_FALSE(run(fetch, servers, now, 10));
    Server c(4);
    std::map<PeerId, Server*> others = {{7, &c}};
    fetch.set_peers({7});
    REQUIRE(run(fetch, others, now));
    CHECK(std::size_t(c.replies) * kStateChunkBytes < kBytes + kStateChunkBytes - before / 2);
    CHECK(into == content(4));
    return;
  }
  REQUIRE(run(fetch, servers, now));
  CHECK(into == content(4));
  CHECK(now < 4.0);
}

TEST_CASE("a store answers no nonsense and keeps few requests") {
  Server a(4);
  Header request;
  request.type = FrameType::state_request;
  request.tag = 3;
  request.seq = kAnyVersion;
  request.c = kBytes;
  OutFrame frame;
  const auto answer = [&](Header header) {
    a.store.on_request(1, header);
    if (!a.store.next_reply(1, frame)) return -1;
    return static_cast<int>(frame.header.chunk);
  };
  CHECK(answer(request) == int(StateAnswer::here));
  Header bad = request;
  bad.a = 1;
  CHECK(answer(bad) == -1);
  bad.a = kStateChunkBytes << 40;
  CHECK(answer(bad) == int(StateAnswer::unknown));
  bad = request;
  bad.c = kBytes + 1;
  CHECK(answer(bad) == int(StateAnswer::unknown));
  bad = request;
  bad.tag = 9;
  CHECK(answer(bad) == int(StateAnswer::unknown));
  bad = request;
  bad.seq = 3;
  CHECK(answer(bad) == int(StateAnswer::other_version));
  for (int i = 0; i < 1000; ++i) a.store.on_request(1, request);
  std::vector<OutFrame> held;
  while (a.store.next_reply(1, frame)) held.push_back(frame);
  frame = {};
  CHECK(held.size() * kStateChunkBytes <= kStateReplyBytesMax);
  CHECK(a.store.reply_bytes() <= kStateReplyBytesMax);
  held.clear();
  int rest = 0;
  while (a.store.next_reply(1, frame)) ++rest;
  CHECK(rest < int(kStateQueuedMax));
}

TEST_CASE("a fetch says when every server holds something else") {
  std::vector<std::byte> into(kBytes);
  StateStore same;
  StateStore other;
  std::vector<std::byte> bytes(kBytes);
  std::vector<std::byte> longer(kBytes + 4);
  same.publish(3, in_pieces(bytes), 5, {}, 77);
  other.publish(3, in_pieces(longer), 5, {}, 77);
  const auto asked = [&](StateFetch& fetch, PeerId peer, StateStore& store, double now) {
    Header request;
    if (!fetch.next_request(peer, now, request)) return;
    store.on_request(9, request);
    OutFrame frame;
    REQUIRE(store.next_reply(9, frame));
    fetch.on_header(peer, frame.header, now);
  };
  StateFetch fetch(3, 1, in_pieces(into), {1, 2}, false, 77);
  asked(fetch, 1, other, 1.0);
  CHECK(fetch.progress().other_bytes == 0);  // the second one may have ours
  asked(fetch, 2, other, 1.0);
  CHECK(fetch.progress().other_bytes == kBytes + 4);
  StateFetch of_another_kind(3, 2, in_pieces(into), {1}, false, 78);
  asked(of_another_kind, 1, same, 1.0);
  CHECK(of_another_kind.progress().other_bytes == kBytes);
  StateFetch of_any_kind(3, 3, in_pieces(into), {1}, false);
  asked(of_any_kind, 1, same, 1.0);
  CHECK(of_any_kind.progress().other_bytes == 0);
  StateStore empty;
  StateFetch of_nothing(3, 4, in_pieces(into), {1}, false, 77);
  asked(of_nothing, 1, empty, 1.0);
  CHECK(of_nothing.progress().other_bytes == 0);
}

TEST_CASE("answers that nobody asked for become nothing") {
  std::vector<std::byte> into(kBytes);
  StateFetch fetch(3, 1, in_pieces(into), {1}, false);
  Header request;
  REQUIRE(fetch.next_request(1, 1.0, request));
  Header answer;
  answer.type = FrameType::state;
  answer.tag = 3;
  answer.spec_digest = 1;
  answer.a = request.a;
  answer.payload_bytes = kStateChunkBytes;
  CHECK(fetch.on_header(1, answer, 1.0).accept == Accept::take);
  for (auto change : std::initializer_list<void (*)(Header&)>{
           [](Header& h) { h.tag = 4; }, [](Header& h) { h.spec_digest = 2; },
           [](Header& h) { h.a += kStateChunkBytes; }, [](Header& h) { h.a = ~std::uint64_t{0}; },
           [](Header& h) { h.payload_bytes = 5; }}) {
    Header wrong = answer;
    change(wrong);
    CHECK(fetch.on_header(1, wrong, 1.0).accept == Accept::drop);
  }
  CHECK(fetch.on_header(2, answer, 1.0).accept == Accept::drop);
}

}  // namespace decotrain
