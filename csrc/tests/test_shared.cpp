// Payloads in memory that two peers of one host share: they arrive whole, memory comes back, a cut
// link changes nothing that was read before, and a peer that lies gains nothing.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "mesh_peer.h"

namespace decotrain::net {
namespace {

const std::vector<std::string> kUnix = {"unix://"};
constexpr std::size_t kLarge = 256 << 10;
constexpr int kAllSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;

MeshOptions patient_options() {
  MeshOptions options = fast_options();
  options.link_timeout_s = 30.0;
  options.handshake_timeout_s = 30.0;
  return options;
}

TestPeers connected(std::size_t n, const MeshOptions& options) {
  TestPeers peers = make_peers(n, kUnix, options);
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  return peers;
}

Fd memory(std::size_t bytes, int seals, bool whole = true) {
  Fd fd(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0);
  if (whole) REQUIRE(fallocate(fd.get(), 0, 0, static_cast<off_t>(bytes)) == 0);
  if (seals != 0) REQUIRE(fcntl(fd.get(), F_ADD_SEALS, seals) == 0);
  return fd;
}

// Why the peer refused what came.
std::string reason(const TestPeer& peer) {
  for (const MeshEvent& event : peer.events) {
    if (event.kind == MeshEvent::Kind::refused) return event.detail;
  }
  return "";
}

// A process that has the run's fingerprint and speaks frames of its own.
class RawPeer {
 public:
  explicit RawPeer(TestPeer& victim) : fd_(start_connect(*address(victim), {})) {
    victim.mesh.set_peers({victim.info(), {50, 9, {}}}, Mesh::now());
    Header hello;
    hello.type = FrameType::hello;
    hello.src = hello.dst = 0;
    hello.tag = kProtocolVersion;
    hello.seq = host_id();
    hello.spec_digest = kHelloTakesMemory;
    hello.a = 7;
    hello.b = 50;
    hello.c = victim.id;
    say(hello);
  }
  void say(const Header& header, int descriptor = -1) {
    HeaderBytes bytes;
    write(header, bytes);
    iovec part{bytes.data(), bytes.size()};
    Channel channel(Fd(dup(fd_.get())), true);
    CHECK(channel.write(&part, 1, descriptor).bytes == bytes.size());
  }
  void say(FrameType type, std::uint64_t a, std::uint64_t b, std::uint64_t c, int descriptor = -1) {
    Header header;
    header.type = type;
    header.a = a;
    header.b = b;
    header.c = c;
    say(header, descriptor);
  }
  // Reads whole headers until one of this type comes.
  bool hears(TestPeers& peers, FrameType type, Header& out) {
    return run_until(peers, [&] {
      HeaderBytes bytes;
      if (::recv(fd_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT) != kHeaderBytes) return false;
      const auto header = parse(bytes);
      if (header) out = *header;
      return header && header->type == type;
    });
  }

 private:
  static std::optional<Address> address(TestPeer& victim) {
    return parse_numeric(victim.mesh.addresses()[0]);
  }
  Fd fd_;
};

}  // namespace

TEST_CASE("an arena gives blocks, finds them and takes them back") {
  Arena arena(std::size_t{64} << 20);
  auto first = arena.allocate(kLarge);
  REQUIRE(first != nullptr);
  CHECK(reinterpret_cast<std::uintptr_t>(first.get()) % 64 == 0);
  const auto where = arena.find(first.get(), kLarge);
  REQUIRE(where.has_value());
  CHECK_FALSE(arena.find(first.get(), std::size_t{32} << 20).has_value());
  const std::vector<std::byte> private_bytes(64);
  CHECK_FALSE(arena.find(private_bytes.data(), 64).has_value());
  std::byte* const at = first.get();
  first.reset();
  CHECK(arena.allocate(kLarge).get() == at);

  std::vector<std::shared_ptr<std::byte[]>> all;
  while (auto block = arena.allocate(kLarge)) all.push_back(std::move(block));
  CHECK(all.size() >= 200);
  CHECK(arena.bytes() <= std::size_t{64} << 20);
  CHECK(arena.allocate(std::size_t{1} << 20) == nullptr);  // no room
  all.clear();
  auto other = arena.allocate(std::size_t{1} << 20);  // in the place of idle segments
  CHECK(other != nullptr);
  CHECK(arena.bytes() <= std::size_t{64} << 20);
  CHECK_FALSE(arena.trim(1.0).empty());

  arena.retire(arena.find(other.get(), 1)->segment);
  CHECK(arena.trim(2.0).empty());  // in use
  other.reset();
  CHECK(arena.trim(3.0).size() == 1);
  CHECK(arena.trim(4.0).empty());
  arena.trim(4.0 + 2 * kSegmentIdle_s);
  CHECK(arena.bytes() == 0);
}

TEST_CASE("a block outlives its arena") {
  std::shared_ptr<std::byte[]> block;
  {
    Arena arena(std::size_t{64} << 20);
    block = arena.allocate(kLarge);
  }
  std::memset(block.get(), 1, kLarge);
  CHECK(block[kLarge - 1] == std::byte{1});
}

TEST_CASE("only sealed memory of the right size is mapped, and only to read") {
  Arena arena(std::size_t{64} << 20);
  const auto block = arena.allocate(kLarge);
  const auto where = *arena.find(block.get(), kLarge);
  const Arena::File file = arena.file(where.segment);
  block[17] = std::byte{42};
  const Fd there(dup(file.fd));
  const auto mapping = Mapping::of(there, file.bytes);
  REQUIRE(mapping != nullptr);
  CHECK(mapping->data()[where.offset + 17] == std::byte{42});
  CHECK(::mmap(nullptr, file.bytes, PROT_WRITE, MAP_SHARED, file.fd, 0) == MAP_FAILED);
  CHECK(::ftruncate(file.fd, 0) != 0);
  CHECK(::fallocate(file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) != 0);

  constexpr std::size_t kBytes = 1 << 20;
  CHECK(Mapping::of(there, file.bytes - 4096) == nullptr);
  CHECK(Mapping::of(there, file.bytes + 4096) == nullptr);
  CHECK(Mapping::of(there, 0) == nullptr);
  CHECK(Mapping::of(there, ~std::uint64_t{0}) == nullptr);
  CHECK(Mapping::of(Fd(), kBytes) == nullptr);
  CHECK(Mapping::of(memory(kBytes, kAllSeals), kBytes) != nullptr);
  CHECK(Mapping::of(memory(kBytes, 0), kBytes) == nullptr);
  for (const int seal : {F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE, F_SEAL_SEAL}) {
    CHECK(Mapping::of(memory(kBytes, kAllSeals & ~seal), kBytes) == nullptr);
  }
  CHECK(Mapping::of(memory(kBytes, kAllSeals, false), kBytes) == nullptr);  // pages are missing
  CHECK(Mapping::of(Fd(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC)), kBytes) == nullptr);
  CHECK(Mapping::of(Fd(::open("/dev/zero", O_RDONLY | O_CLOEXEC)), kBytes) == nullptr);
}

TEST_CASE("large payloads stay in shared memory, and the memory comes back") {
  MeshOptions options = patient_options();
  bool shared = true;
  bool tight = false;
  SUBCASE("as it is") {}
  SUBCASE("with several streams") { options.streams = 4; }
  SUBCASE("switched off") {
    options.shared_bytes = 0;
    shared = false;
  }
  SUBCASE("little room: the rest goes through the socket") {
    options.shared_bytes = std::size_t{9} << 20;
    tight = true;  // sizes that take turns may push each other out before anything is lent
  }
  TestPeers peers = connected(3, options);
  for (auto& peer : peers) peer->stays = peer->id != 101;  // one of them copies
  const std::size_t sizes[] = {0, 5, 40000, kLarge, kLarge + 4, 1 << 20, 3 << 20};
  for (unsigned round = 0; round < 4; ++round) exchange_all(peers, sizes, round);
  for (auto& peer : peers) {
    CHECK(run_until(peers, [&] { return peer->mesh.lent() == 0; }));
    if (!tight) CHECK((peer->mesh.lent_so_far() > 0) == shared);
    for (const LinkStats& link : peer->mesh.stats()) CHECK(link.is_shared == shared);
  }
}

TEST_CASE("who switches it off is sent everything through the socket") {
  MeshOptions off = patient_options();
  off.shared_bytes = 0;
  TestPeers peers = make_peers(1, kUnix, off);
  peers.push_back(std::make_unique<TestPeer>(101, std::uint8_t{1}, kUnix, patient_options()));
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  for (unsigned i = 0; i < 4; ++i) peers[1]->send(100, 0, bytes_of(kLarge, i), i);
  REQUIRE(run_until(peers, [&] { return peers[0]->got.size() == 4; }));
  CHECK(peers[0]->got[3].payload == bytes_of(kLarge, 3));
  CHECK(peers[1]->mesh.lent_so_far() == 0);
  CHECK(peers[1]->mesh.lendable(kLarge) == nullptr);
}

TEST_CASE("memory made for lending is sent without a copy") {
  TestPeers peers = connected(2, patient_options());
  peers[1]->holds = true;
  const auto block = peers[0]->mesh.lendable(kLarge);
  REQUIRE(block != nullptr);
  std::fill_n(block.get(), kLarge, std::byte{1});
  std::uint64_t sent = 0;
  // The first goes through the socket, while the segment is offered.
  while (peers[0]->mesh.lent() == 0) {
    OutFrame frame;
    frame.header.type = FrameType::contribution;
    frame.header.src = 0;
    frame.header.dst = 1;
    frame.header.payload_bytes = kLarge;
    frame.payload = block.get();
    frame.keep = block;
    peers[0]->queues[101].push_back(std::move(frame));
    ++sent;
    REQUIRE(run_until(peers, [&] { return peers[1]->got.size() == sent; }));
    REQUIRE(sent < 10);
  }
  block[5] = std::byte{2};  // seen there, because it is the same memory
  CHECK(peers[1]->got.back().incoming.target[5] == std::byte{2});
  CHECK(peers[1]->got.back().payload[5] == std::byte{1});
  peers[1]->got.clear();
  CHECK(run_until(peers, [&] { return peers[0]->mesh.lent() == 0; }));
}

TEST_CASE("a link cut at random: what was read stays, what is used again is never what is read") {
  const unsigned seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937 random(seed);
  TestPeers peers = connected(2, patient_options());
  const std::vector<PeerInfo> all = {peers[0]->info(), peers[1]->info()};
  std::vector<Got> kept;
  for (int cut = 0; cut < 12; ++cut) {
    peers[1]->holds = true;
    for (unsigned i = 0; i < 20; ++i) {
      const auto what = static_cast<unsigned>(random());
      peers[0]->send(101, 1, bytes_of(kLarge, what), what);
    }
    const std::size_t enough = random() % 20;
    REQUIRE(run_until(peers, [&] { return peers[1]->got.size() >= enough; }));
    for (Got& frame : peers[1]->got) kept.push_back(std::move(frame));
    peers[1]->got.clear();
    peers[0]->queues.clear();
    // Both ends hear of it, before or after a new stream is up.
    const std::size_t who = random() % 2;
    TestPeer& other = *peers[1 - who];
    const int resets = other.resets[peers[who]->id];
    peers[who]->mesh.set_peers({all[who]}, Mesh::now());
    peers[who]->mesh.set_peers(all, Mesh::now());
    REQUIRE(
        run_until(peers, [&] { return all_up(peers) && other.resets[all[who].peer] > resets; }));
    if (kept.size() > 40) kept.erase(kept.begin(), kept.begin() + 20);
    for (const Got& frame : kept) {
      REQUIRE(frame.payload == bytes_of(kLarge, unsigned(frame.header.seq)));
      if (frame.incoming.target == nullptr) continue;
      CHECK(std::equal(frame.payload.begin(), frame.payload.end(), frame.incoming.target));
    }
  }
  kept.clear();
  peers[1]->holds = false;
  peers[1]->got.clear();
  CHECK(run_until(peers, [&] { return peers[0]->mesh.lent() == 0; }));
}

TEST_CASE("a peer of this host that lies is refused") {
  TestPeers peers = make_peers(1, kUnix, patient_options());
  RawPeer liar(*peers[0]);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  Header answer;
  constexpr std::size_t kBytes = 1 << 20;
  const Fd good = memory(kBytes, kAllSeals);
  const auto refused = [&](const char* why) {
    REQUIRE(run_until(peers, [&] { return peers[0]->saw(MeshEvent::Kind::refused, 50); }));
    CHECK(reason(*peers[0]) == why);
    CHECK_FALSE(all_up(peers));
  };
  const auto offer = [&](int fd, std::uint64_t bytes) {
    liar.say(FrameType::memory, 3, bytes, 0, fd);
    REQUIRE(liar.hears(peers, FrameType::memory, answer));
    CHECK(answer.flags == kFlagReply);
    CHECK(answer.a == 3);
    CHECK(all_up(peers));
    return answer.c == 1;
  };

  SUBCASE("no descriptor") { CHECK_FALSE(offer(-1, kBytes)); }
  SUBCASE("no seals") { CHECK_FALSE(offer(memory(kBytes, 0).get(), kBytes)); }
  SUBCASE("another size") { CHECK_FALSE(offer(good.get(), kBytes + 4096)); }
  SUBCASE("a segment twice") {
    REQUIRE(offer(good.get(), kBytes));
    liar.say(FrameType::memory, 3, kBytes, 0, good.get());
    refused("a segment that was there");
  }
  SUBCASE("a segment number beyond 32 bits") {
    liar.say(FrameType::memory, ~std::uint64_t{0}, kBytes, 0, good.get());
    refused("a segment with an impossible number");
  }
  SUBCASE("a loan of no segment") {
    liar.say(FrameType::lend, 7, 0, 0);
    refused("a loan of no segment");
  }
  SUBCASE("a loan that begins beyond its segment") {
    REQUIRE(offer(good.get(), kBytes));
    liar.say(FrameType::lend, 3, kBytes, 0);
    refused("a loan beyond its segment");
  }
  SUBCASE("a payload that ends beyond its segment") {
    REQUIRE(offer(good.get(), kBytes));
    liar.say(FrameType::lend, 3, kBytes - 64, 0);
    Header frame;
    frame.type = FrameType::contribution;
    frame.payload_bytes = 65;
    liar.say(frame);
    refused("a payload beyond its memory");
  }
  SUBCASE("a segment that is gone") {
    REQUIRE(offer(good.get(), kBytes));
    liar.say(FrameType::memory, 3, 0, 0);
    liar.say(FrameType::lend, 3, 0, 0);
    refused("a loan of no segment");
  }
  SUBCASE("two loans for one frame") {
    REQUIRE(offer(good.get(), kBytes));
    liar.say(FrameType::lend, 3, 0, 0);
    liar.say(FrameType::lend, 3, 0, 1);
    refused("a loan without a frame");
  }
  SUBCASE("a loan returned that was not out") {
    liar.say(FrameType::returned, 0, 1, 0);
    refused("a loan returned that was not out");
  }
  SUBCASE("an answer without a question") {
    Header said;
    said.type = FrameType::memory;
    said.flags = kFlagReply;
    liar.say(said);
    refused("an answer without a question");
  }
  SUBCASE("an honest loan is taken and given back") {
    REQUIRE(offer(good.get(), kBytes));
    liar.say(FrameType::lend, 3, 64, 11);
    Header frame;
    frame.type = FrameType::contribution;
    frame.payload_bytes = 128;
    liar.say(frame);
    REQUIRE(run_until(peers, [&] { return peers[0]->got.size() == 1; }));
    REQUIRE(liar.hears(peers, FrameType::returned, answer));
    CHECK(answer.a == 11);
    CHECK(answer.b == 1);
  }
}

TEST_CASE("memory is not taken over TCP") {
  TestPeers peers = make_peers(2, {"tcp://127.0.0.1:0"}, patient_options());
  introduce(peers);
  REQUIRE(run_until(peers, [&] { return all_up(peers); }));
  OutFrame frame;
  frame.header.type = FrameType::lend;
  peers[0]->queues[101].push_back(std::move(frame));
  REQUIRE(run_until(peers, [&] { return peers[1]->saw(MeshEvent::Kind::refused, 100); }));
  CHECK(reason(*peers[1]) == "shared memory out of place");
}

}  // namespace decotrain::net
