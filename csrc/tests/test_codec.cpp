// Codecs: what encode, decode, valid and combine promise (docs/codecs.md).
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "codec/codec.h"
#include "simd.h"

using namespace decotrain;

TEST_CASE("f32: mean is weighted, NaN is refused") {
  const std::array<float, 3> a{1.0f, 2.0f, -3.0f};
  const std::array<float, 3> b{4.0f, 0.0f, 9.0f};
  std::array<std::byte, 12> ea;
  std::array<std::byte, 12> eb;
  REQUIRE(encode(Codec::f32, a, ea.data()));
  REQUIRE(encode(Codec::f32, b, eb.data()));
  const std::array<Contribution, 2> from{{{ea.data(), 1.0f}, {eb.data(), 0.5f}}};
  std::array<std::byte, 12> result;
  std::array<float, 3> mean;
  REQUIRE(combine(Rule::mean, 0.0f, Codec::f32, from, 3, Codec::f32, result.data()));
  REQUIRE(decode(Codec::f32, result.data(), mean));
  CHECK(mean[0] == doctest::Approx(2.0));
  CHECK(mean[2] == doctest::Approx(1.0));
  REQUIRE(combine(Rule::sum, 0.0f, Codec::f32, from, 3, Codec::f32, result.data()));
  REQUIRE(decode(Codec::f32, result.data(), mean));
  CHECK(mean[0] == 5.0f);

  const std::array<float, 1> bad{std::numeric_limits<float>::quiet_NaN()};
  CHECK_FALSE(encode(Codec::f32, bad, ea.data()));
  std::memcpy(ea.data(), bad.data(), 4);
  CHECK_FALSE(valid(Codec::f32, ea.data(), 1));
}

namespace {

std::vector<float> sample(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::student_t_distribution<float> draw(4.0f);
  std::vector<float> values(count);
  for (float& value : values) value = draw(random);
  return values;
}

std::vector<float> round_trip(Codec codec, const std::vector<float>& values) {
  std::vector<std::byte> bytes(encoded_bytes(codec, values.size()));
  std::vector<float> out(values.size());
  REQUIRE(encode(codec, values, bytes.data()));
  REQUIRE(valid(codec, bytes.data(), values.size()));
  REQUIRE(decode(codec, bytes.data(), out));
  return out;
}

// Values to break codecs with: every bit pattern, denormals, zeros, ties, huge and tiny ranges.
std::vector<float> nasty(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (i % 512 == 0) seed = static_cast<unsigned>(random());
    auto bits = static_cast<std::uint32_t>(random());
    if (seed % 5 == 0) bits &= 0x807fffff;                                    // denormals
    if (seed % 5 == 1) bits = (bits & 0x80ffffff) | (random() & 0x3f) << 24;  // below 1
    if (seed % 5 == 2) bits &= 0xfff00000;                                    // ties
    if (seed % 5 == 3 && i % 3 != 0) bits &= 0x80000000;                      // zeros
    if ((bits & 0x7f800000) == 0x7f800000) bits ^= 0x01000000;                // stay finite
    std::memcpy(&values[i], &bits, sizeof bits);
  }
  return values;
}

// Those that this CPU has, but for the scalar one.
std::vector<Simd> levels() {
  std::vector<Simd> found;
  for (const Simd level : {Simd::avx2, Simd::avx512, Simd::neon}) {
    if (set_simd(level) == level) found.push_back(level);
  }
  return found;
}

struct Outcome {
  bool encoded = false;
  std::vector<std::byte> bytes;
  std::vector<std::uint32_t> decoded;
  bool combined = false;
  std::vector<std::byte> mean;
};

Outcome run_codec(Codec codec, std::span<const float> values) {
  Outcome out;
  out.bytes.resize(encoded_bytes(codec, values.size()));
  out.encoded = encode(codec, values, out.bytes.data());
  if (!out.encoded) return {};
  REQUIRE(valid(codec, out.bytes.data(), values.size()));
  std::vector<float> decoded(values.size());
  REQUIRE(decode(codec, out.bytes.data(), decoded));
  out.decoded.resize(values.size());
  std::ranges::transform(decoded, out.decoded.begin(),
                         [](float value) { return std::bit_cast<std::uint32_t>(value); });
  REQUIRE(std::ranges::all_of(decoded, [](float value) { return std::isfinite(value); }));
  const std::array<Contribution, 3> from{
      {{out.bytes.data(), 0.3f}, {out.bytes.data(), 1.0f}, {out.bytes.data(), 0.7f}}};
  out.mean.resize(out.bytes.size());
  out.combined = combine(Rule::mean, 0.0f, codec, from, values.size(), codec, out.mean.data());
  if (!out.combined) out.mean.clear();
  return out;
}

}  // namespace

TEST_CASE("which SIMD levels the tests compare") {
  std::string names;
  for (const Simd level : levels()) names += std::string(" ") + simd_name(level);
  MESSAGE("with the scalar reference:", names);
  set_simd(best_simd());
}

TEST_CASE("SIMD levels give the bits of the scalar reference") {
  for (std::uint8_t c = 0; c < kCodecCount; ++c) {
    const auto codec = static_cast<Codec>(c);
    for (unsigned seed = 0; seed < 200; ++seed) {
      const std::size_t count = seed < 150 ? seed * 17 + seed % 3 : 9000 + seed;
      const std::vector<float> values = nasty(count + 3, seed);
      const std::span<const float> part(values.data() + seed % 4, count);
      set_simd(Simd::scalar);
      const Outcome scalar = run_codec(codec, part);
      CHECK(scalar.encoded);
      for (const Simd level : levels()) {
        CAPTURE(int(c));
        CAPTURE(seed);
        CAPTURE(simd_name(level));
        set_simd(level);
        const Outcome simd = run_codec(codec, part);
        CHECK(simd.encoded == scalar.encoded);
        CHECK((simd.bytes == scalar.bytes));
        CHECK((simd.decoded == scalar.decoded));
        CHECK(simd.combined == scalar.combined);
        CHECK((simd.mean == scalar.mean));
      }
    }
  }
  set_simd(best_simd());
}

TEST_CASE("SIMD levels choose the codes of stochastic rounding that the scalar reference chooses") {
  for (const Codec codec : {Codec::int8, Codec::e2m1, Codec::e3m0}) {
    for (unsigned seed = 0; seed < 200; ++seed) {
      const std::size_t count = seed < 150 ? seed * 17 + seed % 3 : 9000 + seed;
      const std::vector<float> values = nasty(count + 3, seed);
      const std::span<const float> part(values.data() + seed % 4, count);
      const std::uint64_t stream = std::uint64_t{seed} << 32 | 7;
      const auto encoded = [&](Simd level) {
        set_simd(level);
        std::vector<std::byte> bytes(encoded_bytes(codec, count), std::byte{0xa5});
        CHECK(encode_stochastic(codec, part, 0x123456789abcdef0u + seed, stream, bytes.data()));
        return bytes;
      };
      const std::vector<std::byte> scalar = encoded(Simd::scalar);
      REQUIRE(valid(codec, scalar.data(), count));
      for (const Simd level : levels()) {
        CAPTURE(codec_name(codec));
        CAPTURE(seed);
        CAPTURE(simd_name(level));
        CHECK((encoded(level) == scalar));
      }
    }
  }
  set_simd(best_simd());
}

TEST_CASE("every codec: error within its bound, zeros exact, NaN refused") {
  const std::array<double, kCodecCount> bounds{0.0, 1e-5, 1e-7, 3e-4, 0.02, 0.08, 0.35};
  for (std::uint8_t c = 0; c < kCodecCount; ++c) {
    const auto codec = static_cast<Codec>(c);
    CAPTURE(int(c));
    for (const std::size_t count : {1u, 31u, 256u, 1000u, 1025u, 70001u}) {
      CAPTURE(count);
      std::vector<float> values = sample(count, c);
      const std::vector<float> out = round_trip(codec, values);
      double error = 0;
      double power = 0;
      for (std::size_t i = 0; i < count; ++i) {
        error += std::pow(double(out[i]) - double(values[i]), 2);
        power += std::pow(double(values[i]), 2);
      }
      CHECK(error <= power * bounds[c] * (count < 1000 ? 3 : 1));
      CHECK(round_trip(codec, std::vector<float>(count, -0.0f)) == std::vector<float>(count, 0.0f));
      values[count / 2] = -std::numeric_limits<float>::infinity();
      std::vector<std::byte> bytes(encoded_bytes(codec, count));
      CHECK_FALSE(encode(codec, values, bytes.data()));
    }
  }
}

TEST_CASE("median and trimmed mean ignore an outlier, norm_clip shortens it") {
  const std::size_t count = 1500;
  std::vector<std::vector<std::byte>> bytes;
  std::vector<Contribution> from;
  for (const float value : {1.0f, 1000.0f, 2.0f, 3.0f, -500.0f}) {
    bytes.emplace_back(encoded_bytes(Codec::f32, count));
    REQUIRE(encode(Codec::f32, std::vector<float>(count, value), bytes.back().data()));
  }
  for (const auto& one : bytes) from.push_back({one.data(), 1.0f});
  const auto run = [&](Rule rule, float parameter) {
    std::vector<std::byte> result(encoded_bytes(Codec::f32, count));
    std::vector<float> out(count);
    REQUIRE(combine(rule, parameter, Codec::f32, from, count, Codec::f32, result.data()));
    REQUIRE(decode(Codec::f32, result.data(), out));
    CHECK(out.front() == out.back());
    return out.front();
  };
  CHECK(run(Rule::median, 0.0f) == 2.0f);
  CHECK(run(Rule::trimmed_mean, 0.2f) == doctest::Approx(2.0));
  CHECK(run(Rule::norm_clip, 1.0f) == doctest::Approx((1 + 3 + 2 + 3 - 3) / 5.0));
  from.resize(4);
  CHECK(run(Rule::median, 0.0f) == 2.5f);
  CHECK_FALSE(rule_valid(Rule::trimmed_mean, 0.5f));
  CHECK_FALSE(rule_valid(Rule::norm_clip, 0.0f));
}
