// A peer that wants a round with another specification than the view runs. Who goes is the
// coordinator's to say (tests/control/test_misfits.py).
#include <doctest/doctest.h>

#include "group.h"

using namespace decotrain;
using namespace decotrain::test;

TEST_CASE("who wants another specification than the view's waits, says so once and is counted") {
  Group group(2);
  const RoundSpec one = spec_for(Op::mean, 300, 64);
  const RoundSpec other = spec_for(Op::mean, 300, 32);
  Engine& late = *group.engines[1];
  CHECK_FALSE(late.disputes(0, other));  // nobody has begun
  group.begin(0, one, std::vector<float>(300, 1.0f));
  Install again = group.install;
  again.view.id += 1;
  again.answers = {1, 2};
  RoundPlan plan;
  plan.spec = one;
  plan.chunks.resize(chunk_count(one));
  for (ChunkPlan& chunk : plan.chunks) chunk.owner = 0;
  again.tags = {{0, -1, 0}};
  again.rounds = {plan};
  for (auto& engine : group.engines) {
    engine->freeze({1, 2});
    REQUIRE(engine->install(again, 0.0));
  }
  CHECK_FALSE(late.disputes(0, one));
  CHECK(late.disputes(0, other));
  CHECK(late.disputes(0, other));
  const auto events = late.take_events();
  REQUIRE(events.size() == 1);
  CHECK(events[0].kind == EventKind::spec_mismatch);
  CHECK(events[0].peer == 101);
  const Report report = late.freeze({1, 3});
  REQUIRE(report.rounds.size() == 1);
  CHECK(report.rounds[0].begun);
  CHECK(report.rounds[0].spec == other);
  CHECK(report.rounds[0].chunks.size() == chunk_count(other));
  // The view decides for it, and it begins; for the one that had begun it is a fresh round.
  again.view.id += 1;
  again.answers = {1, 3};
  again.rounds[0].spec = other;
  again.rounds[0].chunks.assign(chunk_count(other), plan.chunks[0]);
  REQUIRE(late.install(again, 0.0));
  CHECK_FALSE(late.disputes(0, other));
  CHECK(late.disputes(0, one));
  group.begin(1, other, std::vector<float>(300, 1.0f));
  CHECK_FALSE(late.ready(0, 0));
  group.engines[0]->freeze({1, 3});
  REQUIRE(group.engines[0]->install(again, 0.0));
  group.pump();
  CHECK_FALSE(group.engines[0]->ready(0, 0));  // its own specification: not lost, not mixed
  CHECK_FALSE(late.ready(0, 0));
  bool named = false;
  for (const Event& event : late.take_events()) named |= event.peer == 100;
  CHECK(named);
}
