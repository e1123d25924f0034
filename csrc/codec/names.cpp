// Names of codecs, pairs of codecs and rules: the only place that parses them.
#include <array>

#include "codec/codec.h"

namespace decotrain {
namespace {

constexpr std::array<const char*, kCodecCount> kCodecs{"f32",  "bf16", "f16", "int8",
                                                       "e2m1", "e3m0", "int2"};
constexpr std::array<const char*, kRuleCount> kRules{"mean", "sum", "median", "trimmed_mean",
                                                     "norm_clip"};

template <typename Value, std::size_t count>
std::optional<Value> find(const std::array<const char*, count>& names, std::string_view name) {
  for (std::size_t i = 0; i < count; ++i) {
    if (name == names[i]) return static_cast<Value>(i);
  }
  return std::nullopt;
}

}  // namespace

const char* codec_name(Codec codec) { return kCodecs[static_cast<std::size_t>(codec)]; }
const char* rule_name(Rule rule) { return kRules[static_cast<std::size_t>(rule)]; }

std::optional<Codec> codec_named(std::string_view name) { return find<Codec>(kCodecs, name); }
std::optional<Rule> rule_named(std::string_view name) { return find<Rule>(kRules, name); }

std::optional<std::pair<Codec, Codec>> codec_pair_named(std::string_view name) {
  const std::size_t plus = name.find('+');
  const auto contribution = codec_named(name.substr(0, plus));
  const auto result =
      plus == std::string_view::npos ? contribution : codec_named(name.substr(plus + 1));
  if (!contribution || !result) return std::nullopt;
  return std::pair{*contribution, *result};
}

}  // namespace decotrain
