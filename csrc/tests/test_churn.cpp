// Rounds under churn: kills, joins, lost reports and installs, broken streams, old frames, all from
// one seed. The simulator in tests/sim goes further; this runs under the sanitizers.
#include <doctest/doctest.h>

#include "world.h"

using namespace decotrain;
using namespace decotrain::test;

namespace {

constexpr int kActions = 1500;
constexpr std::uint32_t kSeeds = 300;
#ifdef DT_PLANT
constexpr std::uint32_t kSeedsForPlant = 500;
#endif

WorldOptions options_of(std::uint32_t seed) {
  WorldOptions options;
  options.peers = 2 + seed % 4;
  options.elements = seed % 3 == 0 ? 5 : seed % 3 == 1 ? 200 : 30000;
  options.chunk_elements = seed % 3 == 2 ? 4000 : 64;
  options.rounds = 6;
  if (seed % 7 == 3) {
    options.op = Op::collect;
    options.elements = 5;
    options.chunk_elements = 64;
  }
  if (seed % 11 < 5) {
    options.ahead = static_cast<std::uint8_t>(1 + seed % 3);
    options.rounds = 9;
  }
  if (seed % 5 == 0) {
    options.engine.grace_s = 0.05;
    options.engine.quorum = 0.5;
  }
  return options;
}

std::string run(std::uint32_t seed, WorldOptions options) {
  options.chaos = true;
  World world(seed, options);
  for (int i = 0; i < kActions && world.violations().empty(); ++i) world.act();
  if (world.violations().empty()) world.heal();
  world.check();
  if (!world.violations().empty()) return world.violations().front();
  for (std::size_t i = 0; i < world.size(); ++i) {
    Peer& peer = world.peer(i);
    if (!peer.alive) continue;
    for (const auto& [tag, state] : peer.state) {
      if (state.version + 1 == static_cast<std::int64_t>(options.rounds)) continue;
      return "peer " + std::to_string(peer.id) + " hangs at version " +
             std::to_string(state.version) + " of tag " + std::to_string(tag) + world.describe();
    }
  }
  return "";
}

}  // namespace

TEST_CASE("agreement and progress under churn") {
  for (std::uint32_t seed = 0; seed < kSeeds; ++seed) {
    const std::string fault = run(seed, options_of(seed));
    INFO("seed ", seed, ": ", fault);
    CHECK(fault.empty());
  }
}

TEST_CASE("agreement and progress under churn while chunks become ready one by one") {
  for (std::uint32_t seed = 0; seed < kSeeds; ++seed) {
    WorldOptions options = options_of(seed);
    options.fills = true;
    const std::string fault = run(seed, options);
    INFO("seed ", seed, ": ", fault);
    CHECK(fault.empty());
  }
}

#ifdef DT_PLANT
TEST_CASE("a planted bug is found") {
  for (std::uint8_t bug = 1; bug <= static_cast<std::uint8_t>(Plant::goes_on); ++bug) {
    std::uint32_t seed = 0;
    std::string fault;
    for (; fault.empty() && seed < kSeedsForPlant; ++seed) {
      WorldOptions options = options_of(seed);
      options.plant = static_cast<Plant>(bug);
      fault = run(seed, options);
    }
    INFO("bug ", static_cast<int>(bug));
    CHECK_FALSE(fault.empty());
    MESSAGE("bug ", static_cast<int>(bug), " with seed ", seed - 1, ": ", fault.substr(0, 80));
  }
}
#endif
