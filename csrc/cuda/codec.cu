// Codecs on a GPU: codec/tile.h with barriers. One thread block makes one tile of one chunk.
//
// A buffer of `elements` values is cut into chunks of chunk_elements (the last is shorter); chunk c
// lies encoded at c * encoded bytes of a whole chunk. Grid: (tiles of a whole chunk, chunks).
// Compiled by nvcc in scripts/check.sh and by NVRTC, through decotrain/cuda.py, at run time.
#include "codec/tile.h"

using namespace decotrain;
using block::u32;
using block::u8;
using u64 = std::uint64_t;

namespace {

struct Work {
  u64 begin;  // of the tile, in the buffer
  u32 count;  // values of the tile, 0: nothing to do
  tile::Out out;
};

template <u32 codec>
__device__ Work work(u8* bytes, u64 elements, u32 chunk_elements, u32* poison) {
  const u64 chunk_begin = static_cast<u64>(blockIdx.y) * chunk_elements;
  const u64 left = elements - chunk_begin;
  const u32 chunk = left < chunk_elements ? static_cast<u32>(left) : chunk_elements;
  const u32 tile_begin = blockIdx.x * tile::kValues;
  if (tile_begin >= chunk) return {0, 0, {}};
  const block::Sections whole = block::sections(codec, chunk_elements);
  u8* const at = bytes + blockIdx.y * (whole.codes + whole.scales + whole.exponents);
  const u32 rest = chunk - tile_begin;
  return {chunk_begin + tile_begin, rest < tile::kValues ? rest : tile::kValues,
          tile::place<codec>(at, chunk, blockIdx.x, poison)};
}

template <u32 codec>
__device__ void encode(const float* values, u64 elements, u32 chunk_elements, u8* bytes,
                       u32* poison) {
  __shared__ tile::Tile shared;
  const Work w = work<codec>(bytes, elements, chunk_elements, poison);
  if (w.count == 0) return;
  tile::fetch(shared, threadIdx.x, values + w.begin, w.count);
#pragma unroll
  for (u32 phase = 0; phase < tile::Of<codec>::kPhases; ++phase) {
    __syncthreads();
    tile::Of<codec>::phase(phase, shared, threadIdx.x, w.count, w.out);
  }
}

template <u32 codec>
__device__ void decode(const u8* bytes, u64 elements, u32 chunk_elements, float* values,
                       u32* poison) {
  const Work w = work<codec>(const_cast<u8*>(bytes), elements, chunk_elements, poison);
  for (u32 i = threadIdx.x; i < w.count; i += tile::kThreads) {
    bool ok = true;
    const tile::Out& from = w.out;
    values[w.begin + i] = tile::decoded<codec>(from.codes, from.scales, from.exponents, i, ok);
    if (!ok) *poison = 1;
  }
}

}  // namespace

#define DT_KERNELS(name, codec)                                                        \
  extern "C" __global__ void __launch_bounds__(256) encode_##name(                     \
      const float* values, u64 elements, u32 chunk_elements, u8* bytes, u32* poison) { \
    encode<codec>(values, elements, chunk_elements, bytes, poison);                    \
  }                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) decode_##name(                     \
      const u8* bytes, u64 elements, u32 chunk_elements, float* values, u32* poison) { \
    decode<codec>(bytes, elements, chunk_elements, values, poison);                    \
  }

DT_KERNELS(f32, 0)
DT_KERNELS(bf16, 1)
DT_KERNELS(f16, 2)
DT_KERNELS(int8, 3)
DT_KERNELS(e2m1, 4)
DT_KERNELS(e3m0, 5)
DT_KERNELS(int2, 6)
