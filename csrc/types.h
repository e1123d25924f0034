// Words shared by every part of the core: ids, views, round specifications, plans.
//
// Plain values only. What they mean on the wire is in wire.h, what they do in engine.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "codec/codec.h"

namespace decotrain {

using PeerId = std::uint64_t;    // random, one for each incarnation of a process; 0 is "nobody"
using ViewId = std::uint64_t;    // term << 32 | epoch: ordered as (term, epoch); 0 is "no view yet"
using SlotMask = std::uint64_t;  // bit s is slot s

constexpr std::size_t kMaxPeers = 64;  // slots of a run, so that a set of peers is one word
constexpr std::uint8_t kNoSlot = 0xff;
constexpr std::uint32_t kAllChunks = 0xffffffff;
constexpr std::uint32_t kMaxChunks = 1 << 16;                  // of one round
constexpr std::size_t kMaxChunkBytes = std::size_t{64} << 20;  // encoded
constexpr std::size_t kEagerBytes = 64 << 10;  // rounds up to this size do not wait for OPEN
constexpr std::uint32_t kMaxTags = 4096;
constexpr std::uint8_t kMaxAhead = 15;  // rounds of one tag open before the newest

struct Member {
  PeerId peer = 0;
  std::uint8_t slot = kNoSlot;
  bool active = false;  // else observing: gets results, contributes and owns nothing
  double share = 1.0;   // part of the chunks it owns, relative; 0 owns nothing
};

struct View {
  ViewId id = 0;
  std::vector<Member> members;  // by ascending slot: the rank order of every sum
};

enum class Op : std::uint8_t { mean = 0, sum = 1, collect = 2 };

// All peers of a round must name the same specification; frames carry its digest.
struct RoundSpec {
  Op op = Op::mean;
  Rule rule = Rule::mean;  // how contributions become one value (codec/combine.h)
  Codec contribution = Codec::f32;
  Codec result = Codec::f32;
  float rule_parameter = 0.0f;
  std::uint64_t elements = 0;        // collect: 0, each peer's bytes are one chunk
  std::uint32_t chunk_elements = 0;  // collect: the bound on one peer's bytes
  std::uint8_t ahead = 0;            // rounds before it that may be open when it is begun
  bool operator==(const RoundSpec&) const = default;
};

}  // namespace decotrain
