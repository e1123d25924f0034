// Error feedback: e <- x + e - decode(encode(x + e)), part by part in cache.
//
// In two steps, so that a contribution that is refused has changed nothing: encode first, and keep
// what was lost when the contribution has been taken. The residual is private to the sender and
// never travels; whose it is and when it is dropped is decotrain/outer's business.
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

template <typename Residual>
bool encode_sum(Codec codec, std::span<const float> values, std::span<const Residual> residual,
                std::byte* out) {
  assert(residual.size() == values.size());
  const ExactFloat exact;
  clear_padding(codec, out, values.size());
  const auto encode_part = kernels().encode[static_cast<std::size_t>(codec)];
  std::array<float, kPart> fed;
  for (std::size_t begin = 0; begin < values.size(); begin += kPart) {
    const std::size_t count = std::min(kPart, values.size() - begin);
    for (std::size_t i = 0; i < count; ++i) fed[i] = values[begin + i] + widen(residual[begin + i]);
    if (!encode_part(fed.data(), count, place(codec, out, values.size(), begin))) return false;
  }
  return true;
}

template <typename Residual>
void keep(Codec codec, std::span<const float> values, const std::byte* sent,
          std::span<Residual> residual) {
  assert(residual.size() == values.size());
  const ExactFloat exact;
  const auto decode_part = kernels().decode[static_cast<std::size_t>(codec)];
  std::array<float, kPart> decoded;
  for (std::size_t begin = 0; begin < values.size(); begin += kPart) {
    const std::size_t count = std::min(kPart, values.size() - begin);
    const Place part = place(codec, const_cast<std::byte*>(sent), values.size(), begin);
    decode_part(part, count, decoded.data());
    for (std::size_t i = 0; i < count; ++i) {
      Residual& e = residual[begin + i];
      narrow(values[begin + i] + widen(e) - decoded[i], e);
    }
  }
}

}  // namespace

bool encode_fed(Codec codec, std::span<const float> values, std::span<const float> residual,
                std::byte* out) {
  return encode_sum(codec, values, residual, out);
}

bool encode_fed(Codec codec, std::span<const float> values, std::span<const std::uint16_t> residual,
                std::byte* out) {
  return encode_sum(codec, values, residual, out);
}

void keep_lost(Codec codec, std::span<const float> values, const std::byte* sent,
               std::span<float> residual) {
  keep(codec, values, sent, residual);
}

void keep_lost(Codec codec, std::span<const float> values, const std::byte* sent,
               std::span<std::uint16_t> residual) {
  keep(codec, values, sent, residual);
}

}  // namespace decotrain
