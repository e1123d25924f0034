// The encoder of the one-byte code. Only the sender runs it, so it need not be fast.
#include "spsa/code.h"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace decotrain::spsa {

std::uint8_t encode(float value) {
  if (!std::isfinite(value)) return kSkip;
  const float magnitude = std::fabs(value);
  // The first entry that is not below; the nearer of it and the one before.
  const float* above = std::lower_bound(std::begin(kMagnitude), std::end(kMagnitude), magnitude);
  if (above == std::end(kMagnitude) ||
      (above != std::begin(kMagnitude) && magnitude - above[-1] < above[0] - magnitude)) {
    --above;
  }
  const auto k = static_cast<std::uint8_t>(above - std::begin(kMagnitude));
  if (k == 0) return kZero;
  return static_cast<std::uint8_t>(k | (std::signbit(value) ? 0x80 : 0x00));
}

}  // namespace decotrain::spsa
