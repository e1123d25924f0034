// The reference twin: plain loops over one tile. What the others must equal, bit for bit.
#include "spsa/tile.h"

namespace decotrain::spsa {
namespace {

void put(Store store, void* out, int i, float value) {
  if (store == Store::f32) {
    static_cast<float*>(out)[i] = value;
  } else {
    static_cast<std::uint16_t*>(out)[i] = store == Store::bf16 ? to_bf16(value) : to_f16(value);
  }
}

void add_group(const ReplayTile& job, std::uint64_t tile, const Term* terms, int count,
               const float* table, float* sum) {
  for (int lane = 0; lane < kLanes; ++lane) {
    Philox signs[kGroup] = {};
    for (int k = 0; k < count; ++k) {
      signs[k] = tile_philox(job.key, terms[k].c2, terms[k].c3, tile * kLanes + lane);
    }
    for (int row = 0; row < kRows; ++row) {
      std::uint32_t pattern = 0;
      for (int k = 0; k < kGroup; ++k) pattern |= sign_of(signs[k], row) << k;
      float& u = sum[row * kLanes + lane];
      u = add(u, table[pattern]);
    }
  }
}

void add_gaussian(const ReplayTile& job, std::uint64_t tile, const Term& term, float* sum) {
  for (int call = 0; call < kTile / 4; ++call) {
    const Philox words = tile_philox(job.key, term.c2, term.c3, tile * (kTile / 4) + call);
    const int lane = call % kLanes;
    const int row = call / kLanes * 4;
    for (int word = 0; word < 4; ++word) {
      float& u = sum[(row + word) * kLanes + lane];
      u = add(u, multiply(term.value, gaussian_integer(words.word[word])));
    }
  }
}

}  // namespace

void perturb_scalar(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out) {
  if (job.noise == Noise::gaussian) {
    for (int call = 0; call < kTile / 4; ++call) {
      const Philox words = tile_philox(job.key, job.c2, job.c3, tile * (kTile / 4) + call);
      for (int word = 0; word < 4; ++word) {
        const int i = (call / kLanes * 4 + word) * kLanes + call % kLanes;
        const float move = multiply(job.amount, gaussian_integer(words.word[word]));
        put(job.store, out, i, add(theta[i], move));
      }
    }
    return;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const Philox signs = tile_philox(job.key, job.c2, job.c3, tile * kLanes + lane);
    for (int row = 0; row < kRows; ++row) {
      const int i = row * kLanes + lane;
      put(job.store, out, i, add(theta[i], flip(job.amount, sign_of(signs, row))));
    }
  }
}

void replay_scalar(const ReplayTile& job, std::uint64_t tile, float* theta) {
  const Term* terms = job.terms;
  const float* table = job.tables;
  for (std::size_t s = 0; s < job.step_count; ++s) {
    const Step& step = job.steps[s];
    alignas(64) float sum[kTile] = {};
    for (std::uint32_t k = 0; k < step.terms;) {
      if (job.noise == Noise::gaussian) {
        add_gaussian(job, tile, terms[k], sum);
        ++k;
        continue;
      }
      const std::uint32_t left = step.terms - k;
      const int count = left < kGroup ? static_cast<int>(left) : kGroup;
      add_group(job, tile, terms + k, count, table, sum);
      table += kTable;
      k += static_cast<std::uint32_t>(count);
    }
    for (int i = 0; i < kTile; ++i) theta[i] = updated(theta[i], step.decay, step.rate, sum[i]);
    terms += step.terms;
  }
}

}  // namespace decotrain::spsa
