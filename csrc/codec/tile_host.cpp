// The CUDA kernels' phases, run on the CPU thread by thread: for tests, never for speed.
#include <algorithm>
#include <array>

#include "codec/codec.h"
#include "codec/tile.h"
#include "simd.h"

namespace decotrain {
namespace {

using tile::kThreads;
using tile::kValues;

template <block::u32 codec>
bool encode_tiles(std::span<const float> values, block::u8* out) {
  block::u32 poison = 0;
  tile::Tile shared;
  for (std::size_t begin = 0; begin < values.size(); begin += kValues) {
    const auto count =
        static_cast<block::u32>(std::min<std::size_t>(kValues, values.size() - begin));
    const auto index = static_cast<block::u32>(begin / kValues);
    const tile::Out where = tile::place<codec>(out, values.size(), index, &poison);
    for (block::u32 t = 0; t < kThreads; ++t) tile::fetch(shared, t, values.data() + begin, count);
    for (block::u32 phase = 0; phase < tile::Of<codec>::kPhases; ++phase) {
      for (block::u32 t = 0; t < kThreads; ++t) {
        tile::Of<codec>::phase(phase, shared, t, count, where);
      }
    }
  }
  return poison == 0;
}

template <block::u32 codec>
bool decode_tiles(const block::u8* in, std::span<float> values) {
  bool all = true;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const tile::Out from = tile::place<codec>(const_cast<block::u8*>(in), values.size(),
                                              static_cast<block::u32>(i / kValues), nullptr);
    bool ok = true;
    values[i] = tile::decoded<codec>(from.codes, from.scales, from.exponents, i % kValues, ok);
    all = all && ok;
  }
  return all;
}

constexpr std::array kEncode{encode_tiles<0>, encode_tiles<1>, encode_tiles<2>, encode_tiles<3>,
                             encode_tiles<4>, encode_tiles<5>, encode_tiles<6>};
constexpr std::array kDecode{decode_tiles<0>, decode_tiles<1>, decode_tiles<2>, decode_tiles<3>,
                             decode_tiles<4>, decode_tiles<5>, decode_tiles<6>};

}  // namespace

bool encode_as_cuda(Codec codec, std::span<const float> values, std::byte* out) {
  const ExactFloat exact;
  return kEncode[static_cast<std::size_t>(codec)](values, reinterpret_cast<block::u8*>(out));
}

bool decode_as_cuda(Codec codec, const std::byte* bytes, std::span<float> out) {
  const ExactFloat exact;
  return kDecode[static_cast<std::size_t>(codec)](reinterpret_cast<const block::u8*>(bytes), out);
}

}  // namespace decotrain
