// Frames of the data plane: the 64-byte header, its bytes, and the checks that need no state.
//
// docs/wire.md is the specification; this file is its only C++ twin. A header that passes
// `parse` has known type, slots below kMaxPeers and a payload below kMaxChunkBytes: whether it
// fits the round is the engine's business.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "types.h"

namespace decotrain {

constexpr std::uint32_t kMagic = 0x31465444;  // "DTF1"
constexpr std::size_t kHeaderBytes = 64;

enum class FrameType : std::uint8_t {
  hello = 1,          // first frame of a stream, both ways (net/ only)
  open = 2,           // "I have begun this round and take its frames"; payload: the packed spec
  contribution = 3,   // peer -> owner: one chunk; kFlagSkip: no contribution, all chunks
  result = 4,         // owner (or holder) -> everybody: one chunk
  done = 5,           // "I hold every chunk": digest of all results
  have = 6,           // after a broken stream: bitmaps of what the sender holds
  ping = 7,           // net/ only
  pong = 8,           // net/ only
  state_request = 9,  // newcomer -> member: one chunk of shared state
  state = 10,         // member -> newcomer
  memory = 11,        // net/ only, within a host: a segment of shared memory, or the answer
  lend = 12,          // net/ only: where in one the next frame's payload lies
  returned = 13,      // net/ only: loans that nobody reads any more
};

constexpr FrameType kLastFrameType = FrameType::returned;

constexpr std::uint8_t kFlagSkip = 1;     // contribution: weight 0, no payload
constexpr std::uint8_t kFlagRelayed = 2;  // src and dst are not the ends of this stream
constexpr std::uint8_t kFlagReply = 4;    // have: answers a have, wants no answer
constexpr std::uint8_t kFlagsKnown = 7;

// Offsets in docs/wire.md. All integers little-endian.
struct Header {
  FrameType type = FrameType::ping;
  std::uint8_t flags = 0;
  std::uint8_t src = kNoSlot;
  std::uint8_t dst = kNoSlot;
  ViewId view = 0;
  std::uint32_t tag = 0;
  std::uint32_t chunk = 0;
  std::uint64_t seq = 0;
  std::uint32_t payload_bytes = 0;
  std::uint32_t spec_digest = 0;
  std::uint64_t a = 0;  // contribution: weight (f64 bits); result: contributors; done: digest
  std::uint64_t b = 0;  // contribution, result: digest of the payload; done: state digest
  std::uint64_t c = 0;  // result: view in which the value was combined
};

void write(const Header& header, std::span<std::byte, kHeaderBytes> out);
// Nothing when the bytes are no header of ours.
std::optional<Header> parse(std::span<const std::byte, kHeaderBytes> bytes);

// A short header: what differs from `base`, the last header of its type on the stream. A byte that
// no whole header begins with, the type, one bit for each byte that differs, those bytes.
using HeaderBytes = std::array<std::byte, kHeaderBytes>;
constexpr std::byte kShortMark{0x73};
constexpr std::size_t kShortHeaderBytes = 10;  // without the bytes that differ
// Frames of net/ but `lend` are always whole: they overtake others, and are no base.
bool may_be_short(FrameType type);
// Writes the header whole or short into `out`; how many bytes it has now.
std::size_t shorten(const HeaderBytes& header, const HeaderBytes& base, HeaderBytes& out);
// Bytes of the header at the front of what has come; 0 when more has to come to tell.
std::size_t header_bytes(std::span<const std::byte> front);
// The type of a header that `header_bytes` has measured, in range or not.
std::uint8_t type_of(std::span<const std::byte> header);
// The whole header. `header` has as many bytes as `header_bytes` says.
HeaderBytes lengthen(std::span<const std::byte> header, const HeaderBytes& base);

// The digest of payloads, chunks and rounds: XXH3, 64 bits.
std::uint64_t digest(std::span<const std::byte> bytes);

constexpr std::size_t kSpecBytes = 24;
std::array<std::byte, kSpecBytes> pack(const RoundSpec& spec);
// Nothing when the bytes are no specification or `fault` finds one.
std::optional<RoundSpec> unpack_spec(std::span<const std::byte> bytes);
// Why a round cannot run with this specification; "" when it can.
const char* fault(const RoundSpec& spec);
std::uint32_t spec_digest(const RoundSpec& spec);
std::uint32_t chunk_count(const RoundSpec& spec);  // collect: kMaxPeers, one for each slot
std::size_t chunk_elements(const RoundSpec& spec, std::uint32_t chunk);
std::size_t round_bytes(const RoundSpec& spec, Codec codec);  // of all chunks, encoded

}  // namespace decotrain
