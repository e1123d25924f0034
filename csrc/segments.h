// Segments: the caller's buffers (f32, bf16 or f16, any number of them) as one flat space of
// floats, and the way between that space and encoded chunks.
//
// Everything here runs on the caller's thread. It knows codecs; it does not know rounds' states.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine.h"

namespace decotrain {

struct Segment {
  Codec type = Codec::f32;  // f32, bf16 or f16: element types that are codecs as well
  std::byte* data = nullptr;
  std::size_t elements = 0;
};
using Segments = std::vector<Segment>;

std::size_t element_bytes(Codec type);
std::size_t total_elements(const Segments& segments);

// A span of the flat space, as floats: in place where one f32 segment covers it, else in `scratch`.
std::span<const float> gather(const Segments& segments, std::size_t first, std::size_t count,
                              std::vector<float>& scratch);
// False when a value does not fit the type of its segment (f16).
bool scatter(const Segments& segments, std::size_t first, std::span<const float> values);

// Which segment has the first NaN or infinity; segments.size() when none has.
std::size_t first_not_finite(const Segments& segments);

// The encoded contribution. Throws NotFinite. With `borrow` the bytes of one f32 segment are used
// in place when the codec allows; large ones are not looked through here (Snapshot::finite).
// `residual` (empty or of the same length) is error feedback: segments + residual is encoded.
// Nothing of the caller's is written to: that is keep_lost's part, when the round has taken it.
// `chance`: a key for stochastic rounding, another one for each round and peer; without a residual
// and for codecs that have it.
Snapshot encode_segments(const RoundSpec& spec, const Segments& segments, const Segments& residual,
                         bool borrow, const std::shared_ptr<const void>& owner,
                         std::optional<std::uint64_t> chance = {});

// residual = segments + residual - decode(sent). Of a residual of bf16 or f16 the nearest.
void keep_lost(const RoundSpec& spec, const Segments& segments, const Segments& residual,
               const std::byte* sent);

// The result into the caller's segments; a chunk to which nobody contributed gives zeros.
void decode_segments(const RoundResult& result, const Segments& segments);

struct NotFinite : std::exception {
  explicit NotFinite(std::size_t which) : segment(which) {}
  const char* what() const noexcept override { return "a value is not finite"; }
  std::size_t segment;
};

}  // namespace decotrain
