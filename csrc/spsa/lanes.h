// SPSA's two kernels on one tile, written once; tile_avx2.cpp and tile_avx512.cpp bring the lanes.
//
// A lane type V has F (floats) and I (32-bit integers) of kWidth lanes, a part of a row of kLanes.
// Philox runs on all lanes at once, even and odd lanes apart because the 32 x 32 -> 64 multiplier
// works on 64-bit lanes (their upper halves carry rubbish that nothing reads). Everything lives in
// an unnamed namespace: each file that includes this is built for another CPU, and nothing of it
// may be merged by the linker.
#pragma once

#include "spsa/tile.h"

namespace decotrain::spsa {
namespace {

constexpr int kChunks = kRows / 8;  // runs of 8 rows: one 32-bit word of nibbles each
constexpr int kBatch = 16;          // groups whose patterns are held at once: in L1

template <typename V>
struct Keys {
  typename V::I low[kPhiloxRounds];
  typename V::I high[kPhiloxRounds];
};

template <typename V>
struct Words {
  typename V::I word[4];
};

template <typename V>
struct Scratch {
  typename V::I patterns[kBatch][kChunks];
  float sum[kRows * V::kWidth];
};

template <typename V>
void schedule(std::uint64_t key, Keys<V>& keys) {
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int i = 0; i < kPhiloxRounds; ++i) {
    keys.low[i] = V::all(k0);
    keys.high[i] = V::all(k1);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// The words of counters first + 0 .. kWidth - 1 (first is a multiple of kWidth), lane by lane.
template <typename V>
inline Words<V> philox(const Keys<V>& keys, std::uint64_t first, std::uint32_t c2,
                       std::uint32_t c3) {
  using I = typename V::I;
  const I m0 = V::all(kPhiloxM0);
  const I m1 = V::all(kPhiloxM1);
  I a0 = V::even_counters(static_cast<std::uint32_t>(first));
  I b0 = V::plus(a0, V::all(1));
  I a1 = V::all(static_cast<std::uint32_t>(first >> 32));
  I b1 = a1;
  I a2 = V::all(c2);
  I b2 = a2;
  I a3 = V::all(c3);
  I b3 = a3;
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const I ap = V::times(m0, a0);
    const I aq = V::times(m1, a2);
    const I bp = V::times(m0, b0);
    const I bq = V::times(m1, b2);
    a0 = V::xor3(V::upper(aq), a1, keys.low[i]);
    a2 = V::xor3(V::upper(ap), a3, keys.high[i]);
    b0 = V::xor3(V::upper(bq), b1, keys.low[i]);
    b2 = V::xor3(V::upper(bp), b3, keys.high[i]);
    a1 = aq;
    a3 = ap;
    b1 = bq;
    b3 = bp;
  }
  return {{V::zip(a0, b0), V::zip(a1, b1), V::zip(a2, b2), V::zip(a3, b3)}};
}

// Bit 4j + q of the four words becomes nibble j of out[q].
template <typename V>
inline void interleave(const typename V::I* w, typename V::I* out) {
  out[0] =
      V::merge(w[0], V::template up<1>(w[1]), V::template up<2>(w[2]), V::template up<3>(w[3]));
  out[1] =
      V::merge(V::template down<1>(w[0]), w[1], V::template up<1>(w[2]), V::template up<2>(w[3]));
  out[2] =
      V::merge(V::template down<2>(w[0]), V::template down<1>(w[1]), w[2], V::template up<1>(w[3]));
  out[3] = V::merge(V::template down<3>(w[0]), V::template down<2>(w[1]), V::template down<1>(w[2]),
                    w[3]);
}

// patterns[chunk] of one group of `count` terms.
template <typename V>
inline void group_patterns(const Keys<V>& keys, std::uint64_t counter, const Term* terms, int count,
                           typename V::I* patterns) {
  typename V::I words[4][kGroup];
  for (int k = 0; k < kGroup; ++k) {
    Words<V> signs = {};
    if (k < count) signs = philox<V>(keys, counter, terms[k].c2, terms[k].c3);
    for (int w = 0; w < 4; ++w) words[w][k] = signs.word[w];
  }
  for (int w = 0; w < 4; ++w) interleave<V>(words[w], patterns + 4 * w);
}

// Written out, so that the eight sums stay in registers whatever the compiler thinks of loops.
template <typename V>
inline void add_rows(typename V::I pattern, typename V::Table table, typename V::F* sum) {
  sum[0] = V::add(sum[0], V::look_up(pattern, table));
  sum[1] = V::add(sum[1], V::look_up(V::template down<4>(pattern), table));
  sum[2] = V::add(sum[2], V::look_up(V::template down<8>(pattern), table));
  sum[3] = V::add(sum[3], V::look_up(V::template down<12>(pattern), table));
  sum[4] = V::add(sum[4], V::look_up(V::template down<16>(pattern), table));
  sum[5] = V::add(sum[5], V::look_up(V::template down<20>(pattern), table));
  sum[6] = V::add(sum[6], V::look_up(V::template down<24>(pattern), table));
  sum[7] = V::add(sum[7], V::look_up(V::template down<28>(pattern), table));
}

template <typename V>
inline void update_row(const Step& step, typename V::F sum, float* theta) {
  const typename V::F kept = V::mul(V::load(theta), V::set(step.decay));
  V::store(theta, V::sub(kept, V::mul(V::set(step.rate), sum)));
}

// The part of every row that begins at `theta`; its signs' counters begin at `counter`.
template <typename V>
void rademacher_step(const Keys<V>& keys, std::uint64_t counter, const Term* terms,
                     const float* tables, const Step& step, float* theta, Scratch<V>& scratch) {
  const std::uint32_t groups = (step.terms + kGroup - 1) / kGroup;
  std::uint32_t done = 0;
  do {
    const std::uint32_t batch = groups - done < kBatch ? groups - done : kBatch;
    for (std::uint32_t g = 0; g < batch; ++g) {
      const std::uint32_t at = (done + g) * kGroup;
      const std::uint32_t left = step.terms - at;
      group_patterns<V>(keys, counter, terms + at, left < kGroup ? static_cast<int>(left) : kGroup,
                        scratch.patterns[g]);
    }
    const bool last = done + batch == groups;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      typename V::F sum[8];
      float* kept = scratch.sum + chunk * 8 * V::kWidth;
      for (int j = 0; j < 8; ++j) {
        sum[j] = done == 0 ? V::set(0.0f) : V::load(kept + j * V::kWidth);
      }
      for (std::uint32_t g = 0; g < batch; ++g) {
        add_rows<V>(scratch.patterns[g][chunk], V::table(tables + (done + g) * kTable), sum);
      }
      for (int j = 0; j < 8; ++j) {
        if (last) {
          update_row<V>(step, sum[j], theta + (chunk * 8 + j) * kLanes);
        } else {
          V::store(kept + j * V::kWidth, sum[j]);
        }
      }
    }
    done += batch;
  } while (done < groups);
}

template <typename V>
void gaussian_step(const Keys<V>& keys, std::uint64_t first, const Term* terms, const Step& step,
                   float* theta) {
  for (int call = 0; call < kRows / 4; ++call) {
    typename V::F sum[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
    const std::uint64_t counter = first + static_cast<unsigned>(call * kLanes);
    for (std::uint32_t k = 0; k < step.terms; ++k) {
      const Words<V> words = philox<V>(keys, counter, terms[k].c2, terms[k].c3);
      const typename V::F value = V::set(terms[k].value);
      for (int w = 0; w < 4; ++w) {
        sum[w] = V::add(sum[w], V::mul(value, V::gaussian(words.word[w])));
      }
    }
    for (int w = 0; w < 4; ++w) update_row<V>(step, sum[w], theta + (call * 4 + w) * kLanes);
  }
}

// Lanes `lane` .. lane + kWidth - 1 of every row.
template <typename V, Store store>
void perturb_part(const PerturbTile& job, const Keys<V>& keys, std::uint64_t tile, int lane,
                  const float* theta, void* out) {
  const typename V::F amount = V::set(job.amount);
  if (job.noise == Noise::gaussian) {
    for (int call = 0; call < kRows / 4; ++call) {
      const std::uint64_t counter =
          tile * (kTile / 4) + static_cast<unsigned>(call * kLanes + lane);
      const Words<V> words = philox<V>(keys, counter, job.c2, job.c3);
      for (int w = 0; w < 4; ++w) {
        const int i = (call * 4 + w) * kLanes + lane;
        const typename V::F move = V::mul(amount, V::gaussian(words.word[w]));
        V::template put<store>(out, i, V::add(V::load(theta + i), move));
      }
    }
    return;
  }
  const std::uint64_t counter = tile * kLanes + static_cast<unsigned>(lane);
  const Words<V> signs = philox<V>(keys, counter, job.c2, job.c3);
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const typename V::I word = V::up_by(signs.word[chunk / 4], 3u - chunk % 4u);
    for (int j = 0; j < 8; ++j) {
      const int i = (chunk * 8 + j) * kLanes + lane;
      const typename V::I bits = V::up_by(word, 28u - 4u * static_cast<unsigned>(j));
      V::template put<store>(out, i, V::add(V::load(theta + i), V::signed_by(amount, bits)));
    }
  }
}

template <typename V>
void perturb_tile(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out) {
  Keys<V> keys;
  schedule(job.key, keys);
  for (int lane = 0; lane < kLanes; lane += V::kWidth) {
    switch (job.store) {
      case Store::f32:
        perturb_part<V, Store::f32>(job, keys, tile, lane, theta, out);
        break;
      case Store::bf16:
        perturb_part<V, Store::bf16>(job, keys, tile, lane, theta, out);
        break;
      case Store::f16:
        perturb_part<V, Store::f16>(job, keys, tile, lane, theta, out);
        break;
    }
  }
}

template <typename V>
void replay_tile(const ReplayTile& job, std::uint64_t tile, float* theta) {
  Keys<V> keys;
  schedule(job.key, keys);
  Scratch<V> scratch;
  const Term* terms = job.terms;
  const float* tables = job.tables;
  for (std::size_t s = 0; s < job.step_count; ++s) {
    const Step& step = job.steps[s];
    for (int lane = 0; lane < kLanes; lane += V::kWidth) {
      const auto from = static_cast<unsigned>(lane);
      if (job.noise == Noise::gaussian) {
        gaussian_step<V>(keys, tile * (kTile / 4) + from, terms, step, theta + lane);
      } else {
        rademacher_step<V>(keys, tile * kLanes + from, terms, tables, step, theta + lane, scratch);
      }
    }
    if (job.noise != Noise::gaussian) tables += (step.terms + kGroup - 1) / kGroup * kTable;
    terms += step.terms;
  }
}

}  // namespace
}  // namespace decotrain::spsa
