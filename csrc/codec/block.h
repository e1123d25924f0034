// The arithmetic of every codec, one block or one value at a time, for CPU and GPU alike.
//
// Scalar, SIMD and CUDA code agree bit for bit because all of them do exactly what this header
// says (docs/codecs.md has it in words): correctly rounded single operations, never contracted,
// and integer operations on the bits of floats. Nothing here loops over memory.
#pragma once

#include "host_device.h"

namespace decotrain::block {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i32 = std::int32_t;

constexpr u32 kInt8Block = 256;
constexpr u32 kE2m1Block = 32;
constexpr u32 kE2m1Group = 1024;  // blocks of a group share an exponent
constexpr u32 kE3m0Block = 128;
constexpr u32 kInt2Block = 256;
constexpr u32 kLanes = 16;  // sums of a block run in this many strided lanes

constexpr u32 kMagnitude = 0x7fffffff;
constexpr u32 kInfinity = 0x7f800000;  // magnitudes from here on are infinite or NaN
// 2^-100: blocks below are zeros. It keeps every scale, inverse and product away from denormals.
constexpr u32 kTiny = 27u << 23;

// Bytes of the sections of an encoded chunk, in this order (docs/codecs.md). The numbers are the
// codecs': f32, bf16, f16, int8, e2m1, e3m0, int2.
struct Sections {
  std::size_t codes;
  std::size_t scales;
  std::size_t exponents;
};

DT_HD std::size_t parts(std::size_t elements, std::size_t size) {
  return (elements + size - 1) / size;
}

DT_HD Sections sections(u32 codec, std::size_t n) {
  if (codec == 0) return {n * 4, 0, 0};
  if (codec == 1 || codec == 2) return {n * 2, 0, 0};
  if (codec == 3) return {parts(n, 16) * 16, parts(n, kInt8Block) * 4, 0};
  if (codec == 4) return {parts(n, 32) * 16, parts(n, kE2m1Block), parts(n, kE2m1Group)};
  if (codec == 5) return {parts(n, 32) * 16, parts(n, kE3m0Block), 0};
  return {parts(n, 64) * 16, parts(n, kInt2Block) * 4, 0};
}

#ifdef __CUDA_ARCH__
DT_HD u32 bits(float x) { return __float_as_uint(x); }
DT_HD float real(u32 x) { return __uint_as_float(x); }
DT_HD float mul(float a, float b) { return __fmul_rn(a, b); }
DT_HD float add(float a, float b) { return __fadd_rn(a, b); }
DT_HD float quotient(float a, float b) { return __fdiv_rn(a, b); }
#else
DT_HD u32 bits(float x) { return __builtin_bit_cast(u32, x); }
DT_HD float real(u32 x) { return __builtin_bit_cast(float, x); }
DT_HD float mul(float a, float b) { return a * b; }  // built with -ffp-contract=off
DT_HD float add(float a, float b) { return a + b; }
DT_HD float quotient(float a, float b) { return a / b; }
#endif

DT_HD u32 magnitude(float x) { return bits(x) & kMagnitude; }

// --- bf16 and f16: nearest, ties to even, overflow to the largest finite value

constexpr u32 kBf16Max = 0x7f7f7fff;  // magnitudes above round to the largest all the same
constexpr u32 kF16Max = 0x477fe000;   // 65504

DT_HD u16 bf16_code(float x) {
  const u32 sign = (bits(x) >> 16) & 0x8000;
  const u32 m = magnitude(x) > kBf16Max ? kBf16Max : magnitude(x);
  return static_cast<u16>(sign | (m + 0x7fff + ((m >> 16) & 1)) >> 16);
}

DT_HD float bf16_value(u16 code) { return real(static_cast<u32>(code) << 16); }

DT_HD bool bf16_ok(u16 code) { return (code & 0x7f80) != 0x7f80; }

DT_HD u16 f16_code(float x) {
  const u32 sign = (bits(x) >> 16) & 0x8000;
  const u32 m = magnitude(x) > kF16Max ? kF16Max : magnitude(x);
  if (m < 0x38800000) {  // below 2^-14: counts of 2^-24, rounded by an addition
    const u32 count = bits(add(real(m), 0.5f)) - bits(0.5f);
    return static_cast<u16>(sign | count);
  }
  const u32 rounded = m + 0xfff + ((m >> 13) & 1) - (112u << 23);
  return static_cast<u16>(sign | (rounded >> 13));
}

DT_HD float f16_value(u16 code) {
  const u32 sign = static_cast<u32>(code & 0x8000) << 16;
  const u32 m = code & 0x7fff;
  if (m < 0x0400) return real(sign | bits(mul(static_cast<float>(m), 0x1p-24f)));
  return real(sign | ((m << 13) + (112u << 23)));
}

DT_HD bool f16_ok(u16 code) { return (code & 0x7c00) != 0x7c00; }

// --- int8: code * scale, scale = absmax / 127

constexpr u32 kInt8ScaleMin = 20u << 23;   // 2^-107 <= 2^-100 / 127
constexpr u32 kInt8ScaleMax = 0x7bffffff;  // 128 times this is the largest float

DT_HD float int8_scale(u32 absmax) {
  if (absmax < kTiny) return 0.0f;
  const float scale = quotient(real(absmax), 127.0f);
  return bits(scale) > kInt8ScaleMax ? real(kInt8ScaleMax) : scale;
}

DT_HD float int8_inverse(u32 absmax) {
  return absmax < kTiny ? 0.0f : quotient(127.0f, real(absmax));
}

// The addition rounds to a whole number, ties to even, and leaves it in the low bits.
DT_HD u8 int8_code(float x, float inverse) {
  return static_cast<u8>(bits(add(mul(x, inverse), 12582912.0f)));
}

DT_HD float int8_value(u8 code, float scale) {
  return mul(static_cast<float>(static_cast<signed char>(code)), scale);
}

DT_HD bool int8_ok(u32 scale) {
  return scale == 0 || (scale >= kInt8ScaleMin && scale <= kInt8ScaleMax);
}

// --- e2m1: sign, 0 0.5 1 1.5 2 3 4 6, times a scale with 3 fraction bits near absmax / 6.
// A scale is one byte, 5 bits of exponent below the group's and the fraction; byte 0 is zero.

constexpr u32 kE2m1ScaleMin = 24u << 23;                  // below 2^-100 / 6
constexpr u32 kE2m1ScaleMax = (252u << 23) | (2u << 20);  // 1.25 * 2^125: 6 times it is finite

DT_HD u32 e2m1_scale(u32 absmax) {
  if (absmax < kTiny) return 0;
  const u32 scale = (bits(mul(real(absmax), 1.0f / 6.0f)) + 0x80000u) & 0xfff00000u;
  return scale > kE2m1ScaleMax ? kE2m1ScaleMax : scale;
}

// Not below absmax / 6, for stochastic rounding: a value above 6 scales could only go down.
DT_HD u32 e2m1_scale_above(u32 absmax) {
  if (absmax < kTiny) return 0;
  const u32 scale = (bits(quotient(real(absmax), 6.0f)) + 0xfffffu) & 0xfff00000u;
  return scale > kE2m1ScaleMax ? kE2m1ScaleMax : scale;
}

DT_HD u8 e2m1_scale_byte(u32 scale, u32 exponent) {  // exponent: largest scale >> 23 of the group
  if (scale == 0 || (scale >> 23) + 31 < exponent) return 0;
  return static_cast<u8>((scale >> 20) - ((exponent - 31) << 3));
}

DT_HD u32 e2m1_scale_bits(u8 byte, u32 exponent) {
  return byte == 0 ? 0 : (((exponent - 31) << 3) + byte) << 20;
}

DT_HD float e2m1_inverse(u32 scale) { return scale == 0 ? 0.0f : quotient(4.0f, real(scale)); }

// inverse: 4 / scale. All borders between codes are whole numbers then; ties go up.
DT_HD u32 e2m1_code(float x, float inverse) {
  const i32 t = static_cast<i32>(mul(x, inverse));  // toward zero
  const i32 m = t < 0 ? -t : t;
  const u32 code = (m >= 1) + (m >= 3) + (m >= 5) + (m >= 7) + (m >= 10) + (m >= 14) + (m >= 20);
  return t < 0 ? code | 8 : code;
}

DT_HD float e2m1_level(u32 code) {
  const u32 m = code & 7;
  const float level =
      m < 5 ? 0.5f * static_cast<float>(m) : (m == 5 ? 3.0f : (m == 6 ? 4.0f : 6.0f));
  return code > 8 ? -level : level;  // code 8, never encoded, is zero as well
}

DT_HD bool e2m1_ok(u8 byte, u32 exponent) {
  if (byte == 0) return true;
  const u32 scale = ((exponent << 3) + byte) << 20;  // 31 too large: no underflow
  return exponent <= 252 && scale >= kE2m1ScaleMin + (31u << 23) &&
         scale - (31u << 23) <= kE2m1ScaleMax;
}

// --- e3m0: sign, 0 and 2^-6 .. 1, times 2^(exponent - 127)

DT_HD u32 e3m0_exponent(u32 absmax) {
  if (absmax < kTiny) return 0;
  const u32 exponent = (absmax + 0x7fffffu) >> 23;  // the next power of two
  return exponent > 254 ? 254 : exponent;
}

DT_HD u32 e3m0_code(float x, u32 exponent) {
  const u32 m = magnitude(x);
  if (exponent == 0 || (m >> 23) + 7 < exponent) return 0;
  const i32 e = static_cast<i32>((m + 0x400000u) >> 23) - static_cast<i32>(exponent) + 7;
  const u32 code = static_cast<u32>(e < 1 ? 1 : (e > 7 ? 7 : e));
  return code | (bits(x) >> 28 & 8);
}

DT_HD float e3m0_level(u32 code) {
  const u32 m = code & 7;
  return m == 0 ? 0.0f : real(((120 + m) << 23) | (code & 8) << 28);
}

DT_HD float e3m0_value(u32 code, u32 exponent) {
  return mul(e3m0_level(code), real(exponent << 23));  // exact
}

DT_HD bool e3m0_ok(u8 exponent) { return exponent == 0 || (exponent >= 27 && exponent <= 254); }

// --- int2: sign and one of two magnitudes, the means of what lies below and above a border

constexpr float kInt2Down = 0x1p-8f;  // sums of 256 magnitudes stay finite
constexpr float kInt2Up = 0x1p8f;

DT_HD float int2_border(float sum, u32 count) {  // sum: of shrunk magnitudes
  return mul(sum, quotient(1.5f, static_cast<float>(count)));
}

DT_HD u16 int2_level(float sum, u32 count) {
  if (count == 0) return 0;
  const float mean = mul(quotient(sum, static_cast<float>(count)), kInt2Up);
  const u32 m = bits(mean);
  if (m >= kInfinity) return 0x7f7f;
  return m < (17u << 23) ? 0 : bf16_code(mean);  // 2^-110
}

DT_HD float int2_shrunk(float x) { return mul(real(magnitude(x)), kInt2Down); }

DT_HD u32 int2_code(float x, float border) {
  return static_cast<u32>(int2_shrunk(x) >= border) | (bits(x) >> 30 & 2);
}

DT_HD float int2_value(u32 code, u16 low, u16 high) {
  const float level = bf16_value((code & 1) != 0 ? high : low);
  return (code & 2) != 0 ? -level : level;
}

DT_HD bool int2_ok(u16 level) { return level == 0 || (level >= (17u << 7) && level <= 0x7f7f); }

}  // namespace decotrain::block
