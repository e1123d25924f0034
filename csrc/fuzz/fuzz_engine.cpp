// Frames of hostile peers, given to an engine with open rounds: whatever they claim, the engine
// takes no byte it has not made room for, and what it sends can be read.
//
// Headers here are well-formed (fuzz_header does the others); views, specifications and digests are
// made right when the input asks for it, since guessing them would take the fuzzer for ever.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "engine.h"

using namespace decotrain;

namespace {

constexpr PeerId kSelf = 100;
constexpr ViewId kView = (ViewId{1} << 32) | 1;
constexpr std::uint32_t kTags = 3;

void require(bool holds) {
  if (!holds) std::abort();
}

struct Input {
  const std::uint8_t* data;
  std::size_t left;
  std::uint64_t next(std::size_t bytes) {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < bytes && left > 0; ++i, --left)
      value |= std::uint64_t{*data++} << 8 * i;
    return value;
  }
};

RoundSpec spec_of(std::uint32_t tag) {
  RoundSpec spec;
  if (tag == 0) spec.elements = 5, spec.chunk_elements = 2;         // eager
  if (tag == 1) spec.elements = 40000, spec.chunk_elements = 9000;  // waits for OPEN
  if (tag == 2) spec.op = Op::collect, spec.chunk_elements = 64, spec.ahead = 2;
  return spec;
}

void begin_round(Engine& engine, std::uint32_t tag) {
  if (!engine.may_begin(tag, spec_of(tag).ahead)) return;
  BeginArgs args;
  args.tag = tag;
  args.spec = spec_of(tag);
  args.collect_bytes = args.spec.op == Op::collect ? 20 : 0;
  auto values = std::make_shared<std::vector<float>>(std::max<std::size_t>(5, args.spec.elements));
  args.snapshot = {reinterpret_cast<const std::byte*>(values->data()), values};
  engine.begin(std::move(args), 0.0);
}

void give_frame(Engine& engine, Input& in) {
  Header header;
  const auto honest = in.next(1);                            // which fields are made right
  header.type = static_cast<FrameType>(2 + in.next(1) % 5);  // OPEN to HAVE
  header.flags = in.next(1) & (kFlagSkip | kFlagRelayed | kFlagReply);
  const PeerId from = kSelf + 1 + in.next(1) % 3;
  header.src = honest & 1 ? static_cast<std::uint8_t>(from - kSelf) : in.next(1) % kMaxPeers;
  header.dst = 0;
  header.view = honest & 2 ? kView : in.next(8);
  header.tag = static_cast<std::uint32_t>(honest & 4 ? in.next(1) % kTags : in.next(4));
  header.seq = honest & 8 ? in.next(1) % 3 : in.next(8);
  header.chunk = static_cast<std::uint32_t>(honest & 16 ? in.next(1) % 70 : in.next(4));
  header.spec_digest = honest & 32 ? spec_digest(spec_of(header.tag % kTags)) : in.next(4);
  header.a = honest & 64 ? std::bit_cast<std::uint64_t>(1.0) : in.next(8);
  header.c = in.next(1) & 1 ? kView : in.next(8);
  header.payload_bytes = static_cast<std::uint32_t>(in.next(2));
  std::vector<std::byte> payload(header.payload_bytes);
  const std::size_t held = std::min(payload.size(), in.left);
  if (held > 0) std::memcpy(payload.data(), in.data, held);
  in.data += held;
  in.left -= held;
  if (honest & 128) {
    if (header.type == FrameType::open || header.type == FrameType::have) {
      const auto packed = pack(spec_of(header.tag % kTags));
      std::copy_n(packed.begin(), std::min(packed.size(), payload.size()), payload.begin());
    }
    header.b = digest(payload);
  } else {
    header.b = in.next(8);
  }
  Incoming incoming = engine.on_header(from, header, 0.0);
  if (incoming.accept != Accept::take) return;
  require(payload.empty() || incoming.target != nullptr);
  if (!payload.empty()) std::memcpy(incoming.target, payload.data(), payload.size());
  engine.on_payload(from, header, std::move(incoming), 0.0);
}

void read_everything(Engine& engine) {
  unsigned sum = 0;
  for (PeerId to = kSelf + 1; to <= kSelf + 3; ++to) {
    OutFrame frame;
    while (engine.next_frame(to, frame)) {
      require(frame.header.payload_bytes <= kMaxChunkBytes);
      for (std::size_t i = 0; i < frame.header.payload_bytes; ++i) {
        sum += std::to_integer<unsigned>(frame.payload[i]);
      }
    }
  }
  for (std::uint32_t tag = 0; tag < kTags; ++tag) {
    for (std::uint64_t seq = 0; seq < 3; ++seq) {
      if (!engine.ready(tag, seq)) continue;
      const RoundResult result = engine.take_result(tag, seq);
      for (std::size_t c = 0; c < result.chunks.size(); ++c) {
        for (std::size_t i = 0; i < result.chunk_bytes[c]; ++i) {
          sum += std::to_integer<unsigned>(result.chunks[c][i]);
        }
      }
    }
  }
  engine.take_events();
  static volatile unsigned sink;
  sink = sum;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input in{data, size};
  EngineOptions options;
  options.parked_bytes = 1 << 20;
  Engine engine(kSelf, options);
  Install install;
  install.view.id = kView;
  install.answers = {1, 1};
  for (std::uint8_t slot = 0; slot < 4; ++slot) {
    install.view.members.push_back({kSelf + slot, slot, slot != 3, 1.0});
    install.reported |= SlotMask{1} << slot;
  }
  engine.freeze({1, 1});
  require(engine.install(install, 0.0));
  while (in.left > 0) {
    const auto what = in.next(1);
    if (what < 200) {
      give_frame(engine, in);
    } else if (what < 230) {
      begin_round(engine, what % kTags);
    } else if (what < 240) {
      engine.on_link_reset(kSelf + 1 + what % 3, 0.0);
    } else {
      read_everything(engine);
    }
  }
  read_everything(engine);
  engine.freeze({1, 2});
  return 0;
}
