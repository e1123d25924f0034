// Bytes of headers and round specifications; docs/wire.md is the specification.
//
// Everything is written byte by byte in little-endian order, so that neither padding nor the
// machine's byte order can reach the wire.
#include "wire.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "simd.h"

#define XXH_INLINE_ALL
#include "xxhash.h"

namespace decotrain {
namespace {

template <class T>
void put(std::byte* at, T value) {
  if constexpr (std::endian::native == std::endian::big) {
    for (std::size_t i = 0; i < sizeof(T); ++i) at[i] = std::byte(value >> (8 * i));
  } else {
    std::memcpy(at, &value, sizeof(T));
  }
}

template <class T>
T get(const std::byte* at) {
  T value = 0;
  if constexpr (std::endian::native == std::endian::big) {
    for (std::size_t i = 0; i < sizeof(T); ++i) value |= T(std::to_integer<T>(at[i]) << (8 * i));
  } else {
    std::memcpy(&value, at, sizeof(T));
  }
  return value;
}

bool slot_or_none(std::uint8_t slot) { return slot < kMaxPeers || slot == kNoSlot; }

}  // namespace

void write(const Header& h, std::span<std::byte, kHeaderBytes> out) {
  std::byte* p = out.data();
  put(p, kMagic);
  put(p + 4, static_cast<std::uint8_t>(h.type));
  put(p + 5, h.flags);
  put(p + 6, h.src);
  put(p + 7, h.dst);
  put(p + 8, h.view);
  put(p + 16, h.tag);
  put(p + 20, h.chunk);
  put(p + 24, h.seq);
  put(p + 32, h.payload_bytes);
  put(p + 36, h.spec_digest);
  put(p + 40, h.a);
  put(p + 48, h.b);
  put(p + 56, h.c);
}

bool may_be_short(FrameType type) {
  return type != FrameType::hello && type != FrameType::ping && type != FrameType::pong &&
         type != FrameType::memory && type != FrameType::returned;
}

std::size_t shorten(const HeaderBytes& header, const HeaderBytes& base, HeaderBytes& out) {
  std::uint64_t differs = 0;
  for (std::size_t i = 0; i < kHeaderBytes; ++i) {
    differs |= std::uint64_t{header[i] != base[i]} << i;
  }
  const auto count = static_cast<std::size_t>(std::popcount(differs));
  if (kShortHeaderBytes + count >= kHeaderBytes) {
    out = header;
    return kHeaderBytes;
  }
  out[0] = kShortMark;
  out[1] = header[4];
  put(out.data() + 2, differs);
  std::size_t at = kShortHeaderBytes;
  for (std::uint64_t left = differs; left != 0; left &= left - 1) {
    out[at++] = header[static_cast<std::size_t>(std::countr_zero(left))];
  }
  return at;
}

std::size_t header_bytes(std::span<const std::byte> front) {
  if (front.empty()) return 0;
  if (front[0] != kShortMark) return kHeaderBytes;
  if (front.size() < kShortHeaderBytes) return 0;
  const auto differs = get<std::uint64_t>(front.data() + 2);
  return kShortHeaderBytes + static_cast<std::size_t>(std::popcount(differs));
}

std::uint8_t type_of(std::span<const std::byte> header) {
  return std::to_integer<std::uint8_t>(header[header[0] == kShortMark ? 1 : 4]);
}

HeaderBytes lengthen(std::span<const std::byte> header, const HeaderBytes& base) {
  HeaderBytes whole = base;
  if (header[0] != kShortMark) {
    std::memcpy(whole.data(), header.data(), kHeaderBytes);
    return whole;
  }
  std::size_t at = kShortHeaderBytes;
  for (auto left = get<std::uint64_t>(header.data() + 2); left != 0; left &= left - 1) {
    whole[static_cast<std::size_t>(std::countr_zero(left))] = header[at++];
  }
  return whole;
}

std::optional<Header> parse(std::span<const std::byte, kHeaderBytes> bytes) {
  const std::byte* p = bytes.data();
  if (get<std::uint32_t>(p) != kMagic) return std::nullopt;
  const auto type = get<std::uint8_t>(p + 4);
  if (type < static_cast<std::uint8_t>(FrameType::hello) ||
      type > static_cast<std::uint8_t>(kLastFrameType)) {
    return std::nullopt;
  }
  Header h;
  h.type = static_cast<FrameType>(type);
  h.flags = get<std::uint8_t>(p + 5);
  h.src = get<std::uint8_t>(p + 6);
  h.dst = get<std::uint8_t>(p + 7);
  h.view = get<std::uint64_t>(p + 8);
  h.tag = get<std::uint32_t>(p + 16);
  h.chunk = get<std::uint32_t>(p + 20);
  h.seq = get<std::uint64_t>(p + 24);
  h.payload_bytes = get<std::uint32_t>(p + 32);
  h.spec_digest = get<std::uint32_t>(p + 36);
  h.a = get<std::uint64_t>(p + 40);
  h.b = get<std::uint64_t>(p + 48);
  h.c = get<std::uint64_t>(p + 56);
  if ((h.flags & ~kFlagsKnown) != 0) return std::nullopt;
  if (!slot_or_none(h.src) || !slot_or_none(h.dst)) return std::nullopt;
  if (h.payload_bytes > kMaxChunkBytes) return std::nullopt;
  return h;
}

#if defined(__x86_64__)
std::uint64_t digest_avx2(const void* bytes, std::size_t count);
std::uint64_t digest_avx512(const void* bytes, std::size_t count);
#endif

std::uint64_t digest(std::span<const std::byte> bytes) {
#if defined(__x86_64__)
  constexpr std::size_t kLong = 1024;  // wide registers pay from about here
  if (bytes.size() >= kLong) {
    if (simd() == Simd::avx512) return digest_avx512(bytes.data(), bytes.size());
    if (simd() == Simd::avx2) return digest_avx2(bytes.data(), bytes.size());
  }
#endif
  return XXH3_64bits(bytes.data(), bytes.size());
}

std::array<std::byte, kSpecBytes> pack(const RoundSpec& spec) {
  std::array<std::byte, kSpecBytes> out{};
  std::byte* p = out.data();
  put(p, static_cast<std::uint8_t>(spec.op));
  put(p + 1, static_cast<std::uint8_t>(spec.rule));
  put(p + 2, static_cast<std::uint8_t>(spec.contribution));
  put(p + 3, static_cast<std::uint8_t>(spec.result));
  put(p + 4, std::bit_cast<std::uint32_t>(spec.rule_parameter));
  put(p + 8, spec.elements);
  put(p + 16, spec.chunk_elements);
  put(p + 20, spec.ahead);
  return out;
}

std::optional<RoundSpec> unpack_spec(std::span<const std::byte> bytes) {
  if (bytes.size() != kSpecBytes) return std::nullopt;
  const std::byte* p = bytes.data();
  const auto op = get<std::uint8_t>(p);
  const auto rule = get<std::uint8_t>(p + 1);
  const auto contribution = get<std::uint8_t>(p + 2);
  const auto result = get<std::uint8_t>(p + 3);
  if (op > static_cast<std::uint8_t>(Op::collect) || rule >= kRuleCount ||
      contribution >= kCodecCount || result >= kCodecCount ||
      get<std::uint32_t>(p + 20) > kMaxAhead) {
    return std::nullopt;
  }
  RoundSpec spec;
  spec.op = static_cast<Op>(op);
  spec.rule = static_cast<Rule>(rule);
  spec.contribution = static_cast<Codec>(contribution);
  spec.result = static_cast<Codec>(result);
  spec.rule_parameter = std::bit_cast<float>(get<std::uint32_t>(p + 4));
  spec.elements = get<std::uint64_t>(p + 8);
  spec.chunk_elements = get<std::uint32_t>(p + 16);
  spec.ahead = get<std::uint8_t>(p + 20);
  if (*fault(spec) != '\0') return std::nullopt;
  return spec;
}

const char* fault(const RoundSpec& spec) {
  if (!std::isfinite(spec.rule_parameter)) return "the rule's parameter is not finite";
  if (spec.chunk_elements == 0) return "chunks have no elements";
  if (spec.ahead > kMaxAhead) return "too many rounds ahead";
  if (spec.op == Op::collect) {
    if (spec.elements != 0) return "a collect round names elements";
    if (spec.chunk_elements > kMaxChunkBytes) return "a peer's bytes exceed the largest chunk";
    return "";
  }
  if ((spec.op == Op::sum) != (spec.rule == Rule::sum)) return "operation and rule disagree";
  if (!rule_valid(spec.rule, spec.rule_parameter)) return "a parameter that its rule cannot use";
  if (spec.elements > std::uint64_t{kMaxChunks} * spec.chunk_elements) return "too many chunks";
  if (encoded_bytes(spec.contribution, spec.chunk_elements) > kMaxChunkBytes ||
      encoded_bytes(spec.result, spec.chunk_elements) > kMaxChunkBytes) {
    return "a chunk is too large";
  }
  return "";
}

std::uint32_t spec_digest(const RoundSpec& spec) {
  const auto bytes = pack(spec);
  return static_cast<std::uint32_t>(digest(bytes));
}

std::uint32_t chunk_count(const RoundSpec& spec) {
  if (spec.op == Op::collect) return kMaxPeers;
  return static_cast<std::uint32_t>((spec.elements + spec.chunk_elements - 1) /
                                    spec.chunk_elements);
}

std::size_t chunk_elements(const RoundSpec& spec, std::uint32_t chunk) {
  if (spec.op == Op::collect) return spec.chunk_elements;
  const std::uint64_t first = std::uint64_t{chunk} * spec.chunk_elements;
  const std::uint64_t left = spec.elements > first ? spec.elements - first : 0;
  return static_cast<std::size_t>(left < spec.chunk_elements ? left : spec.chunk_elements);
}

std::size_t round_bytes(const RoundSpec& spec, Codec codec) {
  const auto whole = static_cast<std::size_t>(spec.elements / spec.chunk_elements);
  const auto rest = static_cast<std::size_t>(spec.elements % spec.chunk_elements);
  return whole * encoded_bytes(codec, spec.chunk_elements) + encoded_bytes(codec, rest);
}

}  // namespace decotrain
