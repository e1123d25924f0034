// AVX-512 twin: a register holds one row of 16 lanes. The loops are in lanes.h.
#include "spsa/tile.h"

#if defined(__AVX512F__)
#include <immintrin.h>

#include "spsa/lanes.h"

namespace decotrain::spsa {
namespace {

constexpr int kXor3 = 0x96;    // a ^ b ^ c
constexpr int kSelect = 0xca;  // a ? b : c, bit by bit
constexpr int kAndXor = 0x6a;  // (a & b) ^ c

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using Table = __m512;
  static constexpr int kWidth = 16;

  static F set(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }

  static I all(std::uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
  static I plus(I a, I b) { return _mm512_add_epi32(a, b); }
  static I times(I a, I b) { return _mm512_mul_epu32(a, b); }  // of the even lanes
  static I upper(I x) { return _mm512_srli_epi64(x, 32); }
  static I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, kXor3); }
  template <unsigned n>
  static I up(I x) {
    return _mm512_slli_epi32(x, n);
  }
  template <unsigned n>
  static I down(I x) {
    return _mm512_srli_epi32(x, n);
  }
  static I up_by(I x, unsigned n) {
    return _mm512_sll_epi32(x, _mm_cvtsi32_si128(static_cast<int>(n)));
  }
  static I even_counters(std::uint32_t first) {
    return plus(_mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), all(first));
  }
  static I zip(I even, I odd) {
    return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  }
  // Bits 4j of a, 4j + 1 of b, 4j + 2 of c, 4j + 3 of d.
  static I merge(I a, I b, I c, I d) {
    const I ab = _mm512_ternarylogic_epi32(all(0x11111111u), a, b, kSelect);
    const I cd = _mm512_ternarylogic_epi32(all(0x44444444u), c, d, kSelect);
    return _mm512_ternarylogic_epi32(all(0x33333333u), ab, cd, kSelect);
  }

  static Table table(const float* values) { return load(values); }
  static F look_up(I pattern, Table values) { return _mm512_permutexvar_ps(pattern, values); }
  // The value, negated where the top bit is set.
  static F signed_by(F value, I bits) {
    const I sign = all(0x80000000u);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(bits, sign, _mm512_castps_si512(value), kAndXor));
  }
  // Sum of the four bytes of each lane, minus the mean.
  static F gaussian(I word) {
    const I pairs = _mm512_maddubs_epi16(word, _mm512_set1_epi8(1));
    const I sum = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, all(kGaussianMean)));
  }

  template <Store kind>
  static void put(void* out, int i, F value) {
    if constexpr (kind == Store::f32) {
      store(static_cast<float*>(out) + i, value);
      return;
    }
    auto* target = reinterpret_cast<__m256i*>(static_cast<std::uint16_t*>(out) + i);
    if constexpr (kind == Store::f16) {
      _mm256_storeu_si256(target, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const I bits = _mm512_castps_si512(value);
      const I odd = _mm512_and_si512(down<16>(bits), all(1));
      I rounded = down<16>(plus(bits, plus(odd, all(0x7fff))));
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      rounded = _mm512_mask_mov_epi32(rounded, nan, all(0x7fc0));
      _mm256_storeu_si256(target, _mm512_cvtepi32_epi16(rounded));
    }
  }
};

}  // namespace

void perturb_avx512(const PerturbTile& job, std::uint64_t tile, const float* theta, void* out) {
  perturb_tile<Avx512>(job, tile, theta, out);
}

void replay_avx512(const ReplayTile& job, std::uint64_t tile, float* theta) {
  replay_tile<Avx512>(job, tile, theta);
}

}  // namespace decotrain::spsa
#endif
