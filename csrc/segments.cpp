// Between the caller's buffers and encoded chunks, chunk by chunk so that the pieces stay in cache.
#include "segments.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "buffers.h"
#include "codec/kernels.h"

namespace decotrain {
namespace {

// Calls use(segment, offset in it, offset in the span, count) for each piece of the span.
template <typename Use>
void for_pieces(const Segments& segments, std::size_t first, std::size_t count, Use use) {
  std::size_t start = 0, done = 0;
  for (const Segment& segment : segments) {
    const std::size_t end = start + segment.elements;
    if (first + done < end && done < count) {
      const std::size_t offset = first + done - start;
      const std::size_t n = std::min(count - done, segment.elements - offset);
      use(segment, offset, done, n);
      done += n;
    }
    start = end;
  }
}

// Buffers above this do not fit a cache; writing them past it saves reading them first.
constexpr std::size_t kStreamBytes = std::size_t{8} << 20;
// Borrowed buffers above this are not looked through for NaN: a pass of its own over memory would
// cost a tenth of the round.
constexpr std::size_t kLookLaterBytes = std::size_t{2} << 20;

// Copies floats past the cache; false when one is not finite.
bool copy_past_cache(std::span<const float> from, std::byte* to) {
  return kernels().stream_f32(from.data(), from.size(), reinterpret_cast<float*>(to));
}

// The floats themselves when one f32 segment covers the span.
float* in_place(const Segments& segments, std::size_t first, std::size_t count) {
  std::size_t start = 0;
  for (const Segment& segment : segments) {
    if (first >= start && first + count <= start + segment.elements) {
      if (segment.type != Codec::f32) return nullptr;
      return reinterpret_cast<float*>(segment.data) + (first - start);
    }
    start += segment.elements;
  }
  return nullptr;
}

// The segment of the first sum that is not finite.
std::size_t first_bad_sum(const Segments& segments, std::size_t first,
                          std::span<const float> values, std::span<const float> kept) {
  std::size_t bad = 0;
  while (bad + 1 < values.size() && std::isfinite(values[bad] + kept[bad])) ++bad;
  std::size_t which = 0;
  for (std::size_t end = 0; which + 1 < segments.size(); ++which) {
    end += segments[which].elements;
    if (first + bad < end) break;
  }
  return which;
}

}  // namespace

std::size_t element_bytes(Codec type) { return type == Codec::f32 ? 4 : 2; }

std::size_t total_elements(const Segments& segments) {
  std::size_t total = 0;
  for (const Segment& segment : segments) total += segment.elements;
  return total;
}

std::span<const float> gather(const Segments& segments, std::size_t first, std::size_t count,
                              std::vector<float>& scratch) {
  if (const float* here = in_place(segments, first, count)) return {here, count};
  scratch.resize(count);
  for_pieces(segments, first, count,
             [&](const Segment& segment, std::size_t offset, std::size_t at, std::size_t n) {
               const std::byte* from = segment.data + offset * element_bytes(segment.type);
               // A value that is not finite is found by encode, on the whole chunk.
               if (!decode(segment.type, from, {scratch.data() + at, n})) {
                 scratch[at] = std::numeric_limits<float>::quiet_NaN();
               }
             });
  return {scratch.data(), count};
}

bool scatter(const Segments& segments, std::size_t first, std::span<const float> values) {
  bool fits = true;
  for_pieces(segments, first, values.size(),
             [&](const Segment& segment, std::size_t offset, std::size_t at, std::size_t n) {
               std::byte* to = segment.data + offset * element_bytes(segment.type);
               fits = encode(segment.type, values.subspan(at, n), to) && fits;
             });
  return fits;
}

std::size_t first_not_finite(const Segments& segments) {
  for (std::size_t i = 0; i < segments.size(); ++i) {
    if (!valid(segments[i].type, segments[i].data, segments[i].elements)) return i;
  }
  return segments.size();
}

Snapshot encode_segments(const RoundSpec& spec, const Segments& segments, const Segments& residual,
                         bool borrow, const std::shared_ptr<const void>& owner,
                         std::optional<std::uint64_t> chance) {
  const bool feedback = !residual.empty();
  if (borrow && !feedback && segments.size() == 1 && segments[0].type == Codec::f32 &&
      spec.contribution == Codec::f32) {
    const std::byte* const here = segments[0].data;
    const std::size_t elements = segments[0].elements;
    if (elements * sizeof(float) > kLookLaterBytes) return {here, owner, false};
    if (!valid(Codec::f32, here, elements)) throw NotFinite{0};
    return {here, owner};
  }
  const std::uint32_t chunks = chunk_count(spec);
  const std::size_t bytes = round_bytes(spec, spec.contribution);
  const std::shared_ptr<std::byte[]> out = allocate(bytes);
  const bool past_cache = spec.contribution == Codec::f32 && bytes >= kStreamBytes;
  std::vector<float> scratch, back;
  std::size_t at = 0, first = 0;
  for (std::uint32_t i = 0; i < chunks; ++i) {
    const std::size_t n = chunk_elements(spec, i);
    const std::span<const float> values = gather(segments, first, n, scratch);
    if (feedback) {
      const std::span<const float> kept = gather(residual, first, n, back);
      if (!encode_fed(spec.contribution, values, kept, out.get() + at)) {
        throw NotFinite{first_bad_sum(segments, first, values, kept)};
      }
    } else if (!(past_cache ? copy_past_cache(values, out.get() + at)
                 : chance ? encode_stochastic(spec.contribution, values, *chance, i, out.get() + at)
                          : encode(spec.contribution, values, out.get() + at))) {
      throw NotFinite{first_not_finite(segments)};
    }
    at += encoded_bytes(spec.contribution, n);
    first += n;
  }
  return {out.get(), out};
}

void keep_lost(const RoundSpec& spec, const Segments& segments, const Segments& residual,
               const std::byte* sent) {
  std::vector<float> scratch, back;
  std::size_t first = 0;
  for (std::uint32_t i = 0; i < chunk_count(spec); ++i) {
    const std::size_t n = chunk_elements(spec, i);
    const std::span<const float> values = gather(segments, first, n, scratch);
    float* const here = in_place(residual, first, n);
    if (here == nullptr) gather(residual, first, n, back);
    const std::span<float> kept{here != nullptr ? here : back.data(), n};
    keep_lost(spec.contribution, values, sent, kept);
    if (here == nullptr) scatter(residual, first, kept);
    sent += encoded_bytes(spec.contribution, n);
    first += n;
  }
}

void decode_segments(const RoundResult& result, const Segments& segments) {
  const std::size_t total = total_elements(segments);
  if (result.spec.op == Op::collect || total != result.spec.elements) {
    throw std::invalid_argument("the buffers have " + std::to_string(total) +
                                " elements, the result has " +
                                std::to_string(result.spec.elements));
  }
  const bool past_cache = result.spec.result == Codec::f32 && total * sizeof(float) >= kStreamBytes;
  std::vector<float> scratch;
  std::size_t first = 0;
  for (std::uint32_t i = 0; i < result.chunks.size(); ++i) {
    const std::size_t n = chunk_elements(result.spec, i);
    float* here = in_place(segments, first, n);
    std::span<float> values;
    if (here != nullptr) {
      values = {here, n};
    } else {
      scratch.resize(n);
      values = scratch;
    }
    if (result.chunk_bytes[i] == 0) {
      std::fill(values.begin(), values.end(), 0.0f);
    } else if (!(past_cache && here != nullptr
                     ? copy_past_cache({reinterpret_cast<const float*>(result.chunks[i]), n},
                                       reinterpret_cast<std::byte*>(here))
                     : decode(result.spec.result, result.chunks[i], values))) {
      throw std::runtime_error("chunk " + std::to_string(i) + " of the result cannot be decoded");
    }
    if (here == nullptr && !scatter(segments, first, values)) {
      throw std::runtime_error("chunk " + std::to_string(i) +
                               " of the result does not fit the buffer's element type");
    }
    first += n;
  }
}

}  // namespace decotrain
