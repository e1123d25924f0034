// What a SIMD twin provides: the two kernels on one whole tile. Private to csrc/spsa.
#pragma once

#include "spsa/noise.h"
#include "spsa/spsa.h"

namespace decotrain::spsa {

struct PerturbTile {
  Noise noise;
  Store store;
  std::uint64_t key;
  std::uint32_t c2;
  std::uint32_t c3;
  float amount;  // Rademacher: epsilon; Gaussian-like: epsilon * kGaussianUnit
};

struct ReplayTile {
  Noise noise;
  std::uint64_t key;
  const Term* terms;    // Gaussian-like: values already times kGaussianUnit
  const float* tables;  // Rademacher: kTable values for each group, step after step
  const Step* steps;
  std::size_t step_count;
};

using PerturbKernel = void (*)(const PerturbTile& job, std::uint64_t tile, const float* theta,
                               void* out);
using ReplayKernel = void (*)(const ReplayTile& job, std::uint64_t tile, float* theta);

void perturb_scalar(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out);
void replay_scalar(const ReplayTile& job, std::uint64_t tile, float* theta);
#if defined(__x86_64__)
void perturb_avx2(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out);
void replay_avx2(const ReplayTile& job, std::uint64_t tile, float* theta);
void perturb_avx512(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out);
void replay_avx512(const ReplayTile& job, std::uint64_t tile, float* theta);
#endif

}  // namespace decotrain::spsa
