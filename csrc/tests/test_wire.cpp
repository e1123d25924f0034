// Bytes of frames and specifications against docs/wire.md, and that garbage is no frame.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <span>

#include "wire.h"

using namespace decotrain;

namespace {

Header example() {
  Header h;
  h.type = FrameType::result;
  h.flags = kFlagRelayed;
  h.src = 3;
  h.dst = 5;
  h.view = 0x0102030405060708;
  h.tag = 0x11121314;
  h.chunk = 0x21222324;
  h.seq = 0x3132333435363738;
  h.payload_bytes = 0x00414243;
  h.spec_digest = 0x51525354;
  h.a = 0x6162636465666768;
  h.b = 0x7172737475767778;
  h.c = 0x8182838485868788;
  return h;
}

std::uint64_t little(const std::byte* at, std::size_t bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < bytes; ++i) value |= std::to_integer<std::uint64_t>(at[i]) << (8 * i);
  return value;
}

}  // namespace

TEST_CASE("a header has the offsets of docs/wire.md") {
  std::array<std::byte, kHeaderBytes> bytes;
  write(example(), bytes);
  const std::byte* p = bytes.data();
  CHECK(std::memcmp(p, "DTF1", 4) == 0);
  CHECK(little(p + 4, 1) == 4);
  CHECK(little(p + 5, 1) == 2);
  CHECK(little(p + 6, 1) == 3);
  CHECK(little(p + 7, 1) == 5);
  CHECK(little(p + 8, 8) == 0x0102030405060708);
  CHECK(little(p + 16, 4) == 0x11121314);
  CHECK(little(p + 20, 4) == 0x21222324);
  CHECK(little(p + 24, 8) == 0x3132333435363738);
  CHECK(little(p + 32, 4) == 0x00414243);
  CHECK(little(p + 36, 4) == 0x51525354);
  CHECK(little(p + 40, 8) == 0x6162636465666768);
  CHECK(little(p + 48, 8) == 0x7172737475767778);
  CHECK(little(p + 56, 8) == 0x8182838485868788);
}

TEST_CASE("what is written is read back") {
  std::array<std::byte, kHeaderBytes> bytes;
  write(example(), bytes);
  const auto read = parse(bytes);
  REQUIRE(read);
  std::array<std::byte, kHeaderBytes> again;
  write(*read, again);
  CHECK(bytes == again);
}

TEST_CASE("a header that breaks the table is none") {
  std::array<std::byte, kHeaderBytes> good;
  write(example(), good);
  const auto broken = [&](std::size_t at, int value) {
    auto bytes = good;
    bytes[at] = std::byte(value);
    return !parse(bytes).has_value();
  };
  CHECK(broken(0, 'X'));
  CHECK(broken(3, '2'));  // another version of the protocol
  CHECK(broken(4, 0));    // types
  CHECK(broken(4, 14));
  CHECK(broken(5, 8));   // a flag nobody knows
  CHECK(broken(6, 64));  // slots
  CHECK(broken(7, 254));
  CHECK(broken(35, 4));  // 64 MiB and more
  CHECK_FALSE(broken(6, 255));
}

TEST_CASE("random bytes never pass unchecked") {
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    std::array<std::byte, kHeaderBytes> bytes;
    write(example(), bytes);
    for (int k = 0; k < 4; ++k) bytes[4 + random() % 60] = std::byte(random() % 256);
    const auto header = parse(bytes);
    if (!header) continue;
    CHECK(header->payload_bytes <= kMaxChunkBytes);
    CHECK((header->src < kMaxPeers || header->src == kNoSlot));
  }
}

TEST_CASE("a specification is packed and checked") {
  RoundSpec spec;
  spec.op = Op::sum;
  spec.rule = Rule::sum;
  spec.elements = 1000;
  spec.chunk_elements = 300;
  spec.ahead = 3;
  const auto packed = pack(spec);
  CHECK(unpack_spec(packed) == spec);
  CHECK(chunk_count(spec) == 4);
  CHECK(chunk_elements(spec, 2) == 300);
  CHECK(chunk_elements(spec, 3) == 100);
  CHECK(chunk_elements(spec, 4) == 0);
  const auto broken = [&](std::size_t at, int value) {
    auto bytes = packed;
    bytes[at] = std::byte(value);
    return !unpack_spec(bytes).has_value();
  };
  CHECK(broken(0, 3));
  CHECK(broken(0, 0));  // mean, and a rule that sums
  CHECK(broken(1, 5));
  CHECK(broken(2, kCodecCount));
  CHECK(broken(15, 1));     // 2^56 elements
  CHECK(broken(19, 0xff));  // chunks of 16 GiB
  CHECK(broken(20, kMaxAhead + 1));
  CHECK(broken(21, 1));
  CHECK_FALSE(unpack_spec(std::span(packed).first(23)).has_value());
  spec.chunk_elements = 0;
  CHECK_FALSE(unpack_spec(pack(spec)).has_value());
}

TEST_CASE("a specification whose rule would make nothing is refused") {
  RoundSpec spec;
  spec.elements = 8;
  spec.chunk_elements = 8;
  const auto taken = [&](Rule rule, float parameter) {
    spec.rule = rule;
    spec.rule_parameter = parameter;
    return unpack_spec(pack(spec)).has_value();
  };
  CHECK(taken(Rule::median, 0.0f));
  CHECK(taken(Rule::trimmed_mean, 0.25f));
  CHECK_FALSE(taken(Rule::trimmed_mean, 0.5f));
  CHECK_FALSE(taken(Rule::trimmed_mean, -0.1f));
  CHECK(taken(Rule::norm_clip, 2.0f));
  CHECK_FALSE(taken(Rule::norm_clip, 0.0f));
  CHECK_FALSE(taken(Rule::norm_clip, -2.0f));
}

TEST_CASE("a short header is what differs, and comes out whole") {
  std::mt19937_64 random(7);
  HeaderBytes base{};
  for (int turn = 0; turn < 2000; ++turn) {
    HeaderBytes header = base;
    if (turn % 100 == 0) write(example(), header);
    const int changes = static_cast<int>(random() % 70);
    for (int i = 0; i < changes; ++i) {
      // The type is the base's: a stream has one base for each type.
      const std::size_t at = random() % kHeaderBytes;
      if (at != 4) header[at] = static_cast<std::byte>(random());
    }
    HeaderBytes out{};
    const std::size_t bytes = shorten(header, base, out);
    REQUIRE(bytes <= kHeaderBytes);
    // A whole header has to begin with what no short one begins with, as `write` makes it.
    if (bytes == kHeaderBytes && out[0] == kShortMark) continue;
    for (std::size_t known = 0; known < std::min(bytes, kShortHeaderBytes); ++known) {
      const std::size_t told = header_bytes(std::span(out).first(known));
      CHECK((told == 0 || told == bytes));
    }
    REQUIRE(header_bytes(out) == bytes);
    CHECK(type_of(out) == std::to_integer<std::uint8_t>(header[4]));
    CHECK(lengthen(std::span(out).first(bytes), base) == header);
    base = header;
  }
}

TEST_CASE("frames of one round after the other have few bytes of header") {
  Header header = example();
  HeaderBytes base{};
  HeaderBytes next{};
  write(header, base);
  header.seq += 1;
  header.b = 0xf0f1f2f3f4f5f6f7;
  write(header, next);
  HeaderBytes out{};
  CHECK(shorten(next, base, out) == kShortHeaderBytes + 1 + 8);
}

TEST_CASE("any bytes make a header of bounded length that is checked") {
  std::mt19937_64 random(8);
  for (int turn = 0; turn < 2000; ++turn) {
    std::array<std::byte, kShortHeaderBytes + kHeaderBytes> bytes{};
    for (std::byte& one : bytes) one = static_cast<std::byte>(random());
    bytes[0] = kShortMark;
    const std::size_t count = header_bytes(bytes);
    REQUIRE(count <= bytes.size());
    const HeaderBytes whole = lengthen(std::span(bytes).first(count), HeaderBytes{});
    CHECK_FALSE(parse(whole).has_value());
  }
}
