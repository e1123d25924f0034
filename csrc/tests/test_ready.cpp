// Rounds whose chunks become ready one after the other: what is not there is not read, what is
// there travels, and who gives up holds nobody up.
#include <doctest/doctest.h>

#include <limits>
#include <set>

#include "group.h"

using namespace decotrain;
using namespace decotrain::test;

namespace {

constexpr std::uint32_t kChunk = 64;
constexpr std::uint32_t kChunks = 5;
constexpr std::size_t kElements = kChunk * (kChunks - 1) + 7;

// A buffer that holds NaN where nothing has been written yet.
struct Filling {
  Filling(Group& in, std::size_t who) : group(in), peer(who) {
    values =
        std::make_shared<std::vector<float>>(kElements, std::numeric_limits<float>::quiet_NaN());
    BeginArgs args;
    args.spec = spec_for(Op::sum, kElements, kChunk);
    args.snapshot = {reinterpret_cast<const std::byte*>(values->data()), values, true, 0};
    group.engines[peer]->begin(std::move(args), 0.0);
  }

  void fill(std::uint32_t chunks, float value) {
    const std::size_t end = std::min<std::size_t>(std::size_t{chunks} * kChunk, kElements);
    for (std::size_t i = std::size_t{done} * kChunk; i < end; ++i) (*values)[i] = value;
    done = chunks;
    group.engines[peer]->chunks_ready(0, 0, chunks, 0.0);
  }

  Group& group;
  std::size_t peer;
  std::shared_ptr<std::vector<float>> values;
  std::uint32_t done = 0;
};

// Chunks of frames that were sent: the first peer's contributions, everybody's results.
struct Seen {
  explicit Seen(Group& group) {
    group.lost = [this](std::size_t from, const Header& header) {
      if (from == 0 && header.type == FrameType::contribution) given.push_back(header.chunk);
      if (header.type == FrameType::result) results.push_back(header.chunk);
      return false;
    };
  }
  std::vector<std::uint32_t> given, results;
};

void check_sum(Group& group, float expected) {
  for (auto& engine : group.engines) {
    const RoundResult result = engine->take_result(0, 0);
    CHECK(result.outcome == Outcome::stable);
    CHECK(decoded(result) == std::vector<float>(kElements, expected));
  }
}

}  // namespace

TEST_CASE("chunks travel as they become ready, and are combined before the last is there") {
  Group group(2);
  Seen seen(group);
  Filling filling(group, 0);
  group.begin(1, spec_for(Op::sum, kElements, kChunk), std::vector<float>(kElements, 2.0f));
  group.pump();
  CHECK(seen.given.empty());
  for (std::uint32_t chunks = 1; chunks <= kChunks; ++chunks) {
    CHECK_FALSE(group.engines[1]->ready(0, 0));
    filling.fill(chunks, 1.0f);
    group.pump();
    for (const std::uint32_t chunk : seen.given) CHECK(chunk < chunks);
    CHECK(seen.results.size() == chunks);  // once, from its owner to the other peer
    CHECK(std::set<std::uint32_t>(seen.given.begin(), seen.given.end()).size() ==
          seen.given.size());
  }
  CHECK_FALSE(seen.given.empty());
  check_sum(group, 3.0f);
}

TEST_CASE("chunks may become ready while the peer is frozen, or be for another owner then") {
  for (std::uint32_t before = 0; before <= kChunks; ++before) {
    CAPTURE(before);
    Group group(2);
    Filling filling(group, 0);
    group.begin(1, spec_for(Op::sum, kElements, kChunk), std::vector<float>(kElements, 2.0f));
    if (before > 0) filling.fill(before, 1.0f);
    group.pump(before);
    Install next = group.install;
    next.view.id += 1;
    next.answers = {1, 2};
    const Report report = group.engines[0]->freeze({1, 2});
    group.engines[1]->freeze({1, 2});
    filling.fill(kChunks, 1.0f);
    RoundPlan round{
        .tag = 0, .seq = 0, .spec = report.rounds.at(0).spec, .stable = false, .chunks = {}};
    for (std::uint32_t c = 0; c < kChunks; ++c) {  // everything again, at the other peer
      round.chunks.push_back({.kind = ChunkPlan::Kind::owner, .owner = 1});
    }
    next.tags = {{0, -1, 0}};
    next.rounds = {round};
    for (auto& engine : group.engines) REQUIRE(engine->install(next, 0.0));
    group.pump();
    check_sum(group, 3.0f);
  }
}

TEST_CASE("who gives up on the rest of its chunks is not in them, and nobody waits") {
  for (std::uint32_t there = 0; there <= kChunks; ++there) {
    CAPTURE(there);
    Group group(3);
    Filling filling(group, 0);
    for (const std::size_t i : {1, 2}) {
      group.begin(i, spec_for(Op::sum, kElements, kChunk), std::vector<float>(kElements, 2.0f));
    }
    if (there > 0) filling.fill(there, 1.0f);
    group.pump();
    group.engines[0]->abandon(0, 0, 0.0);
    group.engines[0]->chunks_ready(0, 0, kChunks, 0.0);  // too late
    group.pump();
    std::uint64_t digest = 0;
    for (auto& engine : group.engines) {
      const RoundResult result = engine->take_result(0, 0);
      if (digest == 0) digest = result.digest;
      CHECK(result.digest == digest);
      for (std::uint32_t c = 0; c < kChunks; ++c) {
        CHECK(result.contributors[c] == (c < there ? 7 : 6));
      }
      for (const float value : decoded(result)) CHECK((value == 5.0f || value == 4.0f));
    }
  }
}
