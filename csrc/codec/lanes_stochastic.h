// Stochastic rounding in 16 lanes: codes chosen anew by chance, where the scales are known already.
// Part of lanes.h, where the lane types are explained; the scalar reference is in scalar.cpp.
#pragma once

#include "codec/kernels.h"
#include "philox.h"

namespace decotrain {
namespace {

using namespace block;

constexpr std::size_t kRow = 16;
constexpr std::size_t kRows = 4;  // rows of 16 values for each call of Philox, one word each
constexpr std::size_t kCall = kRow * kRows;

template <typename V>
struct Uniforms {
  typename V::F row[kRows];
};

template <typename V>
typename V::I differ(typename V::I a, typename V::I b) {
  return V::minus(V::either(a, b), V::both(a, b));
}

// For the 64 values from number `first` on, a multiple of 64: in [0, 1), 24 bits.
template <typename V>
Uniforms<V> uniforms(const Chance& chance, std::uint64_t first) {
  static constexpr u8 kCount[kRow] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const std::uint64_t counter = first / kRows;
  auto c0 = V::plus(V::set(static_cast<u32>(counter)), V::load_u8(kCount));
  auto c1 = V::set(static_cast<u32>(counter >> 32));
  auto c2 = V::set(static_cast<u32>(chance.stream));
  auto c3 = V::set(static_cast<u32>(chance.stream >> 32));
  u32 k0 = static_cast<u32>(chance.key);
  u32 k1 = static_cast<u32>(chance.key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    typename V::I high0, low0, high1, low1;
    V::product(c0, kPhiloxM0, high0, low0);
    V::product(c2, kPhiloxM1, high1, low1);
    c0 = differ<V>(differ<V>(high1, c1), V::set(k0));
    c2 = differ<V>(differ<V>(high0, c3), V::set(k1));
    c1 = low1;
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const auto unit = [](typename V::I word) {
    return V::mul(V::to_float(V::template right<8>(word)), V::set(0x1p-24f));
  };
  return {{unit(c0), unit(c1), unit(c2), unit(c3)}};
}

// 1 where a goes up: its distance from the level below is more than u times the gap. Both are not
// negative, and such floats compare as integers.
template <typename V>
typename V::I goes_up(typename V::F part_of_gap, typename V::F above) {
  const auto least = V::plus(V::bits(part_of_gap), V::set(1u));
  return V::keep_at_least(V::bits(above), least, V::set(1u));
}

template <typename V>
struct ChooseInt8 {
  static constexpr std::size_t kBlock = kInt8Block;
  struct Scale {
    typename V::F scale;
  };

  static bool find(const Place& out, std::size_t i, Scale& found) {
    float scale;
    std::memcpy(&scale, out.scales + i / kBlock * sizeof scale, sizeof scale);
    found.scale = V::set(scale);
    return scale != 0.0f;
  }
  static typename V::I code(const Scale& of, typename V::F x, typename V::F u) {
    const auto m = V::real(V::both(V::bits(x), V::set(kMagnitude)));
    const auto a = V::real(V::min(V::bits(V::div(m, of.scale)), V::set(bits(127.0f))));
    const auto low = V::truncate(a);
    const auto up = goes_up<V>(u, V::sub(a, V::to_float(low)));
    const auto minus = V::minus(V::set(0u), V::template right<31>(V::bits(x)));
    return V::minus(differ<V>(V::plus(low, up), minus), minus);
  }
  static void put(u8* codes, std::size_t i, const typename V::I* code) {
    V::store_u8(codes + i, code[0]);
    V::store_u8(codes + i + kRow, code[1]);
  }
  static std::size_t code_bytes(std::size_t count) { return (count + kRow - 1) / kRow * kRow; }
};

// Codecs of eight magnitudes; the table holds them, then the next higher of each.
template <typename V, u32 codec>
struct ChooseEight {
  static constexpr std::size_t kBlock = codec == 4 ? kE2m1Block : kE3m0Block;
  struct Scale {
    float levels[kRow];
    typename V::Table table;
  };

  static bool find(const Place& out, std::size_t i, Scale& found) {
    u32 scale = out.scales[i / kBlock];
    if constexpr (codec == 4) {
      scale = e2m1_scale_bits(static_cast<u8>(scale), out.exponents[i / kE2m1Group]);
    }
    for (u32 c = 0; c < 8; ++c) {
      found.levels[c] = codec == 4 ? mul(e2m1_level(c), real(scale)) : e3m0_value(c, scale);
    }
    for (u32 c = 0; c < 8; ++c) found.levels[8 + c] = found.levels[c < 7 ? c + 1 : 7];
    found.table = V::table(V::load(found.levels));
    return scale != 0;
  }
  static typename V::I code(const Scale& of, typename V::F x, typename V::F u) {
    const auto a = V::min(V::both(V::bits(x), V::set(kMagnitude)), V::set(bits(of.levels[7])));
    auto code = V::set(0u);
    for (u32 c = 1; c < 8; ++c) {
      code = V::plus(code, V::keep_at_least(a, V::set(bits(of.levels[c])), V::set(1u)));
    }
    const auto low = V::lookup(of.table, code);
    const auto gap = V::sub(V::lookup(of.table, V::either(code, V::set(8u))), low);
    code = V::plus(code, goes_up<V>(V::mul(u, gap), V::sub(V::real(a), low)));
    const auto sign = V::both(V::template right<28>(V::bits(x)), V::set(8u));
    return V::keep_at_least(code, V::set(1u), V::either(code, sign));
  }
  static void put(u8* codes, std::size_t i, const typename V::I* code) {
    V::store_u8(codes + i / 2, V::either(code[0], V::template left<4>(code[1])));
  }
  static std::size_t code_bytes(std::size_t count) { return (count + 31) / 32 * kRow; }
};

template <typename V>
using ChooseE2m1 = ChooseEight<V, 4>;
template <typename V>
using ChooseE3m0 = ChooseEight<V, 5>;

// 32 values of one block, which are not all zeros.
template <typename V, template <typename> class C>
void choose_pair(const typename C<V>::Scale& scale, const float* x, const typename V::F* u,
                 u8* codes, std::size_t i) {
  const typename V::I code[2] = {C<V>::code(scale, V::load(x), u[0]),
                                 C<V>::code(scale, V::load(x + kRow), u[1])};
  C<V>::put(codes, i, code);
}

template <typename V, template <typename> class C>
void choose_with(const float* values, std::size_t elements, std::uint64_t first,
                 const Chance& chance, const Place& out) {
  typename C<V>::Scale scale;
  bool zeros = true;
  std::size_t i = 0;
  for (; i < elements; i += kCall) {
    const Uniforms<V> u = uniforms<V>(chance, first + i);
    for (std::size_t row = 0; row < kRows; row += 2) {
      const std::size_t at = i + row * kRow;
      if (at >= elements) return;
      if (at % C<V>::kBlock == 0) zeros = !C<V>::find(out, at, scale);
      if (zeros) continue;
      const std::size_t left = elements - at;
      if (left >= 2 * kRow) {
        choose_pair<V, C>(scale, values + at, u.row + row, out.codes, at);
      } else {  // values that do not exist have code 0
        float padded[2 * kRow] = {};
        u8 codes[2 * kRow];
        std::memcpy(padded, values + at, left * sizeof(float));
        choose_pair<V, C>(scale, padded, u.row + row, codes, 0);
        u8* const to = out.codes + C<V>::code_bytes(at);
        std::memcpy(to, codes, C<V>::code_bytes(left));
      }
    }
  }
}

}  // namespace
}  // namespace decotrain
