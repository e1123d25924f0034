// Top-k: of every 4096 values the k largest magnitudes, as 12-bit indices and 2-bit values.
//
// For the sparse family, whose payloads travel through `collect`: every peer gets all of them and
// adds them itself. Not a Codec: what comes back is sparse, and an owner could not combine it.
// docs/codecs.md has the layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace decotrain {

constexpr std::size_t kTopkChunk = 4096;  // indices of 12 bits

// 1 <= k <= kTopkChunk. Chunks shorter than k (the last one) keep all their values.
std::size_t topk_bytes(std::size_t elements, std::size_t k);

// False when a value is NaN or infinite.
bool topk_encode(std::span<const float> values, std::size_t k, std::byte* out);

// total[i] += weight * value[i]; false, and total is as before, when the bytes are no encoding.
bool topk_add(const std::byte* bytes, std::size_t k, float weight, std::span<float> total);

}  // namespace decotrain
