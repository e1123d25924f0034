// The scalar reference: what block.h says, value by value. SIMD tables are tested against it.
#include <algorithm>
#include <cstring>

#include "codec/kernels.h"
#include "philox.h"

namespace decotrain {
namespace {

using namespace block;

template <typename T>
T load(const u8* bytes, std::size_t index) {
  T value;
  std::memcpy(&value, bytes + index * sizeof value, sizeof value);
  return value;
}

template <typename T>
void store(u8* bytes, std::size_t index, T value) {
  std::memcpy(bytes + index * sizeof value, &value, sizeof value);
}

u32 absmax(const float* values, std::size_t count) {
  u32 largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, magnitude(values[i]));
  return largest;
}

// Calls each(first, count) for every block; false as soon as one returns false.
template <typename Each>
bool blocks(std::size_t elements, std::size_t size, Each each) {
  for (std::size_t first = 0; first < elements; first += size) {
    if (!each(first, std::min(size, elements - first))) return false;
  }
  return true;
}

// Code i of a group of `group` stands in byte i % 16, the first 16 in the lowest bits.
template <u32 width>
u32 get(const u8* codes, std::size_t i) {
  constexpr std::size_t group = 128 / width;
  const u32 byte = codes[i / group * 16 + i % 16];
  return byte >> (i % group / 16 * width) & ((1u << width) - 1);
}

template <u32 width>
void put(u8* codes, std::size_t i, u32 code) {
  constexpr std::size_t group = 128 / width;
  u8& byte = codes[i / group * 16 + i % 16];
  byte = static_cast<u8>(byte | code << (i % group / 16 * width));
}

// --- encode

bool encode_f32(const float* values, std::size_t elements, const Place& out) {
  for (std::size_t i = 0; i < elements; ++i) {
    if (magnitude(values[i]) >= kInfinity) return false;
    store(out.codes, i, values[i]);
  }
  return true;
}

template <u16 (*code)(float)>
bool encode_half(const float* values, std::size_t elements, const Place& out) {
  for (std::size_t i = 0; i < elements; ++i) {
    if (magnitude(values[i]) >= kInfinity) return false;
    store(out.codes, i, code(values[i]));
  }
  return true;
}

bool encode_int8(const float* values, std::size_t elements, const Place& out) {
  return blocks(elements, kInt8Block, [&](std::size_t first, std::size_t count) {
    const u32 largest = absmax(values + first, count);
    if (largest >= kInfinity) return false;
    const float inverse = int8_inverse(largest);
    for (std::size_t i = first; i < first + count; ++i) {
      out.codes[i] = int8_code(values[i], inverse);
    }
    store(out.scales, first / kInt8Block, int8_scale(largest));
    return true;
  });
}

bool encode_e2m1_group(const float* values, std::size_t count, u8* codes, u8* scales,
                       u8* exponent_byte) {
  u32 largest[kE2m1Group / kE2m1Block];
  u32 exponent = 0;
  const bool finite = blocks(count, kE2m1Block, [&](std::size_t first, std::size_t n) {
    const u32 top = absmax(values + first, n);
    largest[first / kE2m1Block] = e2m1_scale(top);
    exponent = std::max(exponent, largest[first / kE2m1Block] >> 23);
    return top < kInfinity;
  });
  if (!finite) return false;
  *exponent_byte = static_cast<u8>(exponent);
  return blocks(count, kE2m1Block, [&](std::size_t first, std::size_t n) {
    const u8 byte = e2m1_scale_byte(largest[first / kE2m1Block], exponent);
    const float inverse = e2m1_inverse(e2m1_scale_bits(byte, exponent));
    scales[first / kE2m1Block] = byte;
    std::memset(codes + first / 2, 0, 16);
    for (std::size_t i = first; i < first + n; ++i) put<4>(codes, i, e2m1_code(values[i], inverse));
    return true;
  });
}

bool encode_e2m1(const float* values, std::size_t elements, const Place& out) {
  return blocks(elements, kE2m1Group, [&](std::size_t first, std::size_t count) {
    return encode_e2m1_group(values + first, count, out.codes + first / 2,
                             out.scales + first / kE2m1Block, out.exponents + first / kE2m1Group);
  });
}

bool encode_e3m0(const float* values, std::size_t elements, const Place& out) {
  return blocks(elements, kE3m0Block, [&](std::size_t first, std::size_t count) {
    const u32 largest = absmax(values + first, count);
    if (largest >= kInfinity) return false;
    const u32 exponent = e3m0_exponent(largest);
    out.scales[first / kE3m0Block] = static_cast<u8>(exponent);
    std::memset(out.codes + first / 2, 0, (count + 31) / 32 * 16);
    for (std::size_t i = first; i < first + count; ++i) {
      put<4>(out.codes, i, e3m0_code(values[i], exponent));
    }
    return true;
  });
}

// Sums in 16 strided lanes, then halves onto halves: the order every twin keeps.
float tree(float (&lanes)[kLanes]) {
  for (u32 half = kLanes / 2; half > 0; half /= 2) {
    for (u32 i = 0; i < half; ++i) lanes[i] = add(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// Returns the border.
float int2_levels(const float* values, std::size_t count, u16& low, u16& high) {
  float sums[kLanes] = {};
  for (std::size_t i = 0; i < count; ++i) {
    sums[i % kLanes] = add(sums[i % kLanes], int2_shrunk(values[i]));
  }
  const float border = int2_border(tree(sums), static_cast<u32>(count));
  float below[kLanes] = {};
  float above[kLanes] = {};
  u32 above_count = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const float y = int2_shrunk(values[i]);
    const bool is_above = y >= border;
    above_count += is_above;
    float& sum = is_above ? above[i % kLanes] : below[i % kLanes];
    sum = add(sum, y);
  }
  const u32 below_count = static_cast<u32>(count) - above_count;
  low = int2_level(tree(below), below_count);
  high = above_count == 0 ? low : int2_level(tree(above), above_count);
  return border;
}

bool encode_int2(const float* values, std::size_t elements, const Place& out) {
  return blocks(elements, kInt2Block, [&](std::size_t first, std::size_t count) {
    const u32 largest = absmax(values + first, count);
    if (largest >= kInfinity) return false;
    u16 low = 0;
    u16 high = 0;
    std::memset(out.codes + first / 4, 0, (count + 63) / 64 * 16);
    if (largest >= kTiny) {
      const float border = int2_levels(values + first, count, low, high);
      for (std::size_t i = first; i < first + count; ++i) {
        put<2>(out.codes, i, int2_code(values[i], border));
      }
    }
    store(out.scales, first / kInt2Block * 2, low);
    store(out.scales, first / kInt2Block * 2 + 1, high);
    return true;
  });
}

// --- decode: each(i, value) for every element

template <typename Each>
bool values_f32(const Place& in, std::size_t elements, Each each) {
  bool finite = true;
  for (std::size_t i = 0; i < elements; ++i) {
    const float value = load<float>(in.codes, i);
    finite &= magnitude(value) < kInfinity;
    each(i, value);
  }
  return finite;
}

template <typename Each>
bool values_bf16(const Place& in, std::size_t elements, Each each) {
  bool finite = true;
  for (std::size_t i = 0; i < elements; ++i) {
    const u16 code = load<u16>(in.codes, i);
    finite &= bf16_ok(code);
    each(i, bf16_value(code));
  }
  return finite;
}

template <typename Each>
bool values_f16(const Place& in, std::size_t elements, Each each) {
  bool finite = true;
  for (std::size_t i = 0; i < elements; ++i) {
    const u16 code = load<u16>(in.codes, i);
    finite &= f16_ok(code);
    each(i, f16_value(code));
  }
  return finite;
}

template <typename Each>
bool values_int8(const Place& in, std::size_t elements, Each each) {
  for (std::size_t i = 0; i < elements; ++i) {
    each(i, int8_value(in.codes[i], load<float>(in.scales, i / kInt8Block)));
  }
  return true;
}

template <typename Each>
bool values_e2m1(const Place& in, std::size_t elements, Each each) {
  for (std::size_t i = 0; i < elements; ++i) {
    const u32 scale = e2m1_scale_bits(in.scales[i / kE2m1Block], in.exponents[i / kE2m1Group]);
    each(i, mul(e2m1_level(get<4>(in.codes, i)), real(scale)));
  }
  return true;
}

template <typename Each>
bool values_e3m0(const Place& in, std::size_t elements, Each each) {
  for (std::size_t i = 0; i < elements; ++i) {
    each(i, e3m0_value(get<4>(in.codes, i), in.scales[i / kE3m0Block]));
  }
  return true;
}

template <typename Each>
bool values_int2(const Place& in, std::size_t elements, Each each) {
  for (std::size_t i = 0; i < elements; ++i) {
    const std::size_t first = i / kInt2Block * 2;
    const u16 low = load<u16>(in.scales, first);
    const u16 high = load<u16>(in.scales, first + 1);
    each(i, int2_value(get<2>(in.codes, i), low, high));
  }
  return true;
}

#define DT_DECODE(name)                                                                         \
  bool decode_##name(const Place& in, std::size_t elements, float* values) {                    \
    return values_##name(in, elements, [&](std::size_t i, float value) { values[i] = value; }); \
  }                                                                                             \
  void accumulate_##name(const Place& in, std::size_t elements, float weight, bool first,       \
                         float* total) {                                                        \
    values_##name(in, elements, [&](std::size_t i, float value) {                               \
      const float term = mul(weight, value);                                                    \
      total[i] = first ? term : add(total[i], term);                                            \
    });                                                                                         \
  }
DT_DECODE(f32)
DT_DECODE(bf16)
DT_DECODE(f16)
DT_DECODE(int8)
DT_DECODE(e2m1)
DT_DECODE(e3m0)
DT_DECODE(int2)
#undef DT_DECODE

// --- stochastic rounding

// In [0, 1), 24 bits (see Chance).
class Uniform {
 public:
  explicit Uniform(const Chance& chance) : chance_(chance) {}
  float operator()(std::uint64_t i) {
    if (i / 64 != group_) {
      group_ = i / 64;
      for (u32 lane = 0; lane < kLanes; ++lane) {
        const std::uint64_t counter = group_ * kLanes + lane;
        words_[lane] = philox(static_cast<u32>(counter), static_cast<u32>(counter >> 32),
                              static_cast<u32>(chance_.stream),
                              static_cast<u32>(chance_.stream >> 32), chance_.key);
      }
    }
    return mul(static_cast<float>(words_[i % kLanes].word[i / kLanes % 4] >> 8), 0x1p-24f);
  }

 private:
  Chance chance_;
  std::uint64_t group_ = ~std::uint64_t{0};
  Philox words_[kLanes] = {};
};

// Whether a goes to the upper of two neighbouring levels: with probability (a - low) / gap.
bool up(float a, float low, float high, float u) { return mul(u, high - low) < a - low; }

void choose_int8(const float* values, std::size_t elements, std::uint64_t first,
                 const Chance& chance, const Place& out) {
  Uniform uniform(chance);
  for (std::size_t i = 0; i < elements; ++i) {
    const auto scale = load<float>(out.scales, i / kInt8Block);
    if (scale == 0.0f) continue;
    const float a = std::min(quotient(real(magnitude(values[i])), scale), 127.0f);
    const auto low = static_cast<i32>(a);
    const bool rises =
        up(a, static_cast<float>(low), static_cast<float>(low + 1), uniform(first + i));
    const i32 code = low + (rises ? 1 : 0);
    out.codes[i] = static_cast<u8>(bits(values[i]) >> 31 != 0 ? -code : code);
  }
}

// level(code): the magnitudes of codes 0 .. 7, rising.
template <typename Level>
u32 choose_of_eight(float x, float u, Level level) {
  const float a = real(magnitude(x));
  u32 code = 0;
  while (code < 7 && level(code + 1) <= a) ++code;
  if (code < 7 && up(a, level(code), level(code + 1), u)) ++code;
  return code == 0 ? 0 : code | (bits(x) >> 28 & 8);
}

void put_anew(u8* codes, std::size_t i, u32 code) {
  u8& byte = codes[i / 32 * 16 + i % 16];
  byte = static_cast<u8>(byte & (i % 32 < 16 ? 0xf0u : 0x0fu));
  put<4>(codes, i, code);
}

void choose_e2m1(const float* values, std::size_t elements, std::uint64_t first,
                 const Chance& chance, const Place& out) {
  Uniform uniform(chance);
  for (std::size_t i = 0; i < elements; ++i) {
    const u32 scale = e2m1_scale_bits(out.scales[i / kE2m1Block], out.exponents[i / kE2m1Group]);
    if (scale == 0) continue;
    const auto level = [&](u32 code) { return mul(e2m1_level(code), real(scale)); };
    put_anew(out.codes, i, choose_of_eight(values[i], uniform(first + i), level));
  }
}

void choose_e3m0(const float* values, std::size_t elements, std::uint64_t first,
                 const Chance& chance, const Place& out) {
  Uniform uniform(chance);
  for (std::size_t i = 0; i < elements; ++i) {
    const u32 exponent = out.scales[i / kE3m0Block];
    if (exponent == 0) continue;
    const auto level = [&](u32 code) { return e3m0_value(code, exponent); };
    put_anew(out.codes, i, choose_of_eight(values[i], uniform(first + i), level));
  }
}

bool combine_f32(const float* const* from, const float* weights, std::size_t count, float factor,
                 std::size_t elements, float* out) {
  bool finite = true;
  for (std::size_t i = 0; i < elements; ++i) {
    float total = mul(weights[0], from[0][i]);
    for (std::size_t k = 1; k < count; ++k) total = add(total, mul(weights[k], from[k][i]));
    out[i] = mul(total, factor);
    finite &= (bits(out[i]) & kMagnitude) < kInfinity;
  }
  return finite;
}

bool stream_f32(const float* values, std::size_t elements, float* out) {
  if (elements > 0) std::memcpy(out, values, elements * sizeof(float));
  return absmax(values, elements) < kInfinity;
}

bool finite_f32(const float* values, std::size_t elements) {
  return absmax(values, elements) < kInfinity;
}

}  // namespace

const Kernels kScalarKernels = {
    {encode_f32, encode_half<bf16_code>, encode_half<f16_code>, encode_int8, encode_e2m1,
     encode_e3m0, encode_int2},
    {decode_f32, decode_bf16, decode_f16, decode_int8, decode_e2m1, decode_e3m0, decode_int2},
    {accumulate_f32, accumulate_bf16, accumulate_f16, accumulate_int8, accumulate_e2m1,
     accumulate_e3m0, accumulate_int2},
    {nullptr, nullptr, nullptr, choose_int8, choose_e2m1, choose_e3m0, nullptr},
    combine_f32,
    stream_f32,
    finite_f32};

}  // namespace decotrain
