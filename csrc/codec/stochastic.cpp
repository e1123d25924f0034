// Stochastic rounding: the same bytes' layout, but each value goes up or down with the probability
// that keeps its mean, from Philox. Bits depend on (key, stream, element) alone, so a run can be
// repeated; the receiver need not know. Scalar: an option for those who want no bias, not the
// default (nearest with error feedback has the smaller error).
#include <algorithm>
#include <cassert>
#include <cstring>

#include "codec/block.h"
#include "codec/codec.h"
#include "codec/kernels.h"
#include "philox.h"
#include "simd.h"

namespace decotrain {
namespace {

using namespace block;

// In [0, 1), 24 bits: word i % 4 of block i / 4.
class Uniform {
 public:
  Uniform(std::uint64_t key, std::uint64_t stream) : key_(key), stream_(stream) {}
  float operator()(std::uint64_t i) {
    if (i / 4 != block_) {
      block_ = i / 4;
      words_ = philox(static_cast<u32>(block_), static_cast<u32>(block_ >> 32),
                      static_cast<u32>(stream_), static_cast<u32>(stream_ >> 32), key_);
    }
    return mul(static_cast<float>(words_.word[i % 4] >> 8), 0x1p-24f);
  }

 private:
  std::uint64_t key_;
  std::uint64_t stream_;
  std::uint64_t block_ = ~std::uint64_t{0};
  Philox words_{};
};

// Whether a goes to the upper of two neighbouring levels: with probability (a - low) / gap.
bool up(float a, float low, float high, float u) { return mul(u, high - low) < a - low; }

u8 code_int8(float x, float scale, float u) {
  if (scale == 0.0f) return 0;
  const float a = std::min(quotient(real(magnitude(x)), scale), 127.0f);
  const i32 low = static_cast<i32>(a);
  const i32 code = low + (up(a, static_cast<float>(low), static_cast<float>(low + 1), u) ? 1 : 0);
  return static_cast<u8>(bits(x) >> 31 != 0 ? -code : code);
}

// level(code): the magnitudes of codes 0 .. 7, rising.
template <typename Level>
u8 code_of_eight(float x, float u, Level level) {
  const float a = real(magnitude(x));
  u32 code = 0;
  while (code < 7 && level(code + 1) <= a) ++code;
  if (code < 7 && up(a, level(code), level(code + 1), u)) ++code;
  return static_cast<u8>(code == 0 ? 0 : code | (bits(x) >> 28 & 8));
}

u8 code_of(Codec codec, float x, const Place& at, std::size_t i, float u) {
  if (codec == Codec::int8) {
    float scale;
    std::memcpy(&scale, at.scales + i / kInt8Block * sizeof scale, sizeof scale);
    return code_int8(x, scale, u);
  }
  if (codec == Codec::e2m1) {
    const u32 scale = e2m1_scale_bits(at.scales[i / kE2m1Block], at.exponents[i / kE2m1Group]);
    if (scale == 0) return 0;
    return code_of_eight(x, u, [&](u32 code) { return mul(e2m1_level(code), real(scale)); });
  }
  const u32 exponent = at.scales[i / kE3m0Block];
  if (exponent == 0) return 0;
  return code_of_eight(x, u, [&](u32 code) { return e3m0_value(code, exponent); });
}

}  // namespace

bool has_stochastic(Codec codec) {
  return codec == Codec::int8 || codec == Codec::e2m1 || codec == Codec::e3m0;
}

// Nearest encoding finds the scales; then every code is chosen anew.
bool encode_stochastic(Codec codec, std::span<const float> values, std::uint64_t key,
                       std::uint64_t stream, std::byte* out) {
  assert(has_stochastic(codec));
  if (!encode(codec, values, out)) return false;
  if (values.empty()) return true;
  const ExactFloat exact;
  const Place at = place(codec, out, values.size(), 0);
  Uniform uniform(key, stream);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const u8 code = code_of(codec, values[i], at, i, uniform(i));
    if (codec == Codec::int8) {
      at.codes[i] = code;
    } else {
      u8& byte = at.codes[i / 32 * 16 + i % 16];
      const u32 shift = i % 32 < 16 ? 0 : 4;
      byte = static_cast<u8>((byte & (0xf0u >> shift)) | static_cast<u32>(code) << shift);
    }
  }
  return true;
}

}  // namespace decotrain
