// Codecs: lengths, places, checks, and the way from a call to the kernels of this CPU.
//
// The arithmetic is block.h's, the loops are the kernels', combining is combine.cpp's.
#include "codec/codec.h"

#include <cassert>
#include <cstring>

#include "codec/kernels.h"
#include "simd.h"

namespace decotrain {
namespace {

using namespace block;

Sections sections_of(Codec codec, std::size_t elements) {
  return sections(static_cast<u32>(codec), elements);
}

template <typename T>
T load(const u8* bytes, std::size_t index) {
  T value;
  std::memcpy(&value, bytes + index * sizeof value, sizeof value);
  return value;
}

bool scales_ok(Codec codec, const Place& in, std::size_t elements) {
  bool ok = true;
  if (codec == Codec::int8) {
    for (std::size_t i = 0; i < parts(elements, kInt8Block); ++i) {
      ok &= int8_ok(load<u32>(in.scales, i));
    }
  } else if (codec == Codec::e2m1) {
    for (std::size_t i = 0; i < parts(elements, kE2m1Block); ++i) {
      ok &= e2m1_ok(in.scales[i], in.exponents[i / (kE2m1Group / kE2m1Block)]);
    }
  } else if (codec == Codec::e3m0) {
    for (std::size_t i = 0; i < parts(elements, kE3m0Block); ++i) ok &= e3m0_ok(in.scales[i]);
  } else if (codec == Codec::int2) {
    for (std::size_t i = 0; i < parts(elements, kInt2Block) * 2; ++i) {
      ok &= int2_ok(load<u16>(in.scales, i));
    }
  }
  return ok;
}

Place place_const(Codec codec, const std::byte* bytes, std::size_t elements) {
  return place(codec, const_cast<std::byte*>(bytes), elements, 0);
}

}  // namespace

std::size_t encoded_bytes(Codec codec, std::size_t elements) {
  const Sections s = sections_of(codec, elements);
  return s.codes + s.scales + s.exponents;
}

Place place(Codec codec, std::byte* bytes, std::size_t elements, std::size_t begin) {
  assert(begin % kPart == 0);
  assert(begin <= elements);
  const Sections all = sections_of(codec, elements);
  const Sections before = sections_of(codec, begin);
  Place out;
  u8* base = reinterpret_cast<u8*>(bytes);
  out.codes = base + before.codes;
  out.scales = base + all.codes + before.scales;
  out.exponents = base + all.codes + all.scales + before.exponents;
  return out;
}

void clear_padding(Codec codec, std::byte* bytes, std::size_t elements) {
  if (codec != Codec::int8) return;  // the others fill whole groups
  const std::size_t padded = parts(elements, 16) * 16;
  if (padded > elements) std::memset(bytes + elements, 0, padded - elements);
}

bool encode(Codec codec, std::span<const float> values, std::byte* out) {
  if (values.empty()) return true;
  const ExactFloat exact;
  clear_padding(codec, out, values.size());
  const Place where = place(codec, out, values.size(), 0);
  return kernels().encode[static_cast<std::size_t>(codec)](values.data(), values.size(), where);
}

bool decode(Codec codec, const std::byte* bytes, std::span<float> out) {
  if (out.empty()) return true;
  const ExactFloat exact;
  const Place where = place_const(codec, bytes, out.size());
  return scales_ok(codec, where, out.size()) &&
         kernels().decode[static_cast<std::size_t>(codec)](where, out.size(), out.data());
}

bool valid(Codec codec, const std::byte* bytes, std::size_t elements) {
  if (elements == 0) return true;
  const Place in = place_const(codec, bytes, elements);
  if (codec == Codec::f32 && reinterpret_cast<std::uintptr_t>(bytes) % alignof(float) == 0) {
    return kernels().finite_f32(reinterpret_cast<const float*>(bytes), elements);
  }
  // The sum reaches the highest bit exactly when the exponent is all ones: loops a compiler
  // can turn into vectors.
  u32 wide = 0;
  u32 narrow = 0;
  if (codec == Codec::f32) {
    for (std::size_t i = 0; i < elements; ++i) {
      wide |= (load<u32>(in.codes, i) & kMagnitude) + 0x00800000u;
    }
  } else if (codec == Codec::bf16 || codec == Codec::f16) {
    const u32 one = codec == Codec::bf16 ? 0x0080 : 0x0400;
    for (std::size_t i = 0; i < elements; ++i) narrow |= (load<u16>(in.codes, i) & 0x7fffu) + one;
  } else {
    return scales_ok(codec, in, elements);
  }
  return (wide & ~kMagnitude) == 0 && (narrow & 0x8000) == 0;
}

#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

const Kernels& kernels() {
#if defined(__x86_64__)
  if (simd() == Simd::avx512) return kAvx512Kernels;
  if (simd() == Simd::avx2) return kAvx2Kernels;
#elif defined(__aarch64__)
  if (simd() == Simd::neon) return kNeonKernels;
#endif
  return kScalarKernels;
}

}  // namespace decotrain
