// 16 lanes as two AVX2 registers (with F16C).
#include "codec/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "codec/lanes.h"

namespace decotrain {
namespace {

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  struct Table {
    __m256 magnitudes;  // of codes 0 .. 7
    __m256 other;       // of codes 8 .. 15
  };

  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static void stream(float* p, F x) {  // p: a multiple of 32 bytes
    _mm256_stream_ps(p, x.a);
    _mm256_stream_ps(p + 8, x.b);
  }
  static void fence() { _mm_sfence(); }
  static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static I set(u32 x) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
    return {v, v};
  }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static I bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  static F real(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
  static I both(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static I either(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static I plus(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I minus(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static I max(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static I min(I x, I y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
  static I absolute(I x) { return {_mm256_abs_epi32(x.a), _mm256_abs_epi32(x.b)}; }
  template <int count>
  static I right(I x) {
    return {_mm256_srli_epi32(x.a, count), _mm256_srli_epi32(x.b, count)};
  }
  template <int count>
  static I left(I x) {
    return {_mm256_slli_epi32(x.a, count), _mm256_slli_epi32(x.b, count)};
  }
  static I nearest(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
  static I truncate(F x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
  static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static __m256i keep(__m256i a, __m256i b, __m256i x) {
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(b, a), x);
  }
  static I keep_at_least(I a, I b, I x) { return {keep(a.a, b.a, x.a), keep(a.b, b.b, x.b)}; }

  // The multiplier works on even lanes; odd ones are moved there and back.
  static void product(__m256i x, __m256i y, __m256i& high, __m256i& low) {
    const __m256i even = _mm256_mul_epu32(x, y);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  static void product(I x, u32 y, I& high, I& low) {
    const __m256i by = _mm256_set1_epi32(static_cast<int>(y));
    product(x.a, by, high.a, low.a);
    product(x.b, by, high.b, low.b);
  }

  static u32 largest(I x) {
    const __m256i m = _mm256_max_epi32(x.a, x.b);
    __m128i r = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1));
    return static_cast<u32>(_mm_cvtsi128_si32(r));
  }
  static u32 total(I x) {
    const __m256i m = _mm256_add_epi32(x.a, x.b);
    __m128i r = _mm_add_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    r = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0x4e));
    r = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0xb1));
    return static_cast<u32>(_mm_cvtsi128_si32(r));
  }

  static __m128i load8(const u8* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static __m128i load16(const u8* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static void store16(u8* p, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }
  static I load_u8(const u8* p) {
    return {_mm256_cvtepu8_epi32(load8(p)), _mm256_cvtepu8_epi32(load8(p + 8))};
  }
  static I load_i8(const u8* p) {
    return {_mm256_cvtepi8_epi32(load8(p)), _mm256_cvtepi8_epi32(load8(p + 8))};
  }
  static __m256i pack_u16(I x) {  // lanes below 2^16
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
  }
  static void store_u8(u8* p, I x) {
    const __m256i words = pack_u16(both(x, set(0xffu)));
    store16(p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
  static I load_u16(const u8* p) {
    return {_mm256_cvtepu16_epi32(load16(p)), _mm256_cvtepu16_epi32(load16(p + 16))};
  }
  static void store_u16(u8* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_u16(x));
  }
  static F load_f16(const u8* p) {
    return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 16))};
  }
  static void store_f16(u8* p, F x) {
    store16(p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    store16(p + 16, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
  }

  static Table table(F values) { return {values.a, values.b}; }
  static __m256 find(const Table& table, __m256i index) {  // bit 3 chooses the register
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.magnitudes, index),
                            _mm256_permutevar8x32_ps(table.other, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  static F lookup(const Table& table, I index) {
    return {find(table, index.a), find(table, index.b)};
  }

  // Codes rise with m: the larger of two byte look-ups, the second being 0 for m < 16.
  static __m256i e2m1(__m256i m) {
    const __m256i low = _mm256_setr_epi8(0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 6,  //
                                         0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 6);
    const __m256i high = _mm256_setr_epi8(6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,  //
                                          6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7);
    const __m256i lowest_byte = _mm256_set1_epi32(static_cast<int>(0x80808000u));
    const __m256i above = _mm256_sub_epi32(m, _mm256_set1_epi32(16));
    return _mm256_max_epi32(_mm256_shuffle_epi8(low, _mm256_or_si256(m, lowest_byte)),
                            _mm256_shuffle_epi8(high, _mm256_or_si256(above, lowest_byte)));
  }
  static I e2m1(I m) { return {e2m1(m.a), e2m1(m.b)}; }
};

}  // namespace

extern const Kernels kAvx2Kernels;
constinit const Kernels kAvx2Kernels = make_kernels<Avx2>();

}  // namespace decotrain
#endif
