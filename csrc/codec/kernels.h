// The inner loops of the codecs, one table of functions for each SIMD level.
//
// A table works on parts: `elements` values that start at a multiple of kPart within a chunk (or
// the chunk's end, for the last part). Where a part's bytes lie is `place`'s business.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/block.h"
#include "codec/codec.h"

namespace decotrain {

using block::u8;

constexpr std::size_t kPart = 1024;  // a multiple of every block size

// The encoded bytes of one part. Sections a codec does not have are empty.
struct Place {
  u8* codes = nullptr;
  u8* scales = nullptr;
  u8* exponents = nullptr;  // e2m1: one for each group
};

// `bytes` encode a chunk of `elements`; begin is a multiple of kPart.
Place place(Codec codec, std::byte* bytes, std::size_t elements, std::size_t begin);

// Uniform numbers of stochastic rounding. Value i of a chunk has word i / 16 % 4 of Philox with the
// counter (i / 64 * 16 + i % 16, stream): four calls at once fill 16 lanes.
struct Chance {
  std::uint64_t key = 0;
  std::uint64_t stream = 0;
};

struct Kernels {
  // False: a value is NaN or infinite.
  bool (*encode[kCodecCount])(const float* values, std::size_t elements, const Place& out);
  // False (f32, bf16, f16): a value is NaN or infinite. Scales have been checked.
  bool (*decode[kCodecCount])(const Place& in, std::size_t elements, float* values);
  // total[i] = weight * value[i] when first, else total[i] + weight * value[i].
  void (*accumulate[kCodecCount])(const Place& in, std::size_t elements, float weight, bool first,
                                  float* total);
  // Chooses the codes of a part anew by chance, whose scales and nearest codes are there. `first`
  // is its first value's number in the chunk. Null: this codec has none.
  void (*choose[kCodecCount])(const float* values, std::size_t elements, std::uint64_t first,
                              const Chance& chance, const Place& out);
  // out[i] = factor * (weights[0] * from[0][i] + weights[1] * from[1][i] + ...), count > 0 terms,
  // in one pass. False: a value of `out` is NaN or infinite.
  bool (*combine_f32)(const float* const* from, const float* weights, std::size_t count,
                      float factor, std::size_t elements, float* out);
  // Copies past the cache, for what is not read again soon. False: a value is NaN or infinite.
  bool (*stream_f32)(const float* values, std::size_t elements, float* out);
  // False: a value is NaN or infinite.
  bool (*finite_f32)(const float* values, std::size_t elements);
};

extern const Kernels kScalarKernels;

// Zeroes what lies between the codes and the scales of a chunk, which no kernel writes.
void clear_padding(Codec codec, std::byte* bytes, std::size_t elements);

// The table of the SIMD level in use (simd.h).
const Kernels& kernels();

}  // namespace decotrain
