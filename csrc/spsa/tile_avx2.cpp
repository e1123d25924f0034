// AVX2 twin. A tile is worked on in two halves of 8 lanes; otherwise as tile_avx512.cpp, with a
// group's 16 sums in two registers instead of one.
#include "spsa/tile.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace decotrain::spsa {
namespace {

constexpr int kHalf = kLanes / 2;
constexpr int kChunks = kRows / 8;
constexpr int kBatch = 16;  // groups whose patterns are held at once

struct Words {
  __m256i word[4];
};

inline __m256i all(std::uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }

struct Keys {
  __m256i low[kPhiloxRounds];
  __m256i high[kPhiloxRounds];
};

void schedule(std::uint64_t key, Keys& keys) {
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int i = 0; i < kPhiloxRounds; ++i) {
    keys.low[i] = all(k0);
    keys.high[i] = all(k1);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

inline __m256i xor3(__m256i a, __m256i b, __m256i c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}

// The words of counters first + 0..7 (first is a multiple of 8), lane by lane.
inline Words philox8(const Keys& keys, std::uint64_t first, std::uint32_t c2, std::uint32_t c3) {
  const __m256i m0 = all(kPhiloxM0);
  const __m256i m1 = all(kPhiloxM1);
  __m256i a0 =
      _mm256_add_epi32(_mm256_setr_epi64x(0, 2, 4, 6), all(static_cast<std::uint32_t>(first)));
  __m256i b0 = _mm256_add_epi32(a0, all(1));
  __m256i a1 = all(static_cast<std::uint32_t>(first >> 32));
  __m256i b1 = a1;
  __m256i a2 = all(c2);
  __m256i b2 = a2;
  __m256i a3 = all(c3);
  __m256i b3 = a3;
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const __m256i ap = _mm256_mul_epu32(m0, a0);
    const __m256i aq = _mm256_mul_epu32(m1, a2);
    const __m256i bp = _mm256_mul_epu32(m0, b0);
    const __m256i bq = _mm256_mul_epu32(m1, b2);
    a0 = xor3(_mm256_srli_epi64(aq, 32), a1, keys.low[i]);
    a2 = xor3(_mm256_srli_epi64(ap, 32), a3, keys.high[i]);
    b0 = xor3(_mm256_srli_epi64(bq, 32), b1, keys.low[i]);
    b2 = xor3(_mm256_srli_epi64(bp, 32), b3, keys.high[i]);
    a1 = aq;
    a3 = ap;
    b1 = bq;
    b3 = bp;
  }
  const auto zip = [](__m256i even, __m256i odd) {
    return _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xa0), 0xaa);
  };
  return Words{{zip(a0, b0), zip(a1, b1), zip(a2, b2), zip(a3, b3)}};
}

inline void put(Store store, void* out, int i, __m256 value) {
  if (store == Store::f32) {
    _mm256_storeu_ps(static_cast<float*>(out) + i, value);
    return;
  }
  auto* target = reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(out) + i);
  if (store == Store::f16) {
    _mm_storeu_si128(target, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), all(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, all(0x7fff)));
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, all(0x7fc0), nan);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  _mm_storeu_si128(target, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

inline __m256 gaussian_row(__m256i word) {
  const __m256i pairs = _mm256_maddubs_epi16(word, _mm256_set1_epi8(1));
  const __m256i sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, all(kGaussianMean)));
}

// Bit 4j + q of the four words becomes nibble j of out[q].
inline void interleave(const __m256i* w, __m256i* out) {
  const auto merge = [&](__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i ab = _mm256_or_si256(_mm256_and_si256(a, all(0x11111111u)),
                                       _mm256_and_si256(b, all(0x22222222u)));
    const __m256i cd = _mm256_or_si256(_mm256_and_si256(c, all(0x44444444u)),
                                       _mm256_and_si256(d, all(0x88888888u)));
    return _mm256_or_si256(ab, cd);
  };
  const auto up = [](__m256i x, int n) { return _mm256_slli_epi32(x, n); };
  const auto down = [](__m256i x, int n) { return _mm256_srli_epi32(x, n); };
  out[0] = merge(w[0], up(w[1], 1), up(w[2], 2), up(w[3], 3));
  out[1] = merge(down(w[0], 1), w[1], up(w[2], 1), up(w[3], 2));
  out[2] = merge(down(w[0], 2), down(w[1], 1), w[2], up(w[3], 1));
  out[3] = merge(down(w[0], 3), down(w[1], 2), down(w[2], 1), w[3]);
}

inline void group_patterns(const Keys& keys, std::uint64_t counter, const Term* terms, int count,
                           __m256i* patterns) {
  __m256i words[4][kGroup];
  for (int k = 0; k < kGroup; ++k) {
    Words signs = {};
    if (k < count) signs = philox8(keys, counter, terms[k].c2, terms[k].c3);
    for (int w = 0; w < 4; ++w) words[w][k] = signs.word[w];
  }
  for (int w = 0; w < 4; ++w) interleave(words[w], patterns + 4 * w);
}

// Patterns without their 4th bit pick from a register of 8; that bit picks the register.
inline __m256 look_up(__m256i pattern, __m256 low, __m256 high) {
  const __m256 a = _mm256_permutevar8x32_ps(low, pattern);
  const __m256 b = _mm256_permutevar8x32_ps(high, pattern);
  return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(pattern, 28)));
}

inline void add_rows(__m256i pattern, const float* table, __m256* sum) {
  const __m256 low = _mm256_loadu_ps(table);
  const __m256 high = _mm256_loadu_ps(table + 8);
#define DT_ROW(j) \
  sum[j] = _mm256_add_ps(sum[j], look_up(_mm256_srli_epi32(pattern, 4 * (j)), low, high))
  DT_ROW(0);
  DT_ROW(1);
  DT_ROW(2);
  DT_ROW(3);
  DT_ROW(4);
  DT_ROW(5);
  DT_ROW(6);
  DT_ROW(7);
#undef DT_ROW
}

inline void update_row(const Step& step, __m256 sum, float* theta) {
  const __m256 kept = _mm256_mul_ps(_mm256_loadu_ps(theta), _mm256_set1_ps(step.decay));
  _mm256_storeu_ps(theta, _mm256_sub_ps(kept, _mm256_mul_ps(_mm256_set1_ps(step.rate), sum)));
}

struct Scratch {
  __m256i patterns[kBatch][kChunks];
  float sum[kRows * kHalf];
};

void rademacher_half(const Keys& keys, std::uint64_t counter, const Term* terms,
                     const float* tables, const Step& step, float* theta, Scratch& scratch) {
  const std::uint32_t groups = (step.terms + kGroup - 1) / kGroup;
  std::uint32_t done = 0;
  do {
    const std::uint32_t batch = groups - done < kBatch ? groups - done : kBatch;
    for (std::uint32_t g = 0; g < batch; ++g) {
      const std::uint32_t at = (done + g) * kGroup;
      const std::uint32_t left = step.terms - at;
      group_patterns(keys, counter, terms + at, left < kGroup ? static_cast<int>(left) : kGroup,
                     scratch.patterns[g]);
    }
    const bool last = done + batch == groups;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      __m256 sum[8];
      float* kept = scratch.sum + chunk * 8 * kHalf;
      for (int j = 0; j < 8; ++j) {
        sum[j] = done == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(kept + j * kHalf);
      }
      for (std::uint32_t g = 0; g < batch; ++g) {
        add_rows(scratch.patterns[g][chunk], tables + (done + g) * kTable, sum);
      }
      for (int j = 0; j < 8; ++j) {
        if (last) {
          update_row(step, sum[j], theta + (chunk * 8 + j) * kLanes);
        } else {
          _mm256_storeu_ps(kept + j * kHalf, sum[j]);
        }
      }
    }
    done += batch;
  } while (done < groups);
}

void gaussian_half(const Keys& keys, std::uint64_t first, const Term* terms, const Step& step,
                   float* theta) {
  for (int call = 0; call < kRows / 4; ++call) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                     _mm256_setzero_ps()};
    const std::uint64_t counter = first + static_cast<unsigned>(call * kLanes);
    for (std::uint32_t k = 0; k < step.terms; ++k) {
      const Words words = philox8(keys, counter, terms[k].c2, terms[k].c3);
      const __m256 value = _mm256_set1_ps(terms[k].value);
      for (int w = 0; w < 4; ++w) {
        sum[w] = _mm256_add_ps(sum[w], _mm256_mul_ps(value, gaussian_row(words.word[w])));
      }
    }
    for (int w = 0; w < 4; ++w) update_row(step, sum[w], theta + (call * 4 + w) * kLanes);
  }
}

void perturb_half(const PerturbTile& job, const Keys& keys, std::uint64_t tile, int half,
                  const float* theta, void* out) {
  const __m256 amount = _mm256_set1_ps(job.amount);
  const unsigned lane = static_cast<unsigned>(half * kHalf);
  if (job.noise == Noise::gaussian) {
    for (int call = 0; call < kRows / 4; ++call) {
      const std::uint64_t counter =
          tile * (kTile / 4) + static_cast<unsigned>(call * kLanes) + lane;
      const Words words = philox8(keys, counter, job.c2, job.c3);
      for (int w = 0; w < 4; ++w) {
        const int i = (call * 4 + w) * kLanes + half * kHalf;
        const __m256 move = _mm256_mul_ps(amount, gaussian_row(words.word[w]));
        put(job.store, out, i, _mm256_add_ps(_mm256_loadu_ps(theta + i), move));
      }
    }
    return;
  }
  const Words signs = philox8(keys, tile * kLanes + lane, job.c2, job.c3);
  const __m256 sign = _mm256_castsi256_ps(all(0x80000000u));
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const __m256i word = _mm256_slli_epi32(signs.word[chunk / 4], 3 - chunk % 4);
    for (int j = 0; j < 8; ++j) {
      const int i = (chunk * 8 + j) * kLanes + half * kHalf;
      const __m256 bit = _mm256_castsi256_ps(_mm256_slli_epi32(word, 28 - 4 * j));
      const __m256 move = _mm256_xor_ps(_mm256_and_ps(bit, sign), amount);
      put(job.store, out, i, _mm256_add_ps(_mm256_loadu_ps(theta + i), move));
    }
  }
}

}  // namespace

void perturb_avx2(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out) {
  Keys keys;
  schedule(job.key, keys);
  for (int half = 0; half < 2; ++half) perturb_half(job, keys, tile, half, theta, out);
}

void replay_avx2(const ReplayTile& job, std::uint64_t tile, float* theta) {
  Keys keys;
  schedule(job.key, keys);
  Scratch scratch;
  const Term* terms = job.terms;
  const float* tables = job.tables;
  for (std::size_t s = 0; s < job.step_count; ++s) {
    const Step& step = job.steps[s];
    const bool gaussian = job.noise == Noise::gaussian;
    for (int half = 0; half < 2; ++half) {
      const unsigned lane = static_cast<unsigned>(half * kHalf);
      float* own = theta + half * kHalf;
      if (gaussian) {
        gaussian_half(keys, tile * (kTile / 4) + lane, terms, step, own);
      } else {
        rademacher_half(keys, tile * kLanes + lane, terms, tables, step, own, scratch);
      }
    }
    if (!gaussian) tables += (step.terms + kGroup - 1) / kGroup * kTable;
    terms += step.terms;
  }
}

}  // namespace decotrain::spsa
#endif
