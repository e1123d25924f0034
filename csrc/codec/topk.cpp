// Top-k; see topk.h. One scalar implementation: passes over 4096 values that lie in L1.
#include "codec/topk.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>
#include <functional>

#include "codec/block.h"
#include "simd.h"

namespace decotrain {
namespace {

using namespace block;

constexpr int kRefinements = 2;  // of the border between the two levels

struct Layout {  // of one chunk: indices, values, two levels
  std::size_t kept;
  std::size_t index_bytes;
  std::size_t value_bytes;
  std::size_t bytes() const { return index_bytes + value_bytes + 2 * sizeof(u16); }
};

Layout layout(std::size_t elements, std::size_t k) {
  const std::size_t kept = std::min(elements, k);
  return {kept, (kept * 12 + 7) / 8, (kept * 2 + 7) / 8};
}

struct Chosen {
  std::array<u16, kTopkChunk> index;
  std::size_t count = 0;
};

// Orders by magnitude, and among equals the lowest index first.
std::uint64_t rank(std::span<const float> values, u32 i) {
  return std::uint64_t{magnitude(values[i])} << 16 | (0xffff - i);
}

// How often each value of a magnitude's upper bits is there: the exponent and three bits more.
class Histogram {
 public:
  static constexpr u32 kShift = 20;
  static constexpr u32 kBuckets = (kMagnitude >> kShift) + 1;

  explicit Histogram(std::span<const float> values) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      ++counts_[i % kWays][magnitude(values[i]) >> kShift];
    }
    for (u32 way = 1; way < kWays; ++way) {
      for (u32 b = 0; b < kBuckets; ++b) {
        counts_[0][b] = static_cast<u16>(counts_[0][b] + counts_[way][b]);
      }
    }
  }

  // The least magnitude of the bucket in which the count-th largest lies; count > 0.
  u32 floor_of(std::size_t count) const {
    u32 bucket = kBuckets - 1;
    std::size_t above = 0;
    while (above + counts_[0][bucket] < count) above += counts_[0][bucket--];
    return bucket << kShift;
  }

 private:
  static constexpr u32 kWays = 4;  // neighbours are alike: counting one waits for the one before
  std::array<std::array<u16, kBuckets>, kWays> counts_{};
};

// The `kept` largest magnitudes, lowest index first among equals; in ascending order of index. The
// histogram leaves few that must be compared.
void choose(std::span<const float> values, std::size_t kept, const Histogram& histogram,
            Chosen& out) {
  const u32 least = histogram.floor_of(kept);
  std::size_t count = 0;
  for (u32 i = 0; i < values.size(); ++i) {
    out.index[count] = static_cast<u16>(i);
    count += magnitude(values[i]) >= least ? 1 : 0;
  }
  std::array<std::uint64_t, kTopkChunk> ranks;
  for (std::size_t i = 0; i < count; ++i) ranks[i] = rank(values, out.index[i]);
  const auto last = ranks.begin() + (kept - 1);
  std::nth_element(ranks.begin(), last, ranks.begin() + count, std::greater<>());
  out.count = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const u16 index = out.index[i];
    out.index[out.count] = index;
    out.count += rank(values, index) >= *last ? 1 : 0;
  }
}

struct Levels {
  u16 low = 0;
  u16 high = 0;
  float border = 0.0f;  // of shrunk magnitudes
};

float mean(double sum, std::size_t count) {
  return static_cast<float>(sum / static_cast<double>(count));
}

// The mean first, then halfway between the means of both sides. Values that already lie on two
// levels come out as they are: encoding what was decoded changes nothing.
Levels place_levels(std::span<const float> values, const Chosen& chosen) {
  double sum = 0.0;  // 4096 values may add up to more than a float holds
  for (std::size_t i = 0; i < chosen.count; ++i) sum += int2_shrunk(values[chosen.index[i]]);
  Levels levels;
  levels.border = mean(sum, chosen.count);
  for (int step = 0; step <= kRefinements; ++step) {
    double below = 0.0;
    double above = 0.0;
    std::size_t above_count = 0;
    for (std::size_t i = 0; i < chosen.count; ++i) {
      const float y = int2_shrunk(values[chosen.index[i]]);
      const bool is_above = y >= levels.border;
      above_count += is_above ? 1 : 0;
      (is_above ? above : below) += y;
    }
    const std::size_t below_count = chosen.count - above_count;
    if (above_count > 0) levels.high = int2_level(mean(above, above_count), 1);
    levels.low = below_count == 0 ? levels.high : int2_level(mean(below, below_count), 1);
    if (above_count == 0) levels.high = levels.low;
    if (step == kRefinements || below_count == 0 || above_count == 0) break;
    levels.border = mul(add(mean(below, below_count), mean(above, above_count)), 0.5f);
  }
  return levels;
}

void put_index(u8* bytes, std::size_t i, u32 index) {
  u8* at = bytes + i / 2 * 3;
  if (i % 2 == 0) {
    at[0] = static_cast<u8>(index);
    at[1] = static_cast<u8>((u32{at[1]} & 0xf0) | index >> 8);
  } else {
    at[1] = static_cast<u8>((u32{at[1]} & 0x0f) | (index & 15) << 4);
    at[2] = static_cast<u8>(index >> 4);
  }
}

u32 get_index(const u8* bytes, std::size_t i) {
  const u8* at = bytes + i / 2 * 3;
  return i % 2 == 0 ? u32{at[0]} | (u32{at[1]} & 15u) << 8 : u32{at[1]} >> 4 | u32{at[2]} << 4;
}

bool encode_chunk(std::span<const float> values, const Layout& at, u8* out) {
  const Histogram histogram(values);
  static_assert((kInfinity | kTiny) % (1u << Histogram::kShift) == 0, "floors of buckets");
  const u32 largest = histogram.floor_of(1);
  if (largest >= kInfinity) return false;
  std::memset(out, 0, at.bytes());
  Chosen chosen;
  choose(values, at.kept, histogram, chosen);
  Levels levels;
  if (largest >= kTiny) levels = place_levels(values, chosen);
  u8* const codes = out + at.index_bytes;
  for (std::size_t i = 0; i < at.kept; ++i) {
    put_index(out, i, chosen.index[i]);
    const u32 code = largest < kTiny ? 0 : int2_code(values[chosen.index[i]], levels.border);
    codes[i / 4] = static_cast<u8>(codes[i / 4] | code << (i % 4 * 2));
  }
  const u16 pair[2] = {levels.low, levels.high};
  std::memcpy(codes + at.value_bytes, pair, sizeof pair);
  return true;
}

struct Pair {
  u16 low;
  u16 high;
};

Pair levels_of(const u8* chunk, const Layout& at) {
  u16 pair[2];
  std::memcpy(pair, chunk + at.index_bytes + at.value_bytes, sizeof pair);
  return {pair[0], pair[1]};
}

bool chunk_valid(const u8* chunk, const Layout& at, std::size_t elements) {
  const Pair levels = levels_of(chunk, at);
  bool ok = int2_ok(levels.low) && int2_ok(levels.high);
  std::size_t next = 0;  // indices ascend: none is there twice
  for (std::size_t i = 0; i < at.kept && ok; ++i) {
    const u32 index = get_index(chunk, i);
    ok = index >= next && index < elements;
    next = index + 1;
  }
  return ok;
}

// Calls each(chunk bytes, layout, first element, count); false as soon as one returns false.
template <typename Bytes, typename Each>
bool chunks(Bytes* bytes, std::size_t elements, std::size_t k, Each each) {
  for (std::size_t first = 0; first < elements; first += kTopkChunk) {
    const std::size_t count = std::min(kTopkChunk, elements - first);
    const Layout at = layout(count, k);
    if (!each(bytes, at, first, count)) return false;
    bytes += at.bytes();
  }
  return true;
}

}  // namespace

std::size_t topk_bytes(std::size_t elements, std::size_t k) {
  assert(k >= 1 && k <= kTopkChunk);
  const std::size_t rest = elements % kTopkChunk;
  const std::size_t whole = elements / kTopkChunk * layout(kTopkChunk, k).bytes();
  return whole + (rest > 0 ? layout(rest, k).bytes() : 0);
}

bool topk_encode(std::span<const float> values, std::size_t k, std::byte* out) {
  const ExactFloat exact;
  return chunks(reinterpret_cast<u8*>(out), values.size(), k,
                [&](u8* bytes, const Layout& at, std::size_t first, std::size_t count) {
                  return encode_chunk(values.subspan(first, count), at, bytes);
                });
}

bool topk_add(const std::byte* bytes, std::size_t k, float weight, std::span<float> total) {
  const ExactFloat exact;
  const auto* data = reinterpret_cast<const u8*>(bytes);
  const bool ok = chunks(data, total.size(), k,
                         [](const u8* chunk, const Layout& at, std::size_t, std::size_t count) {
                           return chunk_valid(chunk, at, count);
                         });
  return ok && chunks(data, total.size(), k,
                      [&](const u8* chunk, const Layout& at, std::size_t first, std::size_t) {
                        const Pair levels = levels_of(chunk, at);
                        const u8* codes = chunk + at.index_bytes;
                        for (std::size_t i = 0; i < at.kept; ++i) {
                          const u32 code = u32{codes[i / 4]} >> (i % 4 * 2) & 3u;
                          float& sum = total[first + get_index(chunk, i)];
                          sum = add(sum, mul(weight, int2_value(code, levels.low, levels.high)));
                        }
                        return true;
                      });
}

}  // namespace decotrain
