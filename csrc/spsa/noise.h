// The noise z of SPSA and the arithmetic on it, written once for CPU and GPU.
//
// z is a pure function of (key, stream, element). A stream is one (step, slot, sample) of a run, or
// one seed of a pool; elements are numbered over the whole parameter space. Elements come in tiles
// of 128 rows x 16 lanes, the shape in which a SIMD register, a GPU half-warp and a cache like
// them:
//
//   element e: tile = e >> 11, row = (e >> 4) & 127, lane = e & 15
//   Rademacher: one Philox call for each (tile, lane) gives the lane's 128 signs;
//       counter = tile * 16 + lane, word = row >> 5, bit = (row & 7) * 4 + ((row >> 3) & 3); 1 is
//       -1
//   Gaussian-like: one Philox call gives four rows of a lane;
//       counter = tile * 512 + (row >> 2) * 16 + lane, word = row & 3;
//       z = (sum of the word's four bytes - 510) / 147.8: an exact integer and one constant
//
// It does not know steps, slots or learning-rate schedules: decotrain/spsa does.
#pragma once

#include "../philox.h"

#if !defined(__CUDACC__)
#include <cstring>
#endif

namespace decotrain::spsa {

constexpr int kLanes = 16;
constexpr int kRows = 128;
constexpr int kTile = kLanes * kRows;
constexpr int kGroup = 4;  // terms added before they enter the sum: see group_value
constexpr int kTable = 1 << kGroup;
constexpr float kGaussianUnit = 1.0f / 147.8f;
constexpr int kGaussianMean = 510;

enum class Noise : std::uint8_t { rademacher = 0, gaussian = 1 };

// One scalar of a record and the stream of its noise: words 2 and 3 of the Philox counter.
struct Term {
  std::uint32_t c2 = 0;
  std::uint32_t c3 = 0;
  float value = 0.0f;
};

DT_HD std::uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

DT_HD float bits_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// One rounding each; the CUDA names keep nvcc from fusing them whatever its flags.
DT_HD float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

DT_HD float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

DT_HD Philox tile_philox(std::uint64_t key, std::uint32_t c2, std::uint32_t c3,
                         std::uint64_t counter) {
  return philox(static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), c2,
                c3, key);
}

DT_HD int sign_bit(int row) { return ((row & 7) << 2) | ((row >> 3) & 3); }

// 1 where z is -1.
DT_HD std::uint32_t sign_of(const Philox& signs, int row) {
  return (signs.word[row >> 5] >> sign_bit(row)) & 1u;
}

DT_HD float flip(float value, std::uint32_t minus) {
  return bits_float(float_bits(value) ^ (minus << 31));
}

DT_HD float gaussian_integer(std::uint32_t word) {
  const std::uint32_t sum =
      (word & 0xff) + ((word >> 8) & 0xff) + ((word >> 16) & 0xff) + (word >> 24);
  return static_cast<float>(static_cast<std::int32_t>(sum) - kGaussianMean);
}

// The order of a sum over terms, Rademacher: groups of four from the left, each from the left, then
// the groups from the left: u = (0 + q0) + q1 + ..., q = ((+-a +-b) +-c) +-d. A group has only 16
// values for given scalars, so the kernels look them up: bit k of `pattern` is the k-th term's
// sign.
DT_HD float group_value(const Term* terms, int count, std::uint32_t pattern) {
  float sum = flip(terms[0].value, pattern & 1u);
  for (int k = 1; k < count; ++k) {
    sum = add(sum, flip(terms[k].value, (pattern >> k) & 1u));
  }
  return sum;
}

// theta <- theta * decay - rate * sum, three roundings (decay 1 is exact).
DT_HD float updated(float theta, float decay, float rate, float sum) {
  return add(multiply(theta, decay), -multiply(rate, sum));
}

// Round to nearest even; NaN becomes the quiet NaN torch writes.
DT_HD std::uint16_t to_bf16(float value) {
  const std::uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Round to nearest even, denormals kept; a NaN keeps its sign and the top of its payload (as F16C).
DT_HD std::uint16_t to_f16(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
  }
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: multiples of 2^-24, rounded by an exact addition
    const float shifted = add(bits_float(magnitude), 0.5f);
    return static_cast<std::uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace decotrain::spsa
