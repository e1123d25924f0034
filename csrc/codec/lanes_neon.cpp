// 16 lanes as four NEON registers (aarch64).
#include "codec/kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "codec/lanes.h"

namespace decotrain {
namespace {

#define DT_EACH(result, expression) \
  result r;                         \
  for (int k = 0; k < 4; ++k) {     \
    r.v[k] = expression;            \
  }                                 \
  return r

struct Neon {
  struct F {
    float32x4_t v[4];
  };
  struct I {
    uint32x4_t v[4];
  };
  struct Table {
    uint8x16x4_t bytes;
  };

  static int32x4_t s(uint32x4_t x) { return vreinterpretq_s32_u32(x); }
  static uint32x4_t u(int32x4_t x) { return vreinterpretq_u32_s32(x); }

  static F load(const float* p) { DT_EACH(F, vld1q_f32(p + 4 * k)); }
  static void store(float* p, F x) {
    for (int k = 0; k < 4; ++k) vst1q_f32(p + 4 * k, x.v[k]);
  }
  static void stream(float* p, F x) { store(p, x); }  // no instruction for it is in arm_neon.h
  static void fence() {}
  static F set(float x) { DT_EACH(F, vdupq_n_f32(x)); }
  static I set(u32 x) { DT_EACH(I, vdupq_n_u32(x)); }
  static F mul(F x, F y) { DT_EACH(F, vmulq_f32(x.v[k], y.v[k])); }
  static F add(F x, F y) { DT_EACH(F, vaddq_f32(x.v[k], y.v[k])); }
  static F sub(F x, F y) { DT_EACH(F, vsubq_f32(x.v[k], y.v[k])); }
  static F div(F x, F y) { DT_EACH(F, vdivq_f32(x.v[k], y.v[k])); }
  static I bits(F x) { DT_EACH(I, vreinterpretq_u32_f32(x.v[k])); }
  static F real(I x) { DT_EACH(F, vreinterpretq_f32_u32(x.v[k])); }
  static I both(I x, I y) { DT_EACH(I, vandq_u32(x.v[k], y.v[k])); }
  static I either(I x, I y) { DT_EACH(I, vorrq_u32(x.v[k], y.v[k])); }
  static I plus(I x, I y) { DT_EACH(I, vaddq_u32(x.v[k], y.v[k])); }
  static I minus(I x, I y) { DT_EACH(I, vsubq_u32(x.v[k], y.v[k])); }
  static I max(I x, I y) { DT_EACH(I, u(vmaxq_s32(s(x.v[k]), s(y.v[k])))); }
  static I min(I x, I y) { DT_EACH(I, u(vminq_s32(s(x.v[k]), s(y.v[k])))); }
  static I absolute(I x) { DT_EACH(I, u(vabsq_s32(s(x.v[k])))); }
  template <int count>
  static I right(I x) {
    DT_EACH(I, vshrq_n_u32(x.v[k], count));
  }
  template <int count>
  static I left(I x) {
    DT_EACH(I, vshlq_n_u32(x.v[k], count));
  }
  static I nearest(F x) { DT_EACH(I, u(vcvtnq_s32_f32(x.v[k]))); }
  static I truncate(F x) { DT_EACH(I, u(vcvtq_s32_f32(x.v[k]))); }
  static F to_float(I x) { DT_EACH(F, vcvtq_f32_s32(s(x.v[k]))); }
  static I keep_at_least(I a, I b, I x) {
    DT_EACH(I, vandq_u32(vcgeq_s32(s(a.v[k]), s(b.v[k])), x.v[k]));
  }

  static void product(I x, u32 y, I& high, I& low) {
    for (int k = 0; k < 4; ++k) {
      const auto first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x.v[k]), vdup_n_u32(y)));
      const auto last = vreinterpretq_u32_u64(vmull_high_u32(x.v[k], vdupq_n_u32(y)));
      low.v[k] = vuzp1q_u32(first, last);
      high.v[k] = vuzp2q_u32(first, last);
    }
  }

  static u32 largest(I x) {
    const uint32x4_t low = vmaxq_u32(x.v[0], x.v[1]);
    return vmaxvq_u32(vmaxq_u32(low, vmaxq_u32(x.v[2], x.v[3])));
  }
  static u32 total(I x) {
    const uint32x4_t low = vaddq_u32(x.v[0], x.v[1]);
    return vaddvq_u32(vaddq_u32(low, vaddq_u32(x.v[2], x.v[3])));
  }

  static I widen(uint16x8_t low, uint16x8_t high) {
    return {{vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)),
             vmovl_high_u16(high)}};
  }
  static I load_u8(const u8* p) {
    const uint8x16_t x = vld1q_u8(p);
    return widen(vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x));
  }
  static I load_i8(const u8* p) {
    const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(x));
    const int16x8_t high = vmovl_high_s8(x);
    return {{u(vmovl_s16(vget_low_s16(low))), u(vmovl_high_s16(low)),
             u(vmovl_s16(vget_low_s16(high))), u(vmovl_high_s16(high))}};
  }
  static uint16x8_t narrow(uint32x4_t a, uint32x4_t b) { return vmovn_high_u32(vmovn_u32(a), b); }
  static void store_u8(u8* p, I x) {
    const uint8x8_t low = vmovn_u16(narrow(x.v[0], x.v[1]));
    vst1q_u8(p, vmovn_high_u16(low, narrow(x.v[2], x.v[3])));
  }
  static uint16x8_t load8_u16(const u8* p) { return vreinterpretq_u16_u8(vld1q_u8(p)); }
  static I load_u16(const u8* p) { return widen(load8_u16(p), load8_u16(p + 16)); }
  static void store_u16(u8* p, I x) {
    vst1q_u8(p, vreinterpretq_u8_u16(narrow(x.v[0], x.v[1])));
    vst1q_u8(p + 16, vreinterpretq_u8_u16(narrow(x.v[2], x.v[3])));
  }
  static F load_f16(const u8* p) {
    const float16x8_t low = vreinterpretq_f16_u8(vld1q_u8(p));
    const float16x8_t high = vreinterpretq_f16_u8(vld1q_u8(p + 16));
    return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low),
             vcvt_f32_f16(vget_low_f16(high)), vcvt_high_f32_f16(high)}};
  }
  static void store_f16(u8* p, F x) {
    for (int k = 0; k < 2; ++k) {
      const float16x8_t half = vcvt_high_f16_f32(vcvt_f16_f32(x.v[2 * k]), x.v[2 * k + 1]);
      vst1q_u8(p + 16 * k, vreinterpretq_u8_f16(half));
    }
  }

  static Table table(F x) {
    const I b = bits(x);
    Table t;
    for (int k = 0; k < 4; ++k) t.bytes.val[k] = vreinterpretq_u8_u32(b.v[k]);
    return t;
  }
  static F lookup(const Table& t, I index) {  // the low 4 bits of each lane: bytes 4 i .. 4 i + 3
    const uint32x4_t spread = vdupq_n_u32(0x04040404);
    const uint32x4_t step = vdupq_n_u32(0x03020100);
    const uint32x4_t low = vdupq_n_u32(15);
    F r;
    for (int k = 0; k < 4; ++k) {
      const uint32x4_t at = vmlaq_u32(step, vandq_u32(index.v[k], low), spread);
      r.v[k] = vreinterpretq_f32_u8(vqtbl4q_u8(t.bytes, vreinterpretq_u8_u32(at)));
    }
    return r;
  }
  static I e2m1(I m) {
    static const u8 kCodes[32] = {0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 6,
                                  6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7};
    const uint8x16x2_t codes = {{vld1q_u8(kCodes), vld1q_u8(kCodes + 16)}};
    const uint32x4_t lowest_byte = vdupq_n_u32(0xffffff00);  // other bytes find nothing: 0
    DT_EACH(I, vreinterpretq_u32_u8(
                   vqtbl2q_u8(codes, vreinterpretq_u8_u32(vorrq_u32(m.v[k], lowest_byte)))));
  }
};

#undef DT_EACH

}  // namespace

extern const Kernels kNeonKernels;
constinit const Kernels kNeonKernels = make_kernels<Neon>();

}  // namespace decotrain
#endif
