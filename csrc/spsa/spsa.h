// SPSA on flat float32 buffers: perturb out of place, apply one record, replay many.
//
// Every function works on elements [first, first + size) of the parameter space, so a caller may
// cut the space as it likes (tensors, threads, cache): the bits do not depend on the cut. All SIMD
// levels give the same bits. noise.h has the layout of the noise and the order of the sums.
#pragma once

#include <span>

#include "spsa/noise.h"

namespace decotrain::spsa {

enum class Store : std::uint8_t { f32 = 0, bf16 = 1, f16 = 2 };

// One record: the next `terms` terms, and theta <- theta * decay - rate * sum.
struct Step {
  std::uint32_t terms = 0;
  float rate = 0.0f;
  float decay = 1.0f;
};

constexpr std::uint64_t kMaxElements = std::uint64_t{1} << 48;  // of a parameter space

// out = cast(theta + epsilon * z); out has theta.size() elements of `store`, and is not theta.
void perturb(Noise noise, std::uint64_t key, std::uint32_t c2, std::uint32_t c3, float epsilon,
             std::uint64_t first, std::span<const float> theta, Store store, void* out);

// All steps in order, one pass over theta (a pass for every few thousand terms). The terms of all
// steps stand one after the other; their number is the sum of Step::terms.
void replay(Noise noise, std::uint64_t key, std::span<const Term> terms,
            std::span<const Step> steps, std::uint64_t first, std::span<float> theta);

}  // namespace decotrain::spsa
