// Combining contributions at the owner: part by part, so that what is decoded stays in the cache
// and memory is passed once (norm_clip: twice, the norms come first).
//
// All arithmetic is f32 in the order given, without fused multiply-add. Who contributes, in which
// order and with which weight is the engine's business.
#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstring>
#include <vector>

#include "codec/kernels.h"
#include "simd.h"

namespace decotrain {
namespace {

constexpr std::size_t kSegment = 4 * kPart;  // 16 KiB of totals: half of a first-level cache

// So many contributions are read side by side. Memory of one size tends to lie at the same place of
// its page, and a first-level cache holds eight lines of each such place.
constexpr std::size_t kStreams = 8;

using From = std::span<const Contribution>;

struct Job {
  Rule rule;
  float parameter;
  Codec codec;
  Codec result_codec;
  std::size_t elements;
  std::byte* result;
  OwnerFeedback feedback;

  Place from(const Contribution& one, std::size_t begin) const {
    return place(codec, const_cast<std::byte*>(one.bytes), elements, begin);
  }
  bool store(const float* values, std::size_t begin, std::size_t count) const {
    const auto index = static_cast<std::size_t>(result_codec);
    const Place to = place(result_codec, result, elements, begin);
    std::array<float, kSegment> fed;
    if (feedback.before != nullptr) {
      for (std::size_t i = 0; i < count; ++i) fed[i] = values[i] + feedback.before[begin + i];
      values = fed.data();
    }
    if (!kernels().encode[index](values, count, to)) return false;
    if (feedback.after == nullptr) return true;
    float* const lost = feedback.after + begin;
    if (!kernels().decode[index](to, count, lost)) return false;
    for (std::size_t i = 0; i < count; ++i) lost[i] = values[i] - lost[i];
    return true;
  }
};

// f32 to f32. The total so far is one more stream, whose weight changes nothing.
bool combine_plain(const Job& job, From from, std::span<const float> weights, float factor) {
  const auto add_up = kernels().combine_f32;
  std::array<const float*, kStreams> at;
  std::array<float, kStreams> weight;
  const std::size_t segment = from.size() <= kStreams ? job.elements : kSegment;
  for (std::size_t begin = 0; begin < job.elements; begin += segment) {
    const std::size_t count = std::min(segment, job.elements - begin);
    float* const total = reinterpret_cast<float*>(job.result) + begin;
    for (std::size_t k = 0; k < from.size();) {
      std::size_t streams = 0;
      if (k > 0) {
        at[streams] = total;
        weight[streams++] = 1.0f;
      }
      for (; k < from.size() && streams < kStreams; ++k) {
        at[streams] = reinterpret_cast<const float*>(from[k].bytes) + begin;
        weight[streams++] = weights[k];
      }
      const float last = k == from.size() ? factor : 1.0f;
      if (!add_up(at.data(), weight.data(), streams, last, count, total)) return false;
    }
  }
  return true;
}

// weights: factors of each contribution; the total is multiplied by `factor` at the end.
bool combine_linear(const Job& job, From from, std::span<const float> weights, float factor) {
  const bool fed = job.feedback.before != nullptr || job.feedback.after != nullptr;
  if (job.codec == Codec::f32 && job.result_codec == Codec::f32 && !fed) {
    return combine_plain(job, from, weights, factor);
  }
  std::array<float, kSegment> total;
  const auto accumulate = kernels().accumulate[static_cast<std::size_t>(job.codec)];
  for (std::size_t begin = 0; begin < job.elements; begin += kSegment) {
    const std::size_t count = std::min(kSegment, job.elements - begin);
    for (std::size_t k = 0; k < from.size(); ++k) {
      accumulate(job.from(from[k], begin), count, weights[k], k == 0, total.data());
    }
    if (factor != 1.0f) {
      for (std::size_t i = 0; i < count; ++i) total[i] *= factor;
    }
    if (!job.store(total.data(), begin, count)) return false;
  }
  return true;
}

// Puts each column of rows in ascending order: Batcher's odd-even merge sort, every
// comparator on whole rows. The comparison is written out so that zeros of either sign and the
// compiler's choice of min instruction make no difference.
void sort_columns(std::vector<float>& rows, std::size_t n) {
  const auto exchange = [&rows](std::size_t a, std::size_t b) {
    float* low = rows.data() + a * kPart;
    float* high = rows.data() + b * kPart;
    for (std::size_t i = 0; i < kPart; ++i) {
      const float x = low[i];
      const float y = high[i];
      low[i] = y < x ? y : x;
      high[i] = y < x ? x : y;
    }
  };
  for (std::size_t p = 1; p < n; p *= 2) {
    for (std::size_t k = p; k >= 1; k /= 2) {
      for (std::size_t j = k % p; j + k < n; j += 2 * k) {
        for (std::size_t i = 0; i < std::min(k, n - j - k); ++i) {
          if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) exchange(i + j, i + j + k);
        }
      }
    }
  }
}

// The mean of the sorted rows first .. last-1, added in ascending order.
bool combine_sorted(const Job& job, From from, std::size_t first, std::size_t last) {
  std::vector<float> rows(from.size() * kPart, 0.0f);
  const auto decode_part = kernels().decode[static_cast<std::size_t>(job.codec)];
  const float share = 1.0f / static_cast<float>(last - first);
  for (std::size_t begin = 0; begin < job.elements; begin += kPart) {
    const std::size_t count = std::min(kPart, job.elements - begin);
    for (std::size_t k = 0; k < from.size(); ++k) {
      if (!decode_part(job.from(from[k], begin), count, rows.data() + k * kPart)) return false;
    }
    sort_columns(rows, from.size());
    float* total = rows.data() + first * kPart;
    for (std::size_t i = 0; i < count; ++i) total[i] *= share;
    for (std::size_t k = first + 1; k < last; ++k) {
      const float* row = rows.data() + k * kPart;
      for (std::size_t i = 0; i < count; ++i) total[i] += row[i] * share;
    }
    if (!job.store(total, begin, count)) return false;
  }
  return true;
}

// The length of a contribution to this chunk: f64, in 16 strided lanes added in order.
double norm(const Job& job, const Contribution& one) {
  std::array<float, kPart> values;
  std::array<double, block::kLanes> lanes{};
  const auto decode_part = kernels().decode[static_cast<std::size_t>(job.codec)];
  for (std::size_t begin = 0; begin < job.elements; begin += kPart) {
    const std::size_t count = std::min(kPart, job.elements - begin);
    values.fill(0.0f);
    decode_part(job.from(one, begin), count, values.data());
    for (std::size_t i = 0; i < kPart; i += lanes.size()) {
      for (std::size_t lane = 0; lane < lanes.size(); ++lane) {
        const double value = values[i + lane];
        lanes[lane] += value * value;
      }
    }
  }
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  return std::sqrt(sum);
}

// Shortens contributions longer than parameter times the (lower) median length.
void clip_weights(const Job& job, From from, std::vector<float>& weights) {
  std::vector<double> norms;
  for (const Contribution& one : from) norms.push_back(norm(job, one));
  std::vector<double> sorted = norms;
  std::ranges::sort(sorted);
  const double limit = static_cast<double>(job.parameter) * sorted[(sorted.size() - 1) / 2];
  for (std::size_t k = 0; k < from.size(); ++k) {
    if (norms[k] > limit) weights[k] *= static_cast<float>(limit / norms[k]);
  }
}

bool combine_mean(const Job& job, From from) {
  std::vector<float> weights;
  double sum = 0.0;
  for (const Contribution& one : from) {
    weights.push_back(one.weight);
    sum += static_cast<double>(one.weight);
  }
  if (job.rule == Rule::norm_clip) clip_weights(job, from, weights);
  return combine_linear(job, from, weights, static_cast<float>(1.0 / sum));
}

}  // namespace

bool rule_valid(Rule rule, float parameter) {
  if (rule == Rule::trimmed_mean) return parameter >= 0.0f && parameter < 0.5f;
  if (rule == Rule::norm_clip) return parameter > 0.0f && std::isfinite(parameter);
  return static_cast<std::uint8_t>(rule) < kRuleCount;
}

bool combine(Rule rule, float rule_parameter, Codec codec, std::span<const Contribution> from,
             std::size_t elements, Codec result_codec, std::byte* result, OwnerFeedback feedback) {
  if (from.empty() || !rule_valid(rule, rule_parameter)) return false;
  if (elements == 0) return true;
  const ExactFloat exact;
  const Job job{rule, rule_parameter, codec, result_codec, elements, result, feedback};
  clear_padding(result_codec, result, elements);
  const std::size_t n = from.size();
  if (rule == Rule::sum) return combine_linear(job, from, std::vector<float>(n, 1.0f), 1.0f);
  if (rule == Rule::median) return combine_sorted(job, from, (n - 1) / 2, n / 2 + 1);
  if (rule == Rule::trimmed_mean) {
    const auto trimmed = static_cast<std::size_t>(rule_parameter * static_cast<float>(n));
    return combine_sorted(job, from, trimmed, n - trimmed);
  }
  return combine_mean(job, from);
}

}  // namespace decotrain
