// A member of the view that lies: contributions and results that no encoder makes, for each codec,
// change nobody's result and are named.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "group.h"

using namespace decotrain;
using namespace decotrain::test;

namespace {

using Bytes = std::vector<std::byte>;

constexpr std::uint64_t kElements = 300;
constexpr std::uint32_t kChunk = 64;
constexpr std::size_t kLiar = 2;
constexpr PeerId kLiarId = 100 + kLiar;

template <typename T>
void put(Bytes& bytes, std::size_t at, T value) {
  REQUIRE(at + sizeof value <= bytes.size());
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

// What a liar may make of an honest encoding: each is no encoding of anything.
std::vector<std::function<void(Bytes&)>> lies(Codec codec) {
  std::vector<std::function<void(Bytes&)>> out;
  out.emplace_back([](Bytes& b) { std::fill(b.begin(), b.end(), std::byte{0xff}); });
  const auto at_end = [&](auto value) {
    out.emplace_back([=](Bytes& b) { put(b, b.size() - sizeof value, value); });
  };
  const auto words = [&](std::initializer_list<int> values) {
    for (const int value : values) at_end(static_cast<std::uint16_t>(value));
  };
  const auto bytes = [&](std::initializer_list<int> values) {
    for (const int value : values) at_end(static_cast<std::uint8_t>(value));
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  switch (codec) {
    case Codec::f32:  // the last value; of the others but bf16 and f16 the last scale
      for (const float value : {nan, inf, -inf}) at_end(value);
      break;
    case Codec::bf16:
      words({0x7fc0, 0x7f80, 0xff80});
      break;
    case Codec::f16:
      words({0x7e00, 0x7c00, 0xfc00});
      break;
    case Codec::int8:  // negative, denormal, so large that values overflow
      for (const float value : {nan, inf, -1.0f, -0.0f, 1e-40f, 1e38f}) at_end(value);
      break;
    case Codec::e2m1:  // exponents of a scale: NaN or infinite, too large, denormal
      bytes({255, 254, 1});
      break;
    case Codec::e3m0:
      bytes({255, 3, 26});
      break;
    case Codec::int2:
      words({0x7fc0, 0x7f80, 0xbf80, 0x8000, 0x0001});
      break;
  }
  return out;
}

// Three honest engines, of which the third one's frames pass through `forge`.
struct Lied : Group {
  Lied(Codec contribution, Codec result) : Group(3) {
    spec = spec_for(Op::mean, kElements, kChunk);
    spec.contribution = contribution;
    spec.result = result;
  }

  void begin_all(double weight_of_liar = 1.0) {
    for (std::size_t i = 0; i < 3; ++i) {
      const std::size_t bytes = round_bytes(spec, spec.contribution);
      auto copy = std::make_shared<Bytes>(bytes);
      std::byte* at = copy->data();
      for (std::uint32_t c = 0; c < chunk_count(spec); ++c) {
        std::vector<float> values(chunk_elements(spec, c));
        for (std::size_t e = 0; e < values.size(); ++e) {
          values[e] = static_cast<float>((e * 7 + i * 13 + c) % 23) - 11.0f;
        }
        REQUIRE(encode(spec.contribution, values, at));
        at += encoded_bytes(spec.contribution, values.size());
      }
      BeginArgs args;
      args.spec = spec;
      args.snapshot = {copy->data(), copy};
      args.weight = i == kLiar ? weight_of_liar : 1.0;
      engines[i]->begin(std::move(args), 0.0);
    }
  }

  // Lies in every frame of a type that the liar sends.
  void lie(FrameType type, std::function<void(Bytes&)> how) {
    forge = [this, type, how = std::move(how)](std::size_t from, OutFrame& frame) {
      if (from != kLiar || frame.header.type != type || frame.header.payload_bytes == 0) return;
      auto forged =
          std::make_shared<Bytes>(frame.payload, frame.payload + frame.header.payload_bytes);
      how(*forged);
      frame.header.payload_bytes = static_cast<std::uint32_t>(forged->size());
      frame.payload = forged->data();
      frame.keep = forged;
      if (type == FrameType::result) frame.header.b = digest(*forged);
      ++told;
    };
  }

  std::vector<Event> named(EventKind kind) {
    std::vector<Event> out;
    for (std::size_t i = 0; i < kLiar; ++i) {
      for (Event& event : engines[i]->take_events()) {
        if (event.kind == EventKind::refused || event.kind == EventKind::diverged) {
          CHECK(event.kind == kind);
          CHECK(event.peer == kLiarId);
          out.push_back(std::move(event));
        }
      }
    }
    return out;
  }

  RoundSpec spec;
  std::size_t told = 0;
};

std::vector<Bytes> chunks_of(const RoundResult& result) {
  std::vector<Bytes> out;
  for (std::size_t c = 0; c < result.chunks.size(); ++c) {
    out.emplace_back(result.chunks[c], result.chunks[c] + result.chunk_bytes[c]);
  }
  return out;
}

// Results of the same round: with the liar's contributions as they are, or without.
std::vector<Bytes> truth(Codec contribution, Codec result, bool with_liar) {
  Lied group(contribution, result);
  group.begin_all(with_liar ? 1.0 : 0.0);
  group.pump();
  return chunks_of(group.engines[0]->take_result(0, 0));
}

std::vector<std::pair<Codec, Codec>> pairs() {
  std::vector<std::pair<Codec, Codec>> out;
  for (std::uint8_t i = 0; i < kCodecCount; ++i) {
    out.emplace_back(static_cast<Codec>(i), static_cast<Codec>(i));
    out.emplace_back(static_cast<Codec>(i), Codec::int8);
  }
  return out;
}

// The view without the liar, planned from the reports of the two others (docs/protocol.md).
Install without_liar(Group& group, const RoundSpec& spec) {
  Install plan;
  plan.view.id = group.install.view.id + 1;
  plan.answers = {1, 2};
  plan.reported = 3;
  plan.view.members.assign(group.install.view.members.begin(),
                           group.install.view.members.begin() + 2);
  plan.tags = {{0, -1, 0}};
  RoundPlan round{.tag = 0, .seq = 0, .spec = spec, .stable = false, .chunks = {}};
  round.chunks.resize(chunk_count(spec));
  for (std::uint8_t i = 0; i < 2; ++i) {
    const Report report = group.engines[i]->freeze(plan.answers);
    REQUIRE(report.rounds.size() == 1);
    for (std::size_t c = 0; c < round.chunks.size(); ++c) {
      const ChunkReport& said = report.rounds[0].chunks[c];
      ChunkPlan& chunk = round.chunks[c];
      if (said.born != 0) {
        chunk.kind = ChunkPlan::Kind::value;
        chunk.owner = kNoSlot;
        chunk.received = 0;
        chunk.digest = said.digest;
        chunk.born = said.born;
        chunk.contributors = said.contributors;
        chunk.holders |= SlotMask{1} << i;
      } else if (chunk.holders == 0) {
        if (said.owner == i) chunk.received = said.received;
        chunk.owner = said.owner == kLiar ? 0 : said.owner;
      }
    }
  }
  plan.rounds.push_back(std::move(round));
  return plan;
}

}  // namespace

TEST_CASE("a contribution that nobody encoded is left out and its sender named") {
  for (const auto& [contribution, result] : pairs()) {
    const std::vector<Bytes> without = truth(contribution, result, false);
    for (const auto& how : lies(contribution)) {
      CAPTURE(codec_name(contribution));
      CAPTURE(codec_name(result));
      Lied group(contribution, result);
      group.lie(FrameType::contribution, how);
      group.begin_all();
      group.pump();
      CHECK(group.named(EventKind::refused).size() == group.told);
      CHECK(group.told >= 3);
      const RoundResult got = group.engines[0]->take_result(0, 0);
      const RoundResult other = group.engines[1]->take_result(0, 0);
      CHECK(got.outcome == Outcome::stable);
      CHECK(got.digest == other.digest);
      const std::vector<Bytes> chunks = chunks_of(got);
      std::size_t honest = 0;
      for (std::size_t c = 0; c < chunks.size(); ++c) {
        CHECK(
            valid(result, chunks[c].data(), chunk_elements(group.spec, static_cast<unsigned>(c))));
        if (got.contributors[c] == 7) continue;  // the liar owns it, and believes itself
        ++honest;
        CHECK(got.contributors[c] == 3);
        CHECK(chunks[c] == without[c]);
      }
      CHECK(honest == group.told);
    }
  }
}

TEST_CASE("a contribution with a weight that is none is left out") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double weight : {nan, std::numeric_limits<double>::infinity(), -1.0, 0.0}) {
    Lied group(Codec::e2m1, Codec::int8);
    group.forge = [&](std::size_t from, OutFrame& frame) {
      if (from != kLiar || frame.header.type != FrameType::contribution) return;
      frame.header.a = std::bit_cast<std::uint64_t>(weight);
      ++group.told;
    };
    group.begin_all();
    group.pump();
    CHECK(group.named(EventKind::refused).size() == group.told);
    CHECK(group.engines[0]->take_result(0, 0).contributors[0] != 0);
  }
}

TEST_CASE("garbage inside a valid frame gives everybody the same finite values, or is left out") {
  for (const auto& [contribution, result] : pairs()) {
    for (std::uint32_t seed = 0; seed < 20; ++seed) {
      CAPTURE(codec_name(contribution));
      CAPTURE(seed);
      std::mt19937 random(seed);
      Lied group(contribution, result);
      group.lie(FrameType::contribution, [&](Bytes& bytes) {
        for (std::byte& one : bytes) one = std::byte(random() & (seed % 2 == 0 ? 0xff : 0x3f));
      });
      group.begin_all();
      group.pump();
      const std::size_t left_out = group.named(EventKind::refused).size();
      const RoundResult got = group.engines[0]->take_result(0, 0);
      CHECK(got.digest == group.engines[1]->take_result(0, 0).digest);
      std::size_t without = 0;
      for (std::uint32_t c = 0; c < got.chunks.size(); ++c) {
        std::vector<float> values(chunk_elements(group.spec, c));
        REQUIRE(got.chunk_bytes[c] > 0);
        CHECK(decode(result, got.chunks[c], values));
        for (const float value : values) CHECK(std::isfinite(value));
        without += got.contributors[c] == 3 ? 1 : 0;
      }
      CHECK(without == left_out);
    }
  }
}

TEST_CASE("a frame of a wrong length ends its stream, and the round waits for a right one") {
  for (const auto& [contribution, result] : pairs()) {
    for (const FrameType type : {FrameType::contribution, FrameType::result}) {
      for (const bool longer : {false, true}) {
        CAPTURE(codec_name(contribution));
        Lied group(contribution, result);
        group.lie(type, [&](Bytes& b) { b.resize(longer ? b.size() + 1 : b.size() - 1); });
        group.begin_all();
        group.pump();
        const auto refused =
            std::count(group.accepted.begin(), group.accepted.end(), Accept::refuse);
        CHECK(static_cast<std::size_t>(refused) == group.told);
        CHECK(group.told > 0);
        CHECK_FALSE(group.engines[0]->ready(0, 0));
        group.forge = nullptr;
        for (std::size_t i = 0; i < kLiar; ++i) {
          group.engines[i]->on_link_reset(kLiarId, 0.0);
          group.engines[kLiar]->on_link_reset(100 + i, 0.0);
        }
        group.pump();
        CHECK(chunks_of(group.engines[0]->take_result(0, 0)) == truth(contribution, result, true));
      }
    }
  }
}

TEST_CASE(
    "a result that cannot be decoded is not taken, its owner named, and the chunk made again") {
  for (const auto& [contribution, result] : pairs()) {
    const std::vector<Bytes> without = truth(contribution, result, false);
    for (const auto& how : lies(result)) {
      CAPTURE(codec_name(result));
      Lied group(contribution, result);
      group.lie(FrameType::result, how);
      group.begin_all();
      group.pump();
      const std::vector<Event> events = group.named(EventKind::diverged);
      CHECK(events.size() == group.told);
      CHECK(group.told >= 2);
      CHECK(events[0].detail.find("cannot be decoded") != std::string::npos);
      CHECK_FALSE(group.engines[0]->ready(0, 0));
      const Install plan = without_liar(group, group.spec);
      for (std::size_t i = 0; i < kLiar; ++i) REQUIRE(group.engines[i]->install(plan, 0.0));
      group.pump();
      const RoundResult got = group.engines[0]->take_result(0, 0);
      CHECK(got.outcome == Outcome::stable);
      CHECK(got.digest == group.engines[1]->take_result(0, 0).digest);
      const std::vector<Bytes> chunks = chunks_of(got);
      std::size_t again = 0;
      for (std::size_t c = 0; c < chunks.size(); ++c) {
        if (got.contributors[c] == 7) continue;  // combined by an honest owner before
        ++again;
        CHECK(got.contributors[c] == 3);
        CHECK(chunks[c] == without[c]);
      }
      CHECK(again == group.told / 2);
    }
  }
}
