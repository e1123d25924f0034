// Loops over plain f32 in 16 lanes: contributions into their mean in one pass, and copies past the
// cache. Part of lanes.h, where the lane types are explained; codecs are there.
#pragma once

#include <cstdint>

#include "codec/kernels.h"

namespace decotrain {
namespace {

using namespace block;

template <typename V>
typename V::I combine_one(const float* const* from, const float* weights, std::size_t count,
                          typename V::F factor, std::size_t i, float* out) {
  auto total = V::mul(V::set(weights[0]), V::load(from[0] + i));
  for (std::size_t k = 1; k < count; ++k) {
    total = V::add(total, V::mul(V::set(weights[k]), V::load(from[k] + i)));
  }
  total = V::mul(total, factor);
  V::store(out, total);
  return V::both(V::bits(total), V::set(kMagnitude));
}

template <typename V>
bool combine_f32_with(const float* const* from, const float* weights, std::size_t count,
                      float factor_of_all, std::size_t elements, float* out) {
  const auto factor = V::set(factor_of_all);
  auto largest = V::set(0u);
  std::size_t i = 0;
  for (; i + 16 <= elements; i += 16) {
    largest = V::max(largest, combine_one<V>(from, weights, count, factor, i, out + i));
  }
  for (; i < elements; ++i) {  // fewer than 16: one lane each, in the same order
    float lanes[16] = {};
    float value[16];
    auto total = V::set(0.0f);
    for (std::size_t k = 0; k < count; ++k) {
      lanes[0] = from[k][i];
      const auto term = V::mul(V::set(weights[k]), V::load(lanes));
      total = k == 0 ? term : V::add(total, term);
    }
    total = V::mul(total, factor);
    largest = V::max(largest, V::both(V::bits(total), V::set(kMagnitude)));
    V::store(value, total);
    out[i] = value[0];
  }
  return V::largest(largest) < kInfinity;
}

template <typename V>
bool stream_f32_with(const float* values, std::size_t elements, float* out) {
  u32 rest = 0;
  std::size_t i = 0;
  const auto one = [&] {
    const u32 m = magnitude(values[i]);
    rest = m > rest ? m : rest;
    out[i] = values[i];
    ++i;
  };
  while (i < elements && reinterpret_cast<std::uintptr_t>(out + i) % 64 != 0) one();
  auto largest = V::set(0u);
  for (; i + 16 <= elements; i += 16) {
    const auto value = V::load(values + i);
    largest = V::max(largest, V::both(V::bits(value), V::set(kMagnitude)));
    V::stream(out + i, value);
  }
  V::fence();
  while (i < elements) one();
  return V::largest(largest) < kInfinity && rest < kInfinity;
}

template <typename V>
bool finite_f32_with(const float* values, std::size_t elements) {
  auto largest = V::set(0u);
  std::size_t i = 0;
  for (; i + 16 <= elements; i += 16) {
    largest = V::max(largest, V::both(V::bits(V::load(values + i)), V::set(kMagnitude)));
  }
  u32 rest = 0;
  for (; i < elements; ++i) rest = magnitude(values[i]) > rest ? magnitude(values[i]) : rest;
  return V::largest(largest) < kInfinity && rest < kInfinity;
}

}  // namespace
}  // namespace decotrain
