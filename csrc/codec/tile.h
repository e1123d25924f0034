// The CUDA kernels of the codecs, without CUDA: what each of 256 threads does with a tile of 1024
// values, in phases with a barrier between them.
//
// csrc/cuda/codec.cu runs the phases on a GPU; tile_host.cpp runs them on the CPU, thread by
// thread, so that everything but the barriers is tested where there is no GPU.
#pragma once

#include "codec/block.h"

namespace decotrain::tile {

using namespace block;

constexpr u32 kValues = 1024;
constexpr u32 kThreads = 256;
constexpr u32 kBlocksMax = kValues / kE2m1Block;

struct Tile {  // shared memory of a thread block
  float value[kValues];
  u32 top[kBlocksMax];       // absmax of each block
  u32 scale[kBlocksMax];     // bits
  float factor[kBlocksMax];  // what values are multiplied by; int2: the border
  u32 exponent;
  float below[kValues / kLanes];  // int2: a lane's sums
  float above[kValues / kLanes];
  u32 above_count[kValues / kLanes];
};

struct Out {  // of this tile
  u8* codes;
  u8* scales;
  u8* exponents;
  u32* poison;  // set to 1 when a value is NaN or infinite
};

// *slot = max(*slot, m). On a GPU all lanes of a warp call it with one slot.
DT_HD void raise(u32* slot, u32 m) {
#ifdef __CUDA_ARCH__
  m = __reduce_max_sync(0xffffffffu, m);
  if ((threadIdx.x & 31) == 0) atomicMax(slot, m);
#else
  if (m > *slot) *slot = m;
#endif
}

DT_HD void store16(u8* out, u32 x) {
  out[0] = static_cast<u8>(x);
  out[1] = static_cast<u8>(x >> 8);
}

DT_HD void store32(u8* out, u32 x) {
  store16(out, x);
  store16(out + 2, x >> 16);
}

DT_HD u32 load16(const u8* in) { return in[0] | static_cast<u32>(in[1]) << 8; }
DT_HD u32 load32(const u8* in) { return load16(in) | load16(in + 2) << 16; }

DT_HD void fetch(Tile& tile, u32 t, const float* values, u32 count) {
  for (u32 i = t; i < kValues; i += kThreads) tile.value[i] = i < count ? values[i] : 0.0f;
  if (t < kBlocksMax) tile.top[t] = 0;
  if (t == 0) tile.exponent = 0;
}

DT_HD void find_tops(Tile& tile, u32 t, u32 block) {
  for (u32 i = t; i < kValues; i += kThreads) {
    raise(&tile.top[i / block], magnitude(tile.value[i]));
  }
}

DT_HD bool poisoned(const Tile& tile, u32 b, const Out& out) {
  if (tile.top[b] < kInfinity) return false;
  *out.poison = 1;
  return true;
}

// Every codec: kPhases and phase(p, tile, t, count, out); phase 0 comes after fetch and a barrier.

template <u32 codec>
struct Plain {  // f32, bf16, f16
  static constexpr u32 kPhases = 1;
  DT_HD void phase(u32, Tile& tile, u32 t, u32 count, const Out& out) {
    for (u32 i = t; i < count; i += kThreads) {
      const float x = tile.value[i];
      if (magnitude(x) >= kInfinity) *out.poison = 1;
      if (codec == 0) store32(out.codes + 4 * i, bits(x));
      if (codec == 1) store16(out.codes + 2 * i, bf16_code(x));
      if (codec == 2) store16(out.codes + 2 * i, f16_code(x));
    }
  }
};

struct Int8 {
  static constexpr u32 kPhases = 3;
  DT_HD void phase(u32 p, Tile& tile, u32 t, u32 count, const Out& out) {
    if (p == 0) {
      find_tops(tile, t, kInt8Block);
    } else if (p == 1) {
      if (t * kInt8Block >= count || poisoned(tile, t, out)) return;
      tile.factor[t] = int8_inverse(tile.top[t]);
      store32(out.scales + 4 * t, bits(int8_scale(tile.top[t])));
    } else {
      for (u32 i = t; i < parts(count, 16) * 16; i += kThreads) {
        out.codes[i] = int8_code(tile.value[i], tile.factor[i / kInt8Block]);
      }
    }
  }
};

// The byte that holds codes i and i + 16 of a group of 32.
DT_HD u32 first_of_byte(u32 byte) { return byte / 16 * 32 + byte % 16; }

struct E2m1 {
  static constexpr u32 kPhases = 4;
  DT_HD void phase(u32 p, Tile& tile, u32 t, u32 count, const Out& out) {
    if (p == 0) {
      find_tops(tile, t, kE2m1Block);
    } else if (p == 1) {
      if (t >= kBlocksMax) return;
      poisoned(tile, t, out);
      tile.scale[t] = e2m1_scale(tile.top[t]);
      raise(&tile.exponent, tile.scale[t] >> 23);
    } else if (p == 2) {
      if (t == 0) *out.exponents = static_cast<u8>(tile.exponent);
      if (t * kE2m1Block >= count) return;
      const u8 byte = e2m1_scale_byte(tile.scale[t], tile.exponent);
      tile.factor[t] = e2m1_inverse(e2m1_scale_bits(byte, tile.exponent));
      out.scales[t] = byte;
    } else {
      for (u32 b = t; b < parts(count, 32) * 16; b += kThreads) {
        const u32 i = first_of_byte(b);
        const float inverse = tile.factor[i / kE2m1Block];
        const u32 low = e2m1_code(tile.value[i], inverse);
        out.codes[b] = static_cast<u8>(low | e2m1_code(tile.value[i + 16], inverse) << 4);
      }
    }
  }
};

struct E3m0 {
  static constexpr u32 kPhases = 3;
  DT_HD void phase(u32 p, Tile& tile, u32 t, u32 count, const Out& out) {
    if (p == 0) {
      find_tops(tile, t, kE3m0Block);
    } else if (p == 1) {
      if (t * kE3m0Block >= count || poisoned(tile, t, out)) return;
      tile.scale[t] = e3m0_exponent(tile.top[t]);
      out.scales[t] = static_cast<u8>(tile.scale[t]);
    } else {
      for (u32 b = t; b < parts(count, 32) * 16; b += kThreads) {
        const u32 i = first_of_byte(b);
        const u32 exponent = tile.scale[i / kE3m0Block];
        const u32 low = e3m0_code(tile.value[i], exponent);
        out.codes[b] = static_cast<u8>(low | e3m0_code(tile.value[i + 16], exponent) << 4);
      }
    }
  }
};

struct Int2 {
  static constexpr u32 kPhases = 6;
  static constexpr u32 kBlocks = kValues / kInt2Block;
  static constexpr u32 kSums = kBlocks * kLanes;

  // Sums of one block's lanes, halves onto halves.
  DT_HD float tree(const float* lanes) {
    float sum[kLanes];
    for (u32 i = 0; i < kLanes; ++i) sum[i] = lanes[i];
    for (u32 half = kLanes / 2; half > 0; half /= 2) {
      for (u32 i = 0; i < half; ++i) sum[i] = add(sum[i], sum[i + half]);
    }
    return sum[0];
  }

  DT_HD u32 held(u32 b, u32 count) {  // values of block b that exist
    const u32 rest = count - b * kInt2Block;
    return rest < kInt2Block ? rest : kInt2Block;
  }

  DT_HD void sum_lane(Tile& tile, u32 t, bool split) {
    const u32 first = t / kLanes * kInt2Block + t % kLanes;
    tile.below[t] = 0.0f;
    tile.above[t] = 0.0f;
    tile.above_count[t] = 0;
    for (u32 i = first; i < first - t % kLanes + kInt2Block; i += kLanes) {
      const float y = int2_shrunk(tile.value[i]);
      const bool is_above = split && y >= tile.factor[t / kLanes];
      float& sum = is_above ? tile.above[t] : tile.below[t];
      sum = add(sum, y);
      tile.above_count[t] += is_above ? 1 : 0;
    }
  }

  DT_HD void finish_levels(Tile& tile, u32 b, u32 count, const Out& out) {
    u32 above_count = 0;
    for (u32 i = 0; i < kLanes; ++i) above_count += tile.above_count[b * kLanes + i];
    const u32 below_count = held(b, count) - above_count;
    u32 low = int2_level(tree(tile.below + b * kLanes), below_count);
    u32 high = above_count == 0 ? low : int2_level(tree(tile.above + b * kLanes), above_count);
    if (tile.top[b] < kTiny) low = high = 0;
    store32(out.scales + 4 * b, low | high << 16);
  }

  DT_HD u32 byte(const Tile& tile, u32 b) {  // codes i, i + 16, i + 32, i + 48
    const u32 i = b / 16 * 64 + b % 16;
    if (tile.top[i / kInt2Block] < kTiny) return 0;
    u32 codes = 0;
    for (u32 part = 0; part < 4; ++part) {
      const float x = tile.value[i + part * 16];
      codes |= int2_code(x, tile.factor[i / kInt2Block]) << (2 * part);
    }
    return codes;
  }

  DT_HD void phase(u32 p, Tile& tile, u32 t, u32 count, const Out& out) {
    const bool block = t < kBlocks && t * kInt2Block < count;
    if (p == 0) {
      find_tops(tile, t, kInt2Block);
    } else if (p == 1 || p == 3) {
      if (t < kSums) sum_lane(tile, t, p == 3);
    } else if (p == 2) {
      if (block) {
        poisoned(tile, t, out);
        tile.factor[t] = int2_border(tree(tile.below + t * kLanes), held(t, count));
      }
    } else if (p == 4) {
      if (block) finish_levels(tile, t, count, out);
    } else {
      for (u32 b = t; b < parts(count, 64) * 16; b += kThreads) {
        out.codes[b] = static_cast<u8>(byte(tile, b));
      }
    }
  }
};

// --- decoding: value i of a tile; `ok` becomes false for bytes that are no encoding

template <u32 codec>
DT_HD float decoded(const u8* codes, const u8* scales, const u8* exponents, u32 i, bool& ok) {
  const u32 nibble =
      codec == 4 || codec == 5 ? codes[i / 32 * 16 + i % 16] >> (i % 32 / 16 * 4) & 15u : 0;
  if (codec == 0) {
    const float x = real(load32(codes + 4 * i));
    ok = magnitude(x) < kInfinity;
    return x;
  }
  if (codec == 1 || codec == 2) {
    const u16 code = static_cast<u16>(load16(codes + 2 * i));
    ok = codec == 1 ? bf16_ok(code) : f16_ok(code);
    return codec == 1 ? bf16_value(code) : f16_value(code);
  }
  if (codec == 3) {
    const u32 scale = load32(scales + i / kInt8Block * 4);
    ok = int8_ok(scale);
    return int8_value(codes[i], real(scale));
  }
  if (codec == 4) {
    const u8 byte = scales[i / kE2m1Block];
    ok = e2m1_ok(byte, *exponents);
    return mul(e2m1_level(nibble), real(e2m1_scale_bits(byte, *exponents)));
  }
  if (codec == 5) {
    const u8 exponent = scales[i / kE3m0Block];
    ok = e3m0_ok(exponent);
    return e3m0_value(nibble, exponent);
  }
  const u32 pair = load32(scales + i / kInt2Block * 4);
  const u16 low = static_cast<u16>(pair);
  const u16 high = static_cast<u16>(pair >> 16);
  ok = int2_ok(low) && int2_ok(high);
  const u32 code = codes[i / 64 * 16 + i % 16] >> (i % 64 / 16 * 2) & 3u;
  return int2_value(code, low, high);
}

template <u32 codec>
struct Of;
template <>
struct Of<0> : Plain<0> {};
template <>
struct Of<1> : Plain<1> {};
template <>
struct Of<2> : Plain<2> {};
template <>
struct Of<3> : Int8 {};
template <>
struct Of<4> : E2m1 {};
template <>
struct Of<5> : E3m0 {};
template <>
struct Of<6> : Int2 {};

// Where tile `index` of a chunk of `elements` values lies.
template <u32 codec>
DT_HD Out place(u8* chunk, std::size_t elements, u32 index, u32* poison) {
  const Sections all = sections(codec, elements);
  const Sections before = sections(codec, static_cast<std::size_t>(index) * kValues);
  u8* const scales = chunk + all.codes;
  return {chunk + before.codes, scales + before.scales, scales + all.scales + before.exponents,
          poison};
}

}  // namespace decotrain::tile
