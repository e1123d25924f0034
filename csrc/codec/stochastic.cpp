// Stochastic rounding: the same bytes' layout, but each value goes up or down with the probability
// that keeps its mean, from Philox. Bits depend on (key, stream, element) alone, so a run can be
// repeated; the receiver need not know. An option for those who want no bias, not the default
// (nearest with error feedback has the smaller error).
#include <algorithm>
#include <cassert>
#include <cstring>

#include "codec/block.h"
#include "codec/kernels.h"
#include "simd.h"

namespace decotrain {
namespace {

using namespace block;

// One group: its scales anew, so that no value is above the highest level. That level stands for
// itself and cannot keep the mean of what is larger.
void raise_scales(const float* values, std::size_t count, const Place& out) {
  static_assert(kPart == kE2m1Group);
  u32 scales[kE2m1Group / kE2m1Block];
  u32 exponent = 0;
  for (std::size_t b = 0; b < parts(count, kE2m1Block); ++b) {
    u32 top = 0;
    for (std::size_t i = b * kE2m1Block; i < std::min(count, (b + 1) * kE2m1Block); ++i) {
      top = std::max(top, magnitude(values[i]));
    }
    scales[b] = e2m1_scale_above(top);
    exponent = std::max(exponent, scales[b] >> 23);
  }
  *out.exponents = static_cast<u8>(exponent);
  for (std::size_t b = 0; b < parts(count, kE2m1Block); ++b) {
    out.scales[b] = e2m1_scale_byte(scales[b], exponent);
    if (out.scales[b] == 0) std::memset(out.codes + b * (kE2m1Block / 2), 0, kE2m1Block / 2);
  }
}

}  // namespace

bool has_stochastic(Codec codec) {
  return kScalarKernels.choose[static_cast<std::size_t>(codec)] != nullptr;
}

// Nearest encoding finds the scales, and NaN; then every code is chosen anew. In cache, by parts.
bool encode_stochastic(Codec codec, std::span<const float> values, std::uint64_t key,
                       std::uint64_t stream, std::byte* out) {
  assert(has_stochastic(codec));
  const ExactFloat exact;
  const Chance chance{key, stream};
  const auto index = static_cast<std::size_t>(codec);
  clear_padding(codec, out, values.size());
  for (std::size_t begin = 0; begin < values.size(); begin += kPart) {
    const std::size_t count = std::min(kPart, values.size() - begin);
    const Place part = place(codec, out, values.size(), begin);
    const float* const from = values.data() + begin;
    if (!kernels().encode[index](from, count, part)) return false;
    if (codec == Codec::e2m1) raise_scales(from, count, part);
    kernels().choose[index](from, count, begin, chance, part);
  }
  return true;
}

}  // namespace decotrain
