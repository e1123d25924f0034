// Nodes of one process over real sockets: rounds give every node the same bits, whatever happens to
// the links meanwhile.
#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "buffers.h"
#include "node.h"
#include "segments.h"
#include "simd.h"

namespace decotrain {
namespace {

using Nodes = std::vector<std::unique_ptr<Node>>;

Nodes make_nodes(std::size_t n, const std::vector<std::string>& listen, bool force_tcp = false) {
  NodeOptions options;
  options.mesh.run_fingerprint = 1;
  options.mesh.force_tcp = force_tcp;
  options.mesh.backoff_min_s = 0.01;
  Nodes nodes;
  for (std::size_t i = 0; i < n; ++i) {
    nodes.push_back(std::make_unique<Node>(10 + i, listen, options));
  }
  return nodes;
}

void introduce(Nodes& nodes) {
  std::vector<net::PeerInfo> all;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    all.push_back({nodes[i]->self(), static_cast<std::uint8_t>(i), nodes[i]->addresses()});
  }
  for (auto& node : nodes) node->set_peers(all);
}

void install_first_view(Nodes& nodes) {
  Install install;
  install.view.id = std::uint64_t{1} << 32 | 1;
  install.answers = {1, 1};
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    install.view.members.push_back({nodes[i]->self(), static_cast<std::uint8_t>(i), true, 1.0});
    install.reported |= SlotMask{1} << i;
  }
  for (auto& node : nodes) node->freeze(install.answers);
  for (auto& node : nodes) REQUIRE(node->install(install));
}

std::vector<float> values_of(std::size_t n, std::size_t peer) {
  std::vector<float> out(n);
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = static_cast<float>((i * 7 + peer * 13) % 101) - 50.0f;
  }
  return out;
}

Segments segments_of(std::vector<float>& values) {
  return {{Codec::f32, reinterpret_cast<std::byte*>(values.data()), values.size()}};
}

std::shared_ptr<Work> begin(Node& node, std::vector<float>& values, std::uint32_t tag = 0) {
  BeginArgs args;
  args.tag = tag;
  args.spec.elements = values.size();
  args.spec.chunk_elements = default_chunk_elements(values.size());
  args.snapshot = encode_segments(args.spec, segments_of(values), {}, false, {});
  return node.begin(std::move(args));
}

// The mean over all nodes, in every node's buffer.
void check_round(Nodes& nodes, std::size_t elements, std::uint32_t tag = 0) {
  std::vector<std::vector<float>> buffers;
  for (std::size_t i = 0; i < nodes.size(); ++i) buffers.push_back(values_of(elements, i));
  std::vector<float> expected(elements, 0.0f);
  for (const auto& buffer : buffers) {
    for (std::size_t k = 0; k < elements; ++k) expected[k] += buffer[k];
  }
  for (float& value : expected) value /= static_cast<float>(nodes.size());
  std::vector<std::shared_ptr<Work>> works;
  for (std::size_t i = 0; i < nodes.size(); ++i) works.push_back(begin(*nodes[i], buffers[i], tag));
  std::uint64_t digest = 0;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    REQUIRE(works[i]->wait(30.0));
    const auto result = works[i]->result();
    REQUIRE(result);
    CHECK(result->outcome == Outcome::stable);
    if (i == 0) digest = result->digest;
    CHECK(result->digest == digest);
    decode_segments(*result, segments_of(buffers[i]));
    CHECK(std::memcmp(buffers[i].data(), buffers[0].data(), elements * sizeof(float)) == 0);
  }
  for (std::size_t k = 0; k < elements; ++k) {
    REQUIRE(std::abs(buffers[0][k] - expected[k]) <= 1e-4f);
  }
}

}  // namespace

TEST_CASE("rounds of every size, over every transport, any number of nodes") {
  for (const std::size_t n : {1u, 2u, 3u, 5u}) {
    Nodes nodes = make_nodes(n, {"tcp://127.0.0.1:0", "unix://"}, n == 3);
    introduce(nodes);
    install_first_view(nodes);
    for (const std::size_t elements : {1u, 4u, 16383u, 16385u, 100000u, 1000003u}) {
      check_round(nodes, elements);
    }
  }
}

TEST_CASE("a round that was begun before there is a view waits for it") {
  Nodes nodes = make_nodes(2, {"unix://"});
  std::vector<float> first = values_of(1000, 0), second = values_of(1000, 1);
  const auto work = begin(*nodes[0], first);
  CHECK_FALSE(work->wait(0.01));
  CHECK_FALSE(work->seq());
  introduce(nodes);
  install_first_view(nodes);
  const auto other = begin(*nodes[1], second);
  CHECK(work->wait(10.0));
  CHECK(other->wait(10.0));
  CHECK(work->seq() == 0);
}

TEST_CASE("rounds of several tags from several threads at once") {
  Nodes nodes = make_nodes(3, {"unix://"});
  introduce(nodes);
  install_first_view(nodes);
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    for (std::uint32_t tag = 0; tag < 3; ++tag) {
      threads.emplace_back([&, i, tag] {
        for (int round = 0; round < 10; ++round) {
          std::vector<float> buffer = values_of(50000, i);
          const auto work = begin(*nodes[i], buffer, tag);
          if (!work->wait(30.0) || !work->result()) ++wrong;
        }
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST_CASE("closing a node fails what is open and later calls") {
  Nodes nodes = make_nodes(2, {"unix://"});
  introduce(nodes);
  install_first_view(nodes);
  std::vector<float> buffer = values_of(1000, 0);
  const auto work = begin(*nodes[0], buffer);
  nodes[0]->close();
  CHECK_THROWS_AS(work->wait(1.0), NodeError);
  CHECK_THROWS_AS(begin(*nodes[0], buffer), NodeError);
}

TEST_CASE("segments of three types are one space") {
  std::vector<float> a = values_of(1000, 1);
  std::vector<std::uint16_t> b(777), c(333);
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<std::uint16_t>(0x3f80 + i % 50);
  for (std::size_t i = 0; i < c.size(); ++i) c[i] = static_cast<std::uint16_t>(0x3c00 + i % 50);
  const auto before_b = b;
  const auto before_c = c;
  const auto before_a = a;
  const Segments segments = {{Codec::f32, reinterpret_cast<std::byte*>(a.data()), a.size()},
                             {Codec::bf16, reinterpret_cast<std::byte*>(b.data()), b.size()},
                             {Codec::f16, reinterpret_cast<std::byte*>(c.data()), c.size()}};
  RoundSpec spec;
  spec.elements = total_elements(segments);
  spec.chunk_elements = 256;
  const Snapshot snapshot = encode_segments(spec, segments, {}, false, {});
  RoundResult result;
  result.spec = spec;
  std::size_t at = 0;
  for (std::uint32_t i = 0; i < chunk_count(spec); ++i) {
    const std::size_t bytes = encoded_bytes(spec.result, chunk_elements(spec, i));
    result.chunks.push_back(snapshot.bytes + at);
    result.chunk_bytes.push_back(static_cast<std::uint32_t>(bytes));
    at += bytes;
  }
  std::fill(a.begin(), a.end(), 0.0f);
  std::fill(b.begin(), b.end(), std::uint16_t{0});
  std::fill(c.begin(), c.end(), std::uint16_t{0});
  decode_segments(result, segments);
  CHECK(a == before_a);
  CHECK(b == before_b);
  CHECK(c == before_c);
  result.chunk_bytes[0] = 0;  // nobody contributed: zeros, the same on every peer
  decode_segments(result, segments);
  CHECK(a[255] == 0.0f);
  CHECK(a[256] == before_a[256]);
  b[10] = 0x7f80;
  CHECK_THROWS_AS(encode_segments(spec, segments, {}, false, {}), NotFinite);
  CHECK(first_not_finite(segments) == 1);
}

TEST_CASE("a large buffer comes and goes past the cache with the same bits") {
  for (const std::size_t offset : {0u, 1u}) {  // aligned and not
    const std::size_t n = (std::size_t{2} << 20) + 77;
    std::vector<float> room = values_of(n + 1, 3);
    room[offset + 12345] = -0.0f;
    room[offset + 12346] = 1e-40f;
    const Segments segments = {{Codec::f32, reinterpret_cast<std::byte*>(room.data() + offset), n}};
    RoundSpec spec;
    spec.elements = n;
    spec.chunk_elements = default_chunk_elements(n);
    const Snapshot snapshot = encode_segments(spec, segments, {}, false, {});
    CHECK(std::memcmp(snapshot.bytes, room.data() + offset, n * sizeof(float)) == 0);
    RoundResult result;
    result.spec = spec;
    for (std::uint32_t i = 0; i < chunk_count(spec); ++i) {
      result.chunks.push_back(snapshot.bytes + std::size_t{i} * spec.chunk_elements * 4);
      result.chunk_bytes.push_back(static_cast<std::uint32_t>(chunk_elements(spec, i) * 4));
    }
    std::fill(room.begin(), room.end(), 5.0f);
    decode_segments(result, segments);
    CHECK(std::memcmp(snapshot.bytes, room.data() + offset, n * sizeof(float)) == 0);
    CHECK(room[offset == 0 ? n : 0] == 5.0f);
    room[offset + n / 2] = std::numeric_limits<float>::infinity();
    CHECK_THROWS_AS(encode_segments(spec, segments, {}, false, {}), NotFinite);
    room[offset + n / 2] = 1.0f;
    room[offset + n - 1] = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS_AS(encode_segments(spec, segments, {}, false, {}), NotFinite);
  }
}

TEST_CASE("a surplus of small blocks does not cost the pool its large one") {
  constexpr std::size_t kLarge = std::size_t{128} << 20, kSmall = 256 << 10;
  {
    const auto large = allocate(kLarge);
    std::vector<std::shared_ptr<std::byte[]>> small;
    for (int i = 0; i < 200; ++i) small.push_back(allocate(kSmall));
  }
  // Rounds that need few small blocks at once, and those first, until the peak of 200 is forgotten.
  for (int round = 0; round < 5; ++round) {
    for (int i = 0; i < 5000; ++i) (void)allocate(kSmall);
    const std::size_t free_before = pool_figures().free_bytes;
    const auto large = allocate(kLarge);
    CHECK(free_before >= kLarge + pool_figures().free_bytes);  // it was still there
  }
  CHECK(pool_figures().free_bytes < kLarge + kLarge / 3);  // what was surplus is gone
}

TEST_CASE("the digest is the same at every SIMD level") {
  std::vector<float> values = values_of(5000, 1);
  const auto bytes = std::as_bytes(std::span(values));
  for (const std::size_t size : {0u, 17u, 500u, 1023u, 1024u, 4099u, 20000u}) {
    const Simd before = set_simd(Simd::scalar);
    const std::uint64_t expected = digest(bytes.first(size));
    for (const Simd level : {Simd::avx2, Simd::avx512, Simd::neon}) {
      set_simd(level);
      CHECK(digest(bytes.first(size)) == expected);
    }
    set_simd(before);
  }
}

TEST_CASE("error feedback keeps what the codec lost") {
  std::vector<float> x(1000), e(1000, 0.25f);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 1.0f + static_cast<float>(i) * 0.001f;
  RoundSpec spec;
  spec.contribution = Codec::bf16;
  spec.elements = x.size();
  spec.chunk_elements = 300;
  const Snapshot snapshot = encode_segments(spec, segments_of(x), segments_of(e), true, {});
  CHECK(e == std::vector<float>(1000, 0.25f));  // before the round has it nothing has changed
  keep_lost(spec, segments_of(x), segments_of(e), snapshot.bytes);
  std::vector<float> sent(x.size());
  REQUIRE(decode(Codec::bf16, snapshot.bytes, sent));
  for (std::size_t i = 0; i < x.size(); ++i) CHECK(x[i] + 0.25f - sent[i] == e[i]);
}

TEST_CASE("a residual may be bf16, and in other pieces than the values") {
  std::vector<float> x = values_of(1000, 2), e(1000);
  for (std::size_t i = 0; i < e.size(); ++i) e[i] = static_cast<float>(i % 16) * 0.125f;
  std::vector<std::uint16_t> half(1000);
  REQUIRE(encode(Codec::bf16, e, reinterpret_cast<std::byte*>(half.data())));
  const Segments pieces = {{Codec::bf16, reinterpret_cast<std::byte*>(half.data()), 130},
                           {Codec::bf16, reinterpret_cast<std::byte*>(half.data() + 130), 870}};
  RoundSpec spec;
  spec.contribution = Codec::e2m1;
  spec.elements = x.size();
  spec.chunk_elements = 300;
  const Snapshot one = encode_segments(spec, segments_of(x), segments_of(e), false, {});
  const Snapshot two = encode_segments(spec, segments_of(x), pieces, false, {});
  CHECK(std::memcmp(one.bytes, two.bytes, round_bytes(spec, spec.contribution)) == 0);
  keep_lost(spec, segments_of(x), segments_of(e), one.bytes);
  keep_lost(spec, segments_of(x), pieces, two.bytes);
  std::vector<std::uint16_t> nearest(1000);
  REQUIRE(encode(Codec::bf16, e, reinterpret_cast<std::byte*>(nearest.data())));
  CHECK(half == nearest);
}

TEST_CASE("a poisoned contribution names its buffer, and changes no residual") {
  for (const Codec codec : {Codec::f32, Codec::bf16, Codec::int8, Codec::e2m1, Codec::int2}) {
    std::vector<float> a = values_of(700, 1), b = values_of(300, 2), e(1000, 0.25f);
    Segments segments = segments_of(a);
    segments.push_back(segments_of(b)[0]);
    RoundSpec spec;
    spec.contribution = codec;
    spec.elements = 1000;
    spec.chunk_elements = 256;
    const auto refused_for = [&]() -> std::size_t {
      try {
        encode_segments(spec, segments, segments_of(e), false, {});
      } catch (const NotFinite& error) {
        return error.segment;
      }
      return 99;
    };
    CHECK(refused_for() == 99);
    b[250] = std::numeric_limits<float>::quiet_NaN();  // in the last of four chunks
    CHECK(refused_for() == 1);
    CHECK(e == std::vector<float>(1000, 0.25f));
    b[250] = 1.0f;
    e[100] = a[100] = std::numeric_limits<float>::max();  // finite both, and the sum is not
    CHECK(refused_for() == 0);
  }
}

}  // namespace decotrain
