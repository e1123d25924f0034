// Codecs: what encode, decode, valid and combine promise (docs/codecs.md).
#include <doctest/doctest.h>

#include <array>
#include <limits>
#include <vector>

#include "codec/codec.h"

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
  CHECK_FALSE(valid(Codec::f32, ea.data(), 1));
}
