// The codecs' loops over 16 lanes, written once; lanes_avx2.cpp and its kind bring the lanes.
//
// A lane type V has F (16 floats) and I (16 integers of 32 bits). Everything here lives in an
// unnamed namespace: each file that includes it is built for another CPU, and nothing of it may be
// merged by the linker. For the same reason no standard algorithm is used.
#pragma once

#include <cstring>

#include "codec/kernels.h"
#include "codec/lanes_f32.h"
#include "codec/lanes_stochastic.h"

namespace decotrain {
namespace {

using namespace block;

template <typename V>
u32 absmax(const float* x, std::size_t count) {  // count: a multiple of 16
  typename V::I largest = V::set(0u);
  for (std::size_t i = 0; i < count; i += 16) {
    largest = V::max(largest, V::both(V::bits(V::load(x + i)), V::set(kMagnitude)));
  }
  return V::largest(largest);
}

// --- what becomes of decoded values

template <typename V>
struct Store {
  float* out;
  typename V::F scaled(typename V::F value) const { return value; }
  void put(std::size_t i, typename V::F value) const { V::store(out + i, value); }
};

template <typename V, bool first, bool weighted>
struct Add {
  float* out;
  typename V::F weight;
  typename V::F scaled(typename V::F value) const {
    return weighted ? V::mul(weight, value) : value;
  }
  void put(std::size_t i, typename V::F value) const {
    V::store(out + i, first ? value : V::add(V::load(out + i), value));
  }
};

// --- codecs of single values: 16 at a time, no scales

template <typename V>
struct F32 {
  static constexpr std::size_t kBlock = 16;
  static constexpr std::size_t kBytes = 4;
  static typename V::I encode(typename V::F x, u8* codes) {
    V::store(reinterpret_cast<float*>(codes), x);
    return V::both(V::bits(x), V::set(kMagnitude));
  }
  static typename V::F decode(const u8* codes) {
    return V::load(reinterpret_cast<const float*>(codes));
  }
};

template <typename V>
struct Bf16 {
  static constexpr std::size_t kBlock = 16;
  static constexpr std::size_t kBytes = 2;
  static typename V::I encode(typename V::F x, u8* codes) {
    const auto magnitude = V::both(V::bits(x), V::set(kMagnitude));
    const auto m = V::min(magnitude, V::set(kBf16Max));
    const auto odd = V::both(V::template right<16>(m), V::set(1u));
    const auto rounded = V::template right<16>(V::plus(V::plus(m, V::set(0x7fffu)), odd));
    const auto sign = V::both(V::template right<16>(V::bits(x)), V::set(0x8000u));
    V::store_u16(codes, V::either(rounded, sign));
    return magnitude;
  }
  static typename V::F decode(const u8* codes) {
    return V::real(V::template left<16>(V::load_u16(codes)));
  }
};

template <typename V>
struct F16 {
  static constexpr std::size_t kBlock = 16;
  static constexpr std::size_t kBytes = 2;
  static typename V::I encode(typename V::F x, u8* codes) {
    const auto magnitude = V::both(V::bits(x), V::set(kMagnitude));
    const auto sign = V::both(V::bits(x), V::set(~kMagnitude));
    V::store_f16(codes, V::real(V::either(sign, V::min(magnitude, V::set(kF16Max)))));
    return magnitude;
  }
  static typename V::F decode(const u8* codes) { return V::load_f16(codes); }
};

template <typename V, template <typename> class C>
bool encode_values(const float* x, std::size_t elements, const Place& out) {
  typename V::I largest = V::set(0u);
  std::size_t i = 0;
  for (; i + 16 <= elements; i += 16) {
    largest = V::max(largest, C<V>::encode(V::load(x + i), out.codes + i * C<V>::kBytes));
  }
  if (i < elements) {
    float in[16] = {};
    u8 codes[64];
    std::memcpy(in, x + i, (elements - i) * sizeof(float));
    largest = V::max(largest, C<V>::encode(V::load(in), codes));
    std::memcpy(out.codes + i * C<V>::kBytes, codes, (elements - i) * C<V>::kBytes);
  }
  return V::largest(largest) < kInfinity;
}

template <typename V, template <typename> class C, typename Sink>
bool decode_values(const Place& in, std::size_t elements, const Sink& sink, const Sink& tail) {
  typename V::I largest = V::set(0u);
  const auto one = [&largest](const u8* codes) {
    const auto value = C<V>::decode(codes);
    largest = V::max(largest, V::both(V::bits(value), V::set(kMagnitude)));
    return value;
  };
  std::size_t i = 0;
  for (; i + 16 <= elements; i += 16) {
    sink.put(i, sink.scaled(one(in.codes + i * C<V>::kBytes)));
  }
  if (i < elements) {
    u8 codes[64] = {};
    std::memcpy(codes, in.codes + i * C<V>::kBytes, (elements - i) * C<V>::kBytes);
    tail.put(0, tail.scaled(one(codes)));
  }
  return V::largest(largest) < kInfinity;
}

// --- codecs of blocks: encode and decode kBlock values; in the last block, `count` of them

template <typename V>
struct Int8 {
  static constexpr std::size_t kBlock = kInt8Block;
  static constexpr std::size_t kCodeBytes = kBlock;
  static std::size_t code_bytes(std::size_t count) { return count; }

  static bool encode(const float* x, std::size_t, std::size_t index, u8* codes, const Place& out) {
    const u32 largest = absmax<V>(x, kBlock);
    const auto inverse = V::set(int8_inverse(largest));
    for (std::size_t i = 0; i < kBlock; i += 16) {
      V::store_u8(codes + i, V::nearest(V::mul(V::load(x + i), inverse)));
    }
    const float scale = int8_scale(largest);
    std::memcpy(out.scales + index * sizeof scale, &scale, sizeof scale);
    return largest < kInfinity;
  }

  template <typename Sink>
  static void decode(const Place& in, std::size_t index, std::size_t first, std::size_t count,
                     const Sink& sink) {
    float scale;
    std::memcpy(&scale, in.scales + index * sizeof scale, sizeof scale);
    const auto factor = V::set(scale);
    for (std::size_t i = 0; i < count; i += 16) {
      const auto codes = V::load_i8(in.codes + index * kCodeBytes + i);
      sink.put(first + i, sink.scaled(V::mul(V::to_float(codes), factor)));
    }
  }
};

// Two 4-bit groups of 16 make 16 bytes; a table of 16 values turns them back.
template <typename V, typename Sink>
void decode_nibbles(const u8* codes, std::size_t count, std::size_t first,
                    const typename V::Table& table, const Sink& sink) {
  for (std::size_t i = 0; i < count; i += 32) {
    const auto pairs = V::load_u8(codes + i / 2);
    sink.put(first + i, V::lookup(table, pairs));
    if (i + 16 < count) sink.put(first + i + 16, V::lookup(table, V::template right<4>(pairs)));
  }
}

template <typename V>
struct E2m1 {
  static constexpr std::size_t kBlock = kE2m1Group;
  static constexpr std::size_t kCodeBytes = kBlock / 2;
  static constexpr std::size_t kCount = kE2m1Group / kE2m1Block;
  static std::size_t code_bytes(std::size_t count) { return (count + 31) / 32 * 16; }

  static typename V::I code(typename V::F x, typename V::F inverse) {
    const auto t = V::truncate(V::mul(x, inverse));
    const auto sign = V::both(V::template right<28>(t), V::set(8u));
    return V::either(V::e2m1(V::absolute(t)), sign);
  }

  static bool encode(const float* x, std::size_t count, std::size_t index, u8* codes,
                     const Place& out) {
    u32 scales[kCount];
    u32 exponent = 0;
    u32 largest = 0;
    for (std::size_t b = 0; b < kCount; ++b) {
      const u32 top = absmax<V>(x + b * kE2m1Block, kE2m1Block);
      largest = top > largest ? top : largest;
      scales[b] = e2m1_scale(top);
    }
    for (const u32 scale : scales) exponent = scale >> 23 > exponent ? scale >> 23 : exponent;
    out.exponents[index] = static_cast<u8>(exponent);
    for (std::size_t b = 0; b * kE2m1Block < count; ++b) {
      const u8 byte = e2m1_scale_byte(scales[b], exponent);
      out.scales[index * kCount + b] = byte;
      const auto inverse = V::set(e2m1_inverse(e2m1_scale_bits(byte, exponent)));
      const float* block = x + b * kE2m1Block;
      const auto low = code(V::load(block), inverse);
      const auto high = code(V::load(block + 16), inverse);
      V::store_u8(codes + b * 16, V::either(low, V::template left<4>(high)));
    }
    return largest < kInfinity;
  }

  template <typename Sink>
  static void decode(const Place& in, std::size_t index, std::size_t first, std::size_t count,
                     const Sink& sink) {
    static constexpr float kLevels[16] = {0, 0.5f,  1,  1.5f,  2,  3,  4,  6,
                                          0, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    const u32 exponent = in.exponents[index];
    for (std::size_t b = 0; b * kE2m1Block < count; ++b) {
      const u32 scale = e2m1_scale_bits(in.scales[index * kCount + b], exponent);
      const auto scaled = V::mul(V::load(kLevels), V::set(real(scale)));
      const auto table = V::table(sink.scaled(scaled));
      const std::size_t left = count - b * kE2m1Block;
      decode_nibbles<V>(in.codes + index * kCodeBytes + b * 16, left < 32 ? left : 32,
                        first + b * kE2m1Block, table, sink);
    }
  }
};

template <typename V>
struct E3m0 {
  static constexpr std::size_t kBlock = kE3m0Block;
  static constexpr std::size_t kCodeBytes = kBlock / 2;
  static std::size_t code_bytes(std::size_t count) { return (count + 31) / 32 * 16; }

  static typename V::I code(typename V::F x, u32 exponent) {
    const auto m = V::both(V::bits(x), V::set(kMagnitude));
    const auto rounded = V::template right<23>(V::plus(m, V::set(0x400000u)));
    const auto e = V::plus(rounded, V::set(7u - exponent));
    const auto clamped = V::min(V::max(e, V::set(1u)), V::set(7u));
    const auto sign = V::both(V::template right<28>(V::bits(x)), V::set(8u));
    const auto border = V::set(exponent == 0 ? kMagnitude : (exponent - 7) << 23);
    return V::keep_at_least(m, border, V::either(clamped, sign));
  }

  static bool encode(const float* x, std::size_t count, std::size_t index, u8* codes,
                     const Place& out) {
    const u32 largest = absmax<V>(x, kBlock);
    const u32 exponent = e3m0_exponent(largest);
    out.scales[index] = static_cast<u8>(exponent);
    for (std::size_t i = 0; i < count; i += 32) {
      const auto low = code(V::load(x + i), exponent);
      const auto high = code(V::load(x + i + 16), exponent);
      V::store_u8(codes + i / 2, V::either(low, V::template left<4>(high)));
    }
    return largest < kInfinity;
  }

  template <typename Sink>
  static void decode(const Place& in, std::size_t index, std::size_t first, std::size_t count,
                     const Sink& sink) {
    static constexpr float kLevels[16] = {
        0, 0x1p-6f,  0x1p-5f,  0x1p-4f,  0x1p-3f,  0x1p-2f,  0x1p-1f,  1,
        0, -0x1p-6f, -0x1p-5f, -0x1p-4f, -0x1p-3f, -0x1p-2f, -0x1p-1f, -1};
    const auto scale = V::set(real(static_cast<u32>(in.scales[index]) << 23));
    const auto table = V::table(sink.scaled(V::mul(V::load(kLevels), scale)));
    decode_nibbles<V>(in.codes + index * kCodeBytes, count, first, table, sink);
  }
};

template <typename V>
struct Int2 {
  static constexpr std::size_t kBlock = kInt2Block;
  static constexpr std::size_t kCodeBytes = kBlock / 4;
  static std::size_t code_bytes(std::size_t count) { return (count + 63) / 64 * 16; }

  static float tree(typename V::F sum) {
    float lanes[kLanes];
    V::store(lanes, sum);
    for (u32 half = kLanes / 2; half > 0; half /= 2) {
      for (u32 i = 0; i < half; ++i) lanes[i] = add(lanes[i], lanes[i + half]);
    }
    return lanes[0];
  }

  static typename V::F shrunk(typename V::F x) {
    return V::mul(V::real(V::both(V::bits(x), V::set(kMagnitude))), V::set(kInt2Down));
  }

  // Returns the bits of the border. Positive floats compare as integers.
  static typename V::I levels(const float* x, std::size_t count, u16& low, u16& high) {
    auto sum = V::set(0.0f);
    for (std::size_t i = 0; i < kBlock; i += 16) sum = V::add(sum, shrunk(V::load(x + i)));
    const auto border = V::bits(V::set(int2_border(tree(sum), static_cast<u32>(count))));
    auto below = V::set(0.0f);
    auto above = V::set(0.0f);
    auto ones = V::set(0u);
    for (std::size_t i = 0; i < kBlock; i += 16) {
      const auto y = V::bits(shrunk(V::load(x + i)));
      const auto top = V::keep_at_least(y, border, y);
      above = V::add(above, V::real(top));
      below = V::add(below, V::real(V::minus(y, top)));
      ones = V::plus(ones, V::keep_at_least(y, border, V::set(1u)));
    }
    const u32 above_count = V::total(ones);
    low = int2_level(tree(below), static_cast<u32>(count) - above_count);
    high = above_count == 0 ? low : int2_level(tree(above), above_count);
    return border;
  }

  static bool encode(const float* x, std::size_t count, std::size_t index, u8* codes,
                     const Place& out) {
    const u32 largest = absmax<V>(x, kBlock);
    u16 pair[2] = {0, 0};
    const bool zero = largest < kTiny;
    auto border = V::set(0u);
    if (!zero) border = levels(x, count, pair[0], pair[1]);
    std::memcpy(out.scales + index * sizeof pair, pair, sizeof pair);
    for (std::size_t i = 0; i < code_bytes(count) * 4; i += 64) {
      auto byte = V::set(0u);
      for (u32 part = 4; part-- > 0 && !zero;) {
        const auto value = V::load(x + i + part * 16);
        const auto sign = V::both(V::template right<30>(V::bits(value)), V::set(2u));
        const auto y = V::bits(shrunk(value));
        const auto code = V::either(V::keep_at_least(y, border, V::set(1u)), sign);
        byte = V::either(V::template left<2>(byte), code);
      }
      V::store_u8(codes + i / 4, byte);
    }
    return largest < kInfinity;
  }

  template <typename Sink>
  static void decode(const Place& in, std::size_t index, std::size_t first, std::size_t count,
                     const Sink& sink) {
    u16 pair[2];
    std::memcpy(pair, in.scales + index * sizeof pair, sizeof pair);
    float values[16];
    for (u32 c = 0; c < 16; ++c) values[c] = int2_value(c & 3, pair[0], pair[1]);
    const auto table = V::table(sink.scaled(V::load(values)));
    for (std::size_t i = 0; i < count; i += 64) {
      auto codes = V::load_u8(in.codes + index * kCodeBytes + i / 4);
      for (std::size_t part = i; part < i + 64 && part < count; part += 16) {
        sink.put(first + part, V::lookup(table, codes));
        codes = V::template right<2>(codes);
      }
    }
  }
};

// Padding of the last block must not differ from the scalar codec's, so codes of values that do
// not exist are cut off or zero: every code of +0 is 0, but int2's.
template <typename V, template <typename> class C>
bool encode_blocks(const float* x, std::size_t elements, const Place& out) {
  constexpr std::size_t kBlock = C<V>::kBlock;
  const std::size_t full = elements / kBlock;
  for (std::size_t b = 0; b < full; ++b) {
    u8* codes = out.codes + b * C<V>::kCodeBytes;
    if (!C<V>::encode(x + b * kBlock, kBlock, b, codes, out)) return false;
  }
  const std::size_t rest = elements - full * kBlock;
  if (rest == 0) return true;
  float padded[kBlock] = {};
  u8 codes[C<V>::kCodeBytes];
  std::memcpy(padded, x + full * kBlock, rest * sizeof(float));
  if (!C<V>::encode(padded, rest, full, codes, out)) return false;
  std::memcpy(out.codes + full * C<V>::kCodeBytes, codes, C<V>::code_bytes(rest));
  return true;
}

template <typename V, template <typename> class C, typename Sink>
bool decode_blocks(const Place& in, std::size_t elements, const Sink& sink, const Sink& tail) {
  constexpr std::size_t kBlock = C<V>::kBlock;
  const std::size_t full = elements / kBlock;
  for (std::size_t b = 0; b < full; ++b) C<V>::decode(in, b, b * kBlock, kBlock, sink);
  const std::size_t rest = elements - full * kBlock;
  if (rest > 0) C<V>::decode(in, full, 0, rest, tail);
  return true;
}

// What lies behind the last whole block is decoded into `padded`, so nothing is written too far.
template <typename V, template <typename> class C, typename Sink>
bool decode_to(const Place& in, std::size_t elements, Sink sink) {
  float padded[C<V>::kBlock];
  const std::size_t rest = elements % C<V>::kBlock;
  float* const end = sink.out + (elements - rest);
  if (rest > 0) std::memcpy(padded, end, rest * sizeof(float));
  Sink tail = sink;
  tail.out = padded;
  bool ok;
  if constexpr (C<V>::kBlock == 16) {
    ok = decode_values<V, C>(in, elements, sink, tail);
  } else {
    ok = decode_blocks<V, C>(in, elements, sink, tail);
  }
  if (rest > 0) std::memcpy(end, padded, rest * sizeof(float));
  return ok;
}

// --- the table

template <typename V, template <typename> class C>
bool encode_with(const float* values, std::size_t elements, const Place& out) {
  if constexpr (C<V>::kBlock == 16) {
    return encode_values<V, C>(values, elements, out);
  } else {
    return encode_blocks<V, C>(values, elements, out);
  }
}

template <typename V, template <typename> class C>
bool decode_with(const Place& in, std::size_t elements, float* values) {
  return decode_to<V, C>(in, elements, Store<V>{values});
}

template <typename V, template <typename> class C>
void accumulate_with(const Place& in, std::size_t elements, float weight, bool first,
                     float* total) {
  const auto w = V::set(weight);
  if (weight == 1.0f) {
    if (first) {
      decode_to<V, C>(in, elements, Add<V, true, false>{total, w});
    } else {
      decode_to<V, C>(in, elements, Add<V, false, false>{total, w});
    }
  } else if (first) {
    decode_to<V, C>(in, elements, Add<V, true, true>{total, w});
  } else {
    decode_to<V, C>(in, elements, Add<V, false, true>{total, w});
  }
}

template <typename V>
constexpr Kernels make_kernels() noexcept {
  return {{encode_with<V, F32>, encode_with<V, Bf16>, encode_with<V, F16>, encode_with<V, Int8>,
           encode_with<V, E2m1>, encode_with<V, E3m0>, encode_with<V, Int2>},
          {decode_with<V, F32>, decode_with<V, Bf16>, decode_with<V, F16>, decode_with<V, Int8>,
           decode_with<V, E2m1>, decode_with<V, E3m0>, decode_with<V, Int2>},
          {accumulate_with<V, F32>, accumulate_with<V, Bf16>, accumulate_with<V, F16>,
           accumulate_with<V, Int8>, accumulate_with<V, E2m1>, accumulate_with<V, E3m0>,
           accumulate_with<V, Int2>},
          {nullptr, nullptr, nullptr, choose_with<V, ChooseInt8>, choose_with<V, ChooseE2m1>,
           choose_with<V, ChooseE3m0>, nullptr},
          combine_f32_with<V>,
          stream_f32_with<V>,
          finite_f32_with<V>};
}

}  // namespace
}  // namespace decotrain
