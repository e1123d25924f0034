// Error feedback, fused with encoding: e <- x + e - decode(encode(x + e)), part by part in cache.
//
// The residual is private to the sender and never travels; whose it is and when it is dropped is
// decotrain/outer/feedback.py's business.
#include <algorithm>
#include <array>
#include <cassert>

#include "codec/kernels.h"
#include "simd.h"

namespace decotrain {
namespace {

float widen(float residual) { return residual; }
float widen(std::uint16_t residual) { return block::bf16_value(residual); }
void narrow(float value, float& residual) { residual = value; }
void narrow(float value, std::uint16_t& residual) { residual = block::bf16_code(value); }

// A look before the first write: a NaN leaves the whole residual as it was.
template <typename Residual>
bool finite(std::span<const float> values, std::span<const Residual> residual) {
  block::u32 largest = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    largest = std::max(largest, block::magnitude(values[i] + widen(residual[i])));
  }
  return largest < block::kInfinity;
}

template <typename Residual>
bool encode_fed(Codec codec, std::span<const float> values, std::span<Residual> residual,
                std::byte* out) {
  assert(residual.size() == values.size());
  const ExactFloat exact;
  if (!finite(values, std::span<const Residual>(residual))) return false;
  clear_padding(codec, out, values.size());
  const auto index = static_cast<std::size_t>(codec);
  const Kernels& table = kernels();
  std::array<float, kPart> fed;
  std::array<float, kPart> decoded;
  for (std::size_t begin = 0; begin < values.size(); begin += kPart) {
    const std::size_t count = std::min(kPart, values.size() - begin);
    for (std::size_t i = 0; i < count; ++i) fed[i] = values[begin + i] + widen(residual[begin + i]);
    const Place part = place(codec, out, values.size(), begin);
    table.encode[index](fed.data(), count, part);
    table.decode[index](part, count, decoded.data());
    for (std::size_t i = 0; i < count; ++i) narrow(fed[i] - decoded[i], residual[begin + i]);
  }
  return true;
}

}  // namespace

bool encode_with_feedback(Codec codec, std::span<const float> values, std::span<float> residual,
                          std::byte* out) {
  return encode_fed(codec, values, residual, out);
}

bool encode_with_feedback(Codec codec, std::span<const float> values,
                          std::span<std::uint16_t> residual, std::byte* out) {
  return encode_fed(codec, values, residual, out);
}

}  // namespace decotrain
