// AVX-512 twin. A register holds one row (16 lanes); Philox runs on the 16 lanes at once, even and
// odd lanes apart because the 32 x 32 -> 64 multiplier works on 64-bit lanes (their upper halves
// carry rubbish that nothing reads).
#include "spsa/tile.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace decotrain::spsa {
namespace {

constexpr int kChunks = kRows / 8;  // runs of 8 rows: one 32-bit word of nibbles each
constexpr int kBatch = 16;          // groups whose patterns are held at once: 16 KiB, in L1
constexpr int kXor3 = 0x96;         // a ^ b ^ c
constexpr int kSelect = 0xca;       // a ? b : c, bit by bit
constexpr int kAndXor = 0x6a;       // (a & b) ^ c

struct Keys {
  __m512i low[kPhiloxRounds];
  __m512i high[kPhiloxRounds];
};

struct Words {
  __m512i word[4];
};

inline __m512i all(std::uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }

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

// The words of counters first + 0..15 (first is a multiple of 16), lane by lane.
inline Words philox16(const Keys& keys, std::uint64_t first, std::uint32_t c2, std::uint32_t c3) {
  const __m512i m0 = all(kPhiloxM0);
  const __m512i m1 = all(kPhiloxM1);
  __m512i a0 = _mm512_add_epi64(_mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14),
                                all(static_cast<std::uint32_t>(first)));
  __m512i b0 = _mm512_add_epi64(a0, _mm512_set1_epi64(1));
  __m512i a1 = all(static_cast<std::uint32_t>(first >> 32));
  __m512i b1 = a1;
  __m512i a2 = all(c2);
  __m512i b2 = a2;
  __m512i a3 = all(c3);
  __m512i b3 = a3;
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const __m512i ap = _mm512_mul_epu32(m0, a0);
    const __m512i aq = _mm512_mul_epu32(m1, a2);
    const __m512i bp = _mm512_mul_epu32(m0, b0);
    const __m512i bq = _mm512_mul_epu32(m1, b2);
    a0 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(aq, 32), a1, keys.low[i], kXor3);
    a2 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(ap, 32), a3, keys.high[i], kXor3);
    b0 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(bq, 32), b1, keys.low[i], kXor3);
    b2 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(bp, 32), b3, keys.high[i], kXor3);
    a1 = aq;
    a3 = ap;
    b1 = bq;
    b3 = bp;
  }
  const auto zip = [](__m512i even, __m512i odd) {
    return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  };
  return Words{{zip(a0, b0), zip(a1, b1), zip(a2, b2), zip(a3, b3)}};
}

inline void put(Store store, void* out, int i, __m512 value) {
  if (store == Store::f32) {
    _mm512_storeu_ps(static_cast<float*>(out) + i, value);
    return;
  }
  auto* target = reinterpret_cast<__m256i*>(static_cast<std::uint16_t*>(out) + i);
  if (store == Store::f16) {
    _mm256_storeu_si256(target, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, all(0x7fff)));
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, all(0x7fc0));
  _mm256_storeu_si256(target, _mm512_cvtepi32_epi16(rounded));
}

// Sum of the four bytes of each lane, minus the mean, as floats.
inline __m512 gaussian_row(__m512i word) {
  const __m512i pairs = _mm512_maddubs_epi16(word, _mm512_set1_epi8(1));
  const __m512i sum = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, all(kGaussianMean)));
}

// Bit 4j + q of the four words becomes nibble j of out[q].
inline void interleave(const __m512i* w, __m512i* out) {
  const __m512i low = all(0x11111111u);
  const __m512i third = all(0x44444444u);
  const __m512i half = all(0x33333333u);
  const auto merge = [&](__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_ternarylogic_epi32(low, a, b, kSelect);
    const __m512i cd = _mm512_ternarylogic_epi32(third, c, d, kSelect);
    return _mm512_ternarylogic_epi32(half, ab, cd, kSelect);
  };
  const auto up = [](__m512i x, unsigned n) { return _mm512_slli_epi32(x, n); };
  const auto down = [](__m512i x, unsigned n) { return _mm512_srli_epi32(x, n); };
  out[0] = merge(w[0], up(w[1], 1), up(w[2], 2), up(w[3], 3));
  out[1] = merge(down(w[0], 1), w[1], up(w[2], 1), up(w[3], 2));
  out[2] = merge(down(w[0], 2), down(w[1], 1), w[2], up(w[3], 1));
  out[3] = merge(down(w[0], 3), down(w[1], 2), down(w[2], 1), w[3]);
}

// patterns[chunk] of one group of `count` terms.
inline void group_patterns(const Keys& keys, std::uint64_t tile, const Term* terms, int count,
                           __m512i* patterns) {
  __m512i words[4][kGroup];
  for (int k = 0; k < kGroup; ++k) {
    Words signs = {};
    if (k < count) signs = philox16(keys, tile * kLanes, terms[k].c2, terms[k].c3);
    for (int w = 0; w < 4; ++w) words[w][k] = signs.word[w];
  }
  for (int w = 0; w < 4; ++w) interleave(words[w], patterns + 4 * w);
}

inline void add_rows(__m512i pattern, __m512 table, __m512* sum) {
#define DT_ROW(j) \
  sum[j] = _mm512_add_ps(sum[j], _mm512_permutexvar_ps(_mm512_srli_epi32(pattern, 4 * (j)), table))
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

inline void update_rows(const Step& step, const __m512* sum, float* theta) {
  const __m512 rate = _mm512_set1_ps(step.rate);
  const __m512 decay = _mm512_set1_ps(step.decay);
  for (int j = 0; j < 8; ++j) {
    const __m512 old = _mm512_loadu_ps(theta + j * kLanes);
    const __m512 move = _mm512_mul_ps(rate, sum[j]);
    _mm512_storeu_ps(theta + j * kLanes, _mm512_sub_ps(_mm512_mul_ps(old, decay), move));
  }
}

struct Scratch {
  __m512i patterns[kBatch][kChunks];
  float sum[kTile];
};

void rademacher_step(const Keys& keys, std::uint64_t tile, const Term* terms, const float* tables,
                     const Step& step, float* theta, Scratch& scratch) {
  const std::uint32_t groups = (step.terms + kGroup - 1) / kGroup;
  std::uint32_t done = 0;
  do {
    const std::uint32_t batch = groups - done < kBatch ? groups - done : kBatch;
    for (std::uint32_t g = 0; g < batch; ++g) {
      const std::uint32_t at = (done + g) * kGroup;
      const std::uint32_t left = step.terms - at;
      group_patterns(keys, tile, terms + at, left < kGroup ? static_cast<int>(left) : kGroup,
                     scratch.patterns[g]);
    }
    const bool last = done + batch == groups;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      __m512 sum[8];
      float* kept = scratch.sum + chunk * 8 * kLanes;
      for (int j = 0; j < 8; ++j) {
        sum[j] = done == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(kept + j * kLanes);
      }
      for (std::uint32_t g = 0; g < batch; ++g) {
        const __m512 table = _mm512_loadu_ps(tables + (done + g) * kTable);
        add_rows(scratch.patterns[g][chunk], table, sum);
      }
      if (last) {
        update_rows(step, sum, theta + chunk * 8 * kLanes);
      } else {
        for (int j = 0; j < 8; ++j) _mm512_storeu_ps(kept + j * kLanes, sum[j]);
      }
    }
    done += batch;
  } while (done < groups);
}

void gaussian_step(const Keys& keys, std::uint64_t tile, const Term* terms, const Step& step,
                   float* theta) {
  const __m512 rate = _mm512_set1_ps(step.rate);
  const __m512 decay = _mm512_set1_ps(step.decay);
  for (int call = 0; call < kRows / 4; ++call) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                     _mm512_setzero_ps()};
    const std::uint64_t counter = tile * (kTile / 4) + static_cast<unsigned>(call * kLanes);
    for (std::uint32_t k = 0; k < step.terms; ++k) {
      const Words words = philox16(keys, counter, terms[k].c2, terms[k].c3);
      const __m512 value = _mm512_set1_ps(terms[k].value);
      for (int w = 0; w < 4; ++w) {
        sum[w] = _mm512_add_ps(sum[w], _mm512_mul_ps(value, gaussian_row(words.word[w])));
      }
    }
    for (int w = 0; w < 4; ++w) {
      float* row = theta + (call * 4 + w) * kLanes;
      const __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(row), decay);
      _mm512_storeu_ps(row, _mm512_sub_ps(kept, _mm512_mul_ps(rate, sum[w])));
    }
  }
}

template <Store store>
void perturb_tile(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out) {
  Keys keys;
  schedule(job.key, keys);
  const __m512 amount = _mm512_set1_ps(job.amount);
  if (job.noise == Noise::gaussian) {
    for (int call = 0; call < kRows / 4; ++call) {
      const std::uint64_t counter = tile * (kTile / 4) + static_cast<unsigned>(call * kLanes);
      const Words words = philox16(keys, counter, job.c2, job.c3);
      for (int w = 0; w < 4; ++w) {
        const int i = (call * 4 + w) * kLanes;
        const __m512 move = _mm512_mul_ps(amount, gaussian_row(words.word[w]));
        put(store, out, i, _mm512_add_ps(_mm512_loadu_ps(theta + i), move));
      }
    }
    return;
  }
  const Words signs = philox16(keys, tile * kLanes, job.c2, job.c3);
  const __m512i sign = all(0x80000000u);
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const __m512i word = _mm512_slli_epi32(signs.word[chunk / 4], 3u - chunk % 4u);
    for (int j = 0; j < 8; ++j) {
      const int i = (chunk * 8 + j) * kLanes;
      const __m512i bits = _mm512_slli_epi32(word, 28u - 4u * static_cast<unsigned>(j));
      const __m512i move =
          _mm512_ternarylogic_epi32(bits, sign, _mm512_castps_si512(amount), kAndXor);
      put(store, out, i, _mm512_add_ps(_mm512_loadu_ps(theta + i), _mm512_castsi512_ps(move)));
    }
  }
}

}  // namespace

void perturb_avx512(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out) {
  switch (job.store) {
    case Store::f32:
      return perturb_tile<Store::f32>(job, tile, theta, out);
    case Store::bf16:
      return perturb_tile<Store::bf16>(job, tile, theta, out);
    case Store::f16:
      return perturb_tile<Store::f16>(job, tile, theta, out);
  }
}

void replay_avx512(const ReplayTile& job, std::uint64_t tile, float* theta) {
  Keys keys;
  schedule(job.key, keys);
  Scratch scratch;
  const Term* terms = job.terms;
  const float* tables = job.tables;
  for (std::size_t s = 0; s < job.step_count; ++s) {
    const Step& step = job.steps[s];
    if (job.noise == Noise::gaussian) {
      gaussian_step(keys, tile, terms, step, theta);
    } else {
      rademacher_step(keys, tile, terms, tables, step, theta, scratch);
      tables += (step.terms + kGroup - 1) / kGroup * kTable;
    }
    terms += step.terms;
  }
}

}  // namespace decotrain::spsa
#endif
