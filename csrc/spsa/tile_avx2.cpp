// AVX2 twin: a row is two registers of 8 lanes, and so are a group's 16 sums. The loops are in
// lanes.h.
#include "spsa/tile.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include "spsa/lanes.h"

namespace decotrain::spsa {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  struct Table {
    F low;
    F high;
  };
  static constexpr int kWidth = 8;

  static F set(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }

  static I all(std::uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
  static I plus(I a, I b) { return _mm256_add_epi32(a, b); }
  static I times(I a, I b) { return _mm256_mul_epu32(a, b); }  // of the even lanes
  static I upper(I x) { return _mm256_srli_epi64(x, 32); }
  static I xor3(I a, I b, I c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  template <int n>
  static I up(I x) {
    return _mm256_slli_epi32(x, n);
  }
  template <int n>
  static I down(I x) {
    return _mm256_srli_epi32(x, n);
  }
  static I up_by(I x, unsigned n) {
    return _mm256_sll_epi32(x, _mm_cvtsi32_si128(static_cast<int>(n)));
  }
  static I even_counters(std::uint32_t first) {
    return plus(_mm256_setr_epi64x(0, 2, 4, 6), all(first));
  }
  static I zip(I even, I odd) {
    return _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xa0), 0xaa);
  }
  // Bits 4j of a, 4j + 1 of b, 4j + 2 of c, 4j + 3 of d.
  static I merge(I a, I b, I c, I d) {
    const I ab = _mm256_or_si256(_mm256_and_si256(a, all(0x11111111u)),
                                 _mm256_and_si256(b, all(0x22222222u)));
    const I cd = _mm256_or_si256(_mm256_and_si256(c, all(0x44444444u)),
                                 _mm256_and_si256(d, all(0x88888888u)));
    return _mm256_or_si256(ab, cd);
  }

  static Table table(const float* values) { return {load(values), load(values + 8)}; }
  // Patterns without their 4th bit pick from a register of 8; that bit picks the register.
  static F look_up(I pattern, Table values) {
    const F a = _mm256_permutevar8x32_ps(values.low, pattern);
    const F b = _mm256_permutevar8x32_ps(values.high, pattern);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(up<28>(pattern)));
  }
  // The value, negated where the top bit is set.
  static F signed_by(F value, I bits) {
    const F sign = _mm256_castsi256_ps(all(0x80000000u));
    return _mm256_xor_ps(_mm256_and_ps(_mm256_castsi256_ps(bits), sign), value);
  }
  // Sum of the four bytes of each lane, minus the mean.
  static F gaussian(I word) {
    const I pairs = _mm256_maddubs_epi16(word, _mm256_set1_epi8(1));
    const I sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, all(kGaussianMean)));
  }

  template <Store kind>
  static void put(void* out, int i, F value) {
    if constexpr (kind == Store::f32) {
      store(static_cast<float*>(out) + i, value);
      return;
    }
    auto* target = reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(out) + i);
    if constexpr (kind == Store::f16) {
      _mm_storeu_si128(target, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const I bits = _mm256_castps_si256(value);
      const I odd = _mm256_and_si256(down<16>(bits), all(1));
      I rounded = down<16>(plus(bits, plus(odd, all(0x7fff))));
      const I nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      rounded = _mm256_blendv_epi8(rounded, all(0x7fc0), nan);
      const I packed = _mm256_packus_epi32(rounded, rounded);
      _mm_storeu_si128(target, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
    }
  }
};

}  // namespace

void perturb_avx2(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out) {
  perturb_tile<Avx2>(job, tile, theta, out);
}

void replay_avx2(const ReplayTile& job, std::uint64_t tile, float* theta) {
  replay_tile<Avx2>(job, tile, theta);
}

}  // namespace decotrain::spsa
#endif
