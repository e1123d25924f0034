// CUDA twins of csrc/spsa: the same headers, hence the same bits. Compiled at first use through
// NVRTC (decotrain/spsa/gpu.py) without fused multiply-add; nvcc compiles it in the tests.
//
// perturb: a thread makes the 128 elements of one (tile, lane). replay: a thread keeps 32 rows of
// one (tile, lane) in registers over all steps; four threads share a lane's Philox calls by doing
// them four times, which is cheaper than passing the bits around. Half-warps touch whole 64-byte
// lines.
#include "spsa/noise.h"

using namespace decotrain;
using namespace decotrain::spsa;

namespace {

constexpr int kWordRows = 32;  // rows whose signs lie in one Philox word

__device__ void put(int store, void* out, std::uint64_t i, float value) {
  if (store == 0) {
    static_cast<float*>(out)[i] = value;
  } else {
    static_cast<std::uint16_t*>(out)[i] = store == 1 ? to_bf16(value) : to_f16(value);
  }
}

// (tile, lane) of this thread counted over the tiles that the range touches.
struct Place {
  std::uint64_t tile;
  int lane;
};

__device__ Place place_of(std::uint64_t thread, std::uint64_t first) {
  return Place{first / kTile + thread / kLanes, static_cast<int>(thread % kLanes)};
}

__device__ void gaussian_rows(std::uint64_t key, const Term& term, const Place& at, int row,
                              float scale, float* sum) {
  const std::uint64_t call = at.tile * (kTile / 4) + (row >> 2) * kLanes + at.lane;
  const Philox words = tile_philox(key, term.c2, term.c3, call);
  for (int w = 0; w < 4; ++w) {
    sum[w] = add(sum[w], multiply(scale, gaussian_integer(words.word[w])));
  }
}

}  // namespace

// One thread for each (tile, lane). `amount` is epsilon, times kGaussianUnit for Gaussian noise.
extern "C" __global__ void spsa_perturb(int noise, int store, std::uint64_t key, std::uint32_t c2,
                                        std::uint32_t c3, float amount, std::uint64_t first,
                                        std::uint64_t size, std::uint64_t threads,
                                        const float* theta, void* out) {
  const std::uint64_t thread = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= threads) return;
  const Place at = place_of(thread, first);
  Philox words = {};
  if (noise == 0) words = tile_philox(key, c2, c3, at.tile * kLanes + at.lane);
  for (int row = 0; row < kRows; ++row) {
    if (noise != 0 && row % 4 == 0) {
      words = tile_philox(key, c2, c3, at.tile * (kTile / 4) + (row >> 2) * kLanes + at.lane);
    }
    const std::uint64_t i = at.tile * kTile + row * kLanes + at.lane - first;
    if (i >= size) continue;  // before `first` it wraps around
    const float move = noise == 0 ? flip(amount, sign_of(words, row))
                                  : multiply(amount, gaussian_integer(words.word[row & 3]));
    put(store, out, i, add(theta[i], move));
  }
}

// Four threads for each (tile, lane), one for each Philox word. Values of Gaussian terms come
// multiplied by kGaussianUnit.
extern "C" __global__ void spsa_replay(int noise, std::uint64_t key, const Term* terms,
                                       const std::uint32_t* counts, const float* rates,
                                       const float* decays, std::uint32_t steps,
                                       std::uint64_t first, std::uint64_t size,
                                       std::uint64_t threads, float* theta) {
  const std::uint64_t thread = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= threads) return;
  const int word = static_cast<int>(thread / kLanes % 4);
  const Place at = place_of(thread / (4 * kLanes) * kLanes + thread % kLanes, first);
  const std::uint64_t base = at.tile * kTile + word * kWordRows * kLanes + at.lane - first;
  float held[kWordRows];
  for (int row = 0; row < kWordRows; ++row) {
    const std::uint64_t i = base + row * kLanes;
    held[row] = i < size ? theta[i] : 0.0f;
  }
  for (std::uint32_t step = 0; step < steps; ++step) {
    float sum[kWordRows] = {};
    const std::uint32_t count = counts[step];
    if (noise == 0) {
      for (std::uint32_t k = 0; k < count; k += kGroup) {
        const int own = count - k < kGroup ? static_cast<int>(count - k) : kGroup;
        std::uint32_t signs[kGroup] = {};
        for (int j = 0; j < own; ++j) {
          const Philox p =
              tile_philox(key, terms[k + j].c2, terms[k + j].c3, at.tile * kLanes + at.lane);
          signs[j] = p.word[word];
        }
        for (int row = 0; row < kWordRows; ++row) {
          std::uint32_t pattern = 0;
          for (int j = 0; j < kGroup; ++j) pattern |= ((signs[j] >> sign_bit(row)) & 1u) << j;
          sum[row] = add(sum[row], group_value(terms + k, own, pattern));
        }
      }
    } else {
      for (std::uint32_t k = 0; k < count; ++k) {
        for (int row = 0; row < kWordRows; row += 4) {
          gaussian_rows(key, terms[k], at, word * kWordRows + row, terms[k].value, sum + row);
        }
      }
    }
    for (int row = 0; row < kWordRows; ++row) {
      held[row] = updated(held[row], decays[step], rates[step], sum[row]);
    }
    terms += count;
  }
  for (int row = 0; row < kWordRows; ++row) {
    const std::uint64_t i = base + row * kLanes;
    if (i < size) theta[i] = held[row];
  }
}
