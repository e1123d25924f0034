// Codecs: how a chunk of float32 values becomes bytes and back (docs/codecs.md has the layouts).
//
// Every function is pure and gives the same bits on every CPU and GPU. Nothing here knows rounds,
// peers or where a residual is kept.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

namespace decotrain {

enum class Codec : std::uint8_t {
  f32 = 0,
  bf16 = 1,
  f16 = 2,
  int8 = 3,
  e2m1 = 4,
  e3m0 = 5,
  int2 = 6,
};
constexpr std::uint8_t kCodecCount = 7;

// How contributions to one chunk become one value.
enum class Rule : std::uint8_t { mean = 0, sum = 1, median = 2, trimmed_mean = 3, norm_clip = 4 };
constexpr std::uint8_t kRuleCount = 5;

// "int8" and so on; nothing when there is no such codec or rule.
const char* codec_name(Codec codec);
std::optional<Codec> codec_named(std::string_view name);
const char* rule_name(Rule rule);
std::optional<Rule> rule_named(std::string_view name);

// A pair "e2m1+int8": contributions and results; one name is both.
std::optional<std::pair<Codec, Codec>> codec_pair_named(std::string_view name);

// Bytes of `elements` encoded values. Exact: a frame of any other length is refused.
std::size_t encoded_bytes(Codec codec, std::size_t elements);

// Encodes; false when a value is NaN or infinite (out is then unspecified).
bool encode(Codec codec, std::span<const float> values, std::byte* out);

// Error feedback. Encodes y = values + residual (f32, or the bits of bf16); false when a sum is NaN
// or infinite. The residual is as before until keep_lost makes it y - decode(sent).
bool encode_fed(Codec codec, std::span<const float> values, std::span<const float> residual,
                std::byte* out);
bool encode_fed(Codec codec, std::span<const float> values, std::span<const std::uint16_t> residual,
                std::byte* out);
void keep_lost(Codec codec, std::span<const float> values, const std::byte* sent,
               std::span<float> residual);
void keep_lost(Codec codec, std::span<const float> values, const std::byte* sent,
               std::span<std::uint16_t> residual);

// Rounds each value up or down by chance, so that its mean is kept: int8, e2m1 and e3m0 only. The
// bits depend on the key, the stream (say, round << 32 | chunk) and the element's number alone.
bool has_stochastic(Codec codec);
bool encode_stochastic(Codec codec, std::span<const float> values, std::uint64_t key,
                       std::uint64_t stream, std::byte* out);

// Decodes exactly encoded_bytes(codec, out.size()) bytes; false when the bytes are no valid
// encoding (a NaN, an infinite or negative scale ...): out is then unspecified.
bool decode(Codec codec, const std::byte* bytes, std::span<float> out);

// False for a parameter the rule cannot use (trimmed_mean: the part cut at each end, below 0.5;
// norm_clip: the longest length allowed, as a multiple of the median length; others: ignored).
bool rule_valid(Rule rule, float parameter);

struct Contribution {
  const std::byte* bytes = nullptr;  // encoded_bytes(codec, elements)
  float weight = 1.0f;               // relative, > 0, already divided by the largest
};

// The owner's own error feedback: `before` (what earlier results lost, or null: nothing) is added
// to the combined value, and `after` (null: nobody wants it) is what this result loses.
struct OwnerFeedback {
  const float* before = nullptr;
  float* after = nullptr;
};

// Decodes all contributions and combines them in the order given, one pass over memory, into
// `result` (encoded with result_codec). Weights count for mean and norm_clip only. Contributions
// are finite (checked with `valid` on arrival). False when the combined value is not finite, or the
// rule is not valid.
bool combine(Rule rule, float rule_parameter, Codec codec, std::span<const Contribution> from,
             std::size_t elements, Codec result_codec, std::byte* result,
             OwnerFeedback feedback = {});

// True when the bytes are a valid encoding of finite values only.
bool valid(Codec codec, const std::byte* bytes, std::size_t elements);

// The CUDA kernels run on the CPU, thread by thread (codec/tile.h): slow, for tests of their bits.
bool encode_as_cuda(Codec codec, std::span<const float> values, std::byte* out);
bool decode_as_cuda(Codec codec, const std::byte* bytes, std::span<float> out);

}  // namespace decotrain
