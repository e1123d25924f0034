// Codecs, first step: f32 only, scalar. The other codecs refuse until their layouts are in.
#include "codec/codec.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace decotrain {

std::size_t encoded_bytes(Codec codec, std::size_t elements) {
  return codec == Codec::f32 ? elements * sizeof(float) : 0;
}

bool encode(Codec codec, std::span<const float> values, std::byte* out) {
  if (codec != Codec::f32) return false;
  if (values.empty()) return true;
  std::memcpy(out, values.data(), values.size_bytes());
  return valid(codec, out, values.size());
}

bool decode(Codec codec, const std::byte* bytes, std::span<float> out) {
  if (codec != Codec::f32) return false;
  if (out.empty()) return true;
  std::memcpy(out.data(), bytes, out.size_bytes());
  return valid(codec, bytes, out.size());
}

bool combine(Rule rule, float, Codec codec, std::span<const Contribution> from,
             std::size_t elements, Codec result_codec, std::byte* result) {
  if (from.empty() || (rule != Rule::mean && rule != Rule::sum)) return false;
  std::vector<float> total(elements, 0.0f);
  std::vector<float> values(elements);
  double weights = 0.0;
  for (const Contribution& one : from) {
    if (!decode(codec, one.bytes, values)) return false;
    const float weight = rule == Rule::mean ? one.weight : 1.0f;
    weights += static_cast<double>(one.weight);
    for (std::size_t i = 0; i < elements; ++i) total[i] += weight * values[i];
  }
  if (rule == Rule::mean) {
    const float inverse = static_cast<float>(1.0 / weights);
    for (float& value : total) value *= inverse;
  }
  return encode(result_codec, total, result);
}

bool valid(Codec codec, const std::byte* bytes, std::size_t elements) {
  if (codec != Codec::f32) return false;
  for (std::size_t i = 0; i < elements; ++i) {
    float value;
    std::memcpy(&value, bytes + i * sizeof value, sizeof value);
    if (!std::isfinite(value)) return false;
  }
  return true;
}

}  // namespace decotrain
