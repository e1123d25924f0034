// 16 lanes as one AVX-512 register (F, BW, DQ, VL).
#include "codec/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "codec/lanes.h"

namespace decotrain {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using Table = __m512;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void stream(float* p, F x) { _mm512_stream_ps(p, x); }  // p: a multiple of 64 bytes
  static void fence() { _mm_sfence(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static I set(u32 x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static I bits(F x) { return _mm512_castps_si512(x); }
  static F real(I x) { return _mm512_castsi512_ps(x); }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  static I plus(I a, I b) { return _mm512_add_epi32(a, b); }
  static I minus(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static I absolute(I a) { return _mm512_abs_epi32(a); }
  template <int count>
  static I right(I a) {
    return _mm512_srli_epi32(a, count);
  }
  template <int count>
  static I left(I a) {
    return _mm512_slli_epi32(a, count);
  }
  static I nearest(F x) { return _mm512_cvtps_epi32(x); }
  static I truncate(F x) { return _mm512_cvttps_epi32(x); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static I keep_at_least(I a, I b, I x) {
    return _mm512_maskz_mov_epi32(_mm512_cmpge_epi32_mask(a, b), x);
  }
  // The multiplier works on even lanes; odd ones are moved there and back.
  static void product(I x, u32 y, I& high, I& low) {
    const I by = set(y);
    const I even = _mm512_mul_epu32(x, by);
    const I odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
    low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
  }
  static u32 largest(I x) { return static_cast<u32>(_mm512_reduce_max_epi32(x)); }
  static u32 total(I x) { return static_cast<u32>(_mm512_reduce_add_epi32(x)); }

  static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static I load_u8(const u8* p) { return _mm512_cvtepu8_epi32(load16(p)); }
  static I load_i8(const u8* p) { return _mm512_cvtepi8_epi32(load16(p)); }
  static void store_u8(u8* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
  }
  static __m256i load32(const u8* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static I load_u16(const u8* p) { return _mm512_cvtepu16_epi32(load32(p)); }
  static void store_u16(u8* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
  }
  static F load_f16(const u8* p) { return _mm512_cvtph_ps(load32(p)); }
  static void store_f16(u8* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static Table table(F values) { return values; }
  static F lookup(Table table, I index) { return _mm512_permutexvar_ps(index, table); }
  static I e2m1(I m) {
    const I low = _mm512_setr_epi32(0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 6);
    const I high = _mm512_setr_epi32(6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7);
    return _mm512_permutex2var_epi32(low, m, high);
  }
};

}  // namespace

extern const Kernels kAvx512Kernels;
constinit const Kernels kAvx512Kernels = make_kernels<Avx512>();

}  // namespace decotrain
#endif
