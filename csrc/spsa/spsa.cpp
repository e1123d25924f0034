// Cuts a range into tiles, prepares the groups' tables and calls the twin of the level in use.
#include "spsa/spsa.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <vector>

#include "simd.h"
#include "spsa/tile.h"

namespace decotrain::spsa {
namespace {

// Terms of one pass over theta: enough to hide the memory traffic, and the tables stay in cache.
constexpr std::size_t kPassTerms = 16384;

std::size_t store_bytes(Store store) { return store == Store::f32 ? 4 : 2; }

PerturbKernel perturb_kernel() {
#if defined(__x86_64__)
  if (simd() == Simd::avx512) return perturb_avx512;
  if (simd() == Simd::avx2) return perturb_avx2;
#endif
  return perturb_scalar;
}

ReplayKernel replay_kernel() {
#if defined(__x86_64__)
  if (simd() == Simd::avx512) return replay_avx512;
  if (simd() == Simd::avx2) return replay_avx2;
#endif
  return replay_scalar;
}

// Calls whole(tile, i) for tiles that lie inside the range, part(tile, at, i, count) for the ends:
// `count` elements from `at` within the tile, element i of the range.
template <class Whole, class Part>
void for_tiles(std::uint64_t first, std::size_t size, Whole whole, Part part) {
  std::size_t i = 0;
  while (i < size) {
    const std::uint64_t tile = (first + i) / kTile;
    const std::size_t at = (first + i) % kTile;
    const std::size_t count = std::min<std::size_t>(kTile - at, size - i);
    if (count == kTile) {
      whole(tile, i);
    } else {
      part(tile, at, i, count);
    }
    i += count;
  }
}

void replay_pass(const ReplayTile& job, std::uint64_t first, std::span<float> theta) {
  const ReplayKernel kernel = replay_kernel();
  for_tiles(
      first, theta.size(),
      [&](std::uint64_t tile, std::size_t i) { kernel(job, tile, theta.data() + i); },
      [&](std::uint64_t tile, std::size_t at, std::size_t i, std::size_t count) {
        alignas(64) float whole[kTile] = {};
        std::memcpy(whole + at, theta.data() + i, count * sizeof(float));
        kernel(job, tile, whole);
        std::memcpy(theta.data() + i, whole + at, count * sizeof(float));
      });
}

void append_tables(std::span<const Term> terms, std::vector<float>& tables) {
  for (std::size_t k = 0; k < terms.size(); k += kGroup) {
    const int count = static_cast<int>(std::min<std::size_t>(kGroup, terms.size() - k));
    for (std::uint32_t pattern = 0; pattern < kTable; ++pattern) {
      tables.push_back(group_value(terms.data() + k, count, pattern));
    }
  }
}

}  // namespace

void perturb(Noise noise, std::uint64_t key, std::uint32_t c2, std::uint32_t c3, float epsilon,
             std::uint64_t first, std::span<const float> theta, Store store, void* out) {
  assert(first <= kMaxElements && theta.size() <= kMaxElements);
  const ExactFloat exact;
  const float amount = noise == Noise::gaussian ? multiply(epsilon, kGaussianUnit) : epsilon;
  const PerturbTile job{noise, store, key, c2, c3, amount};
  const PerturbKernel kernel = perturb_kernel();
  const std::size_t width = store_bytes(store);
  auto* bytes = static_cast<unsigned char*>(out);
  for_tiles(
      first, theta.size(),
      [&](std::uint64_t tile, std::size_t i) {
        kernel(job, tile, theta.data() + i, bytes + i * width);
      },
      [&](std::uint64_t tile, std::size_t at, std::size_t i, std::size_t count) {
        alignas(64) float whole[kTile] = {};
        alignas(64) float result[kTile];
        std::memcpy(whole + at, theta.data() + i, count * sizeof(float));
        kernel(job, tile, whole, result);
        std::memcpy(bytes + i * width, reinterpret_cast<unsigned char*>(result) + at * width,
                    count * width);
      });
}

void replay(Noise noise, std::uint64_t key, std::span<const Term> terms,
            std::span<const Step> steps, std::uint64_t first, std::span<float> theta) {
  assert(first <= kMaxElements && theta.size() <= kMaxElements);
  const ExactFloat exact;
  std::size_t term = 0;
  std::size_t step = 0;
  while (step < steps.size()) {
    std::vector<float> tables;
    std::vector<Term> scaled;
    const std::size_t first_term = term;
    const std::size_t first_step = step;
    do {
      const std::size_t count = steps[step].terms;
      assert(count <= terms.size() - term);
      if (noise == Noise::rademacher) append_tables(terms.subspan(term, count), tables);
      term += count;
      ++step;
    } while (step < steps.size() && term - first_term + steps[step].terms <= kPassTerms &&
             step - first_step < kPassTerms);
    if (noise == Noise::gaussian) {
      scaled.assign(terms.begin() + first_term, terms.begin() + term);
      for (Term& one : scaled) one.value = multiply(one.value, kGaussianUnit);
    }
    const Term* used = noise == Noise::gaussian ? scaled.data() : terms.data() + first_term;
    replay_pass(
        ReplayTile{noise, key, used, tables.data(), steps.data() + first_step, step - first_step},
        first, theta);
  }
}

}  // namespace decotrain::spsa
