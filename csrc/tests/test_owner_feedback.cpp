// Error feedback at the owner: what is added to a result, and who keeps what a result has lost.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "group.h"

namespace decotrain::test {
namespace {

constexpr std::size_t kElements = 200;
constexpr std::uint32_t kChunk = 64;

RoundSpec lossy() {
  RoundSpec spec = spec_for(Op::mean, kElements, kChunk);
  spec.result = Codec::e3m0;
  return spec;
}

void begin_fed(Group& group, std::size_t i, const std::vector<float>& values,
               std::vector<float>& residual) {
  auto copy = std::make_shared<std::vector<float>>(values);
  BeginArgs args;
  args.spec = lossy();
  args.snapshot = {reinterpret_cast<const std::byte*>(copy->data()), copy};
  args.owner_residual = {residual.data(), nullptr};
  group.engines[i]->begin(std::move(args), 0.0);
}

void keep(const RoundResult& result, std::vector<float>& residual) {
  for (const Lost& one : result.lost) {
    for (std::size_t i = 0; i < chunk_elements(result.spec, one.chunk); ++i) {
      residual[std::size_t{one.chunk} * kChunk + i] = one.values[i];
    }
  }
}

std::vector<float> result_values(const RoundResult& result) {
  std::vector<float> values(kElements);
  for (std::uint32_t c = 0; c < result.chunks.size(); ++c) {
    const std::span<float> part{values.data() + std::size_t{c} * kChunk,
                                chunk_elements(result.spec, c)};
    REQUIRE(decode(result.spec.result, result.chunks[c], part));
  }
  return values;
}

}  // namespace

TEST_CASE("the sum of all results is what was meant, less what the owners keep") {
  constexpr std::size_t n = 3;
  Group group(n);
  std::mt19937 random(5);
  std::normal_distribution<float> normal(1.0f);
  std::vector<std::vector<float>> residuals(n, std::vector<float>(kElements));
  std::vector<double> meant(kElements), got(kElements);
  for (std::uint64_t seq = 0; seq < 20; ++seq) {
    for (std::size_t i = 0; i < n; ++i) {
      std::vector<float> values(kElements);
      for (std::size_t e = 0; e < kElements; ++e) {
        values[e] = normal(random);
        meant[e] += static_cast<double>(values[e]) / n;
      }
      begin_fed(group, i, values, residuals[i]);
    }
    group.pump();
    std::vector<float> values;
    for (std::size_t i = 0; i < n; ++i) {
      const RoundResult result = group.engines[i]->take_result(0, seq);
      keep(result, residuals[i]);
      const std::vector<float> again = result_values(result);
      CHECK((i == 0 || again == values));
      values = again;
    }
    for (std::size_t e = 0; e < kElements; ++e) got[e] += static_cast<double>(values[e]);
  }
  for (std::size_t e = 0; e < kElements; ++e) {
    double kept = 0.0;
    for (const auto& residual : residuals) kept += static_cast<double>(residual[e]);
    CHECK(std::abs(got[e] + kept - meant[e]) < 1e-4);
  }
}

// The first owner's value is known to nobody else, and its report is not heard: another peer makes
// the chunk anew, and keeps what that value loses.
TEST_CASE("a value that gave way to another one leaves no residual") {
  Group group(3);
  const std::vector<float> values(kElements, 1.3f);
  std::array<std::vector<float>, 3> residuals;
  residuals.fill(std::vector<float>(kElements));
  for (std::size_t i = 0; i < 3; ++i) begin_fed(group, i, values, residuals[i]);
  group.lost = [](std::size_t, const Header& header) { return header.type == FrameType::result; };
  group.pump();
  Install next = group.install;
  next.view.id += 1;
  next.answers = {1, 2};
  next.reported = 0b110;
  next.tags = {{0, -1, 0}};
  RoundPlan round;
  round.spec = lossy();
  round.chunks.resize(4);
  std::size_t moved = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    const Report report = group.engines[i]->freeze({1, 2});
    for (std::size_t c = 0; c < 4; ++c) {
      const ChunkReport& held = report.rounds[0].chunks[c];
      if (held.born == 0) continue;
      if (i == 0) {
        round.chunks[c].owner = 1;
        ++moved;
        continue;
      }
      round.chunks[c] = {ChunkPlan::Kind::value, kNoSlot,          0, held.digest, held.born,
                         SlotMask{1} << i,       held.contributors};
    }
  }
  REQUIRE(moved > 0);
  next.rounds = {round};
  for (auto& one : group.engines) REQUIRE(one->install(next, 0.0));
  group.lost = nullptr;
  group.pump();
  std::size_t parts = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    REQUIRE(group.engines[i]->ready(0, 0));
    const RoundResult result = group.engines[i]->take_result(0, 0);
    if (i == 0) CHECK(result.lost.empty());
    parts += result.lost.size();
  }
  CHECK(parts == 4);
}

TEST_CASE("an owner's residual is for reductions, one round at a time") {
  Group group(2);
  std::vector<float> residual(kElements);
  BeginArgs args;
  args.spec = spec_for(Op::collect, 0, 64);
  args.weight = 0.0;
  args.owner_residual = {residual.data(), nullptr};
  CHECK_THROWS_AS(group.engines[0]->begin(args, 0.0), std::invalid_argument);
  args.spec = lossy();
  args.spec.ahead = 1;
  CHECK_THROWS_AS(group.engines[0]->begin(args, 0.0), std::invalid_argument);
}

}  // namespace decotrain::test
