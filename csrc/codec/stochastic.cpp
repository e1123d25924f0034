// Stochastic rounding: the same bytes' layout, but each value goes up or down with the probability
// that keeps its mean, from Philox. Bits depend on (key, stream, element) alone, so a run can be
// repeated; the receiver need not know. An option for those who want no bias, not the default
// (nearest with error feedback has the smaller error).
#include <algorithm>
#include <cassert>

#include "codec/kernels.h"
#include "simd.h"

namespace decotrain {

bool has_stochastic(Codec codec) {
  return kScalarKernels.choose[static_cast<std::size_t>(codec)] != nullptr;
}

// Nearest encoding finds the scales; then every code is chosen anew. Part by part, in cache.
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
    kernels().choose[index](from, count, begin, chance, part);
  }
  return true;
}

}  // namespace decotrain
