// Bytes of a peer, taken as an encoded chunk: `valid` and `decode` must agree, whatever is valid
// decodes to finite values, and combining it never leaves the buffers or makes garbage.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "codec/codec.h"

using namespace decotrain;

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

// codec, rule, result codec, elements (2 bytes), parameter (4 bytes), then the encoded bytes;
// missing bytes are zero.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr std::size_t kPrefix = 9;
  if (size < kPrefix) return 0;
  const auto codec = static_cast<Codec>(data[0] % kCodecCount);
  const auto rule = static_cast<Rule>(data[1] % kRuleCount);
  const auto result_codec = static_cast<Codec>(data[2] % kCodecCount);
  const std::size_t elements = (data[3] | data[4] << 8) % 2048;
  float parameter = 0.0f;
  std::memcpy(&parameter, data + 5, sizeof parameter);

  // Exactly as long as promised, so that the sanitizer sees one byte too many.
  std::vector<std::byte> bytes(encoded_bytes(codec, elements));
  if (size > kPrefix && !bytes.empty()) {
    std::memcpy(bytes.data(), data + kPrefix, std::min(bytes.size(), size - kPrefix));
  }
  std::vector<float> values(elements);
  const bool good = valid(codec, bytes.data(), elements);
  require(decode(codec, bytes.data(), values) == good);
  if (!good) return 0;
  for (const float value : values) require(std::isfinite(value));

  const std::vector<Contribution> from{{bytes.data(), 1.0f}, {bytes.data(), 0.25f}};
  std::vector<std::byte> result(encoded_bytes(result_codec, elements));
  if (combine(rule, parameter, codec, from, elements, result_codec, result.data())) {
    require(rule_valid(rule, parameter));
    require(valid(result_codec, result.data(), elements));
  }
  return 0;
}
