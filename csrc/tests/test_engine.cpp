// Rounds without churn: sizes, numbers of peers, operations, weights, and what a frame may not do.
#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "group.h"
#include "world.h"

using namespace decotrain;
using namespace decotrain::test;

namespace {

void check_round(std::size_t n, std::uint64_t elements, Op op, bool weighted) {
  CAPTURE(n);
  CAPTURE(elements);
  Group group(n);
  group.rng.seed(static_cast<std::uint32_t>(n * 1000 + elements));
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> inputs(n, std::vector<float>(elements));
  double weights = 0.0;
  std::vector<double> expected(elements, 0.0);
  std::vector<double> magnitude(elements, 0.0);
  for (std::size_t i = 0; i < n; ++i) {
    const double weight = weighted ? 1.0 + 2.5 * static_cast<double>(i) : 1.0;
    weights += weight;
    for (std::size_t e = 0; e < elements; ++e) {
      inputs[i][e] = normal(group.rng);
      expected[e] += (op == Op::mean ? weight : 1.0) * static_cast<double>(inputs[i][e]);
      magnitude[e] += weight * std::abs(static_cast<double>(inputs[i][e]));
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    const double weight = weighted ? 1.0 + 2.5 * static_cast<double>(i) : 1.0;
    group.begin(i, spec_for(op, elements, 64), inputs[i], weight);
    group.pump(group.rng() % 7);
  }
  group.pump();
  std::vector<std::uint64_t> digests;
  for (std::size_t i = 0; i < n; ++i) {
    REQUIRE(group.engines[i]->ready(0, 0));
    const RoundResult result = group.engines[i]->take_result(0, 0);
    CHECK(result.outcome == Outcome::stable);
    digests.push_back(result.digest);
    CHECK(digests[i] == digests[0]);
    const std::vector<float> values = decoded(result);
    REQUIRE(values.size() == elements);
    const double scale = op == Op::mean ? weights : 1.0;
    for (std::size_t e = 0; e < elements; ++e) {
      const double error = std::abs(values[e] - expected[e] / scale);
      if (error > 1e-6 * magnitude[e] / scale + 1e-12) FAIL("element " << e << " off by " << error);
    }
    for (const SlotMask who : result.contributors) CHECK(who == (SlotMask{1} << n) - 1);
  }
}

}  // namespace

TEST_CASE("mean and sum are those of float64 and the same bits everywhere") {
  for (const std::size_t n : {1, 2, 3, 5, 8}) {
    for (const std::uint64_t elements : {0, 1, 7, 63, 64, 65, 127, 128, 1009}) {
      check_round(n, elements, Op::mean, false);
      check_round(n, elements, Op::mean, true);
      check_round(n, elements, Op::sum, false);
    }
  }
  check_round(3, 100003, Op::mean, true);  // more than an eager round: waits for OPEN
}

TEST_CASE("collect keeps every peer's bytes in rank order") {
  Group group(5);
  for (std::size_t i = 0; i < 5; ++i) {
    const std::vector<float> mine(i, static_cast<float>(i));
    group.begin(i, spec_for(Op::collect, 0, 64), mine, i == 3 ? 0.0 : 1.0);
  }
  group.pump();
  for (std::size_t i = 0; i < 5; ++i) {
    const RoundResult result = group.engines[i]->take_result(0, 0);
    CHECK(decoded(result) == std::vector<float>{1, 2, 2, 4, 4, 4, 4});
    CHECK(result.contributors[0] == 1);  // contributed nothing, which is not the same as
    CHECK(result.contributors[3] == 0);  // not having contributed
  }
}

TEST_CASE("a round that everybody skips has an explicit empty result") {
  for (const std::size_t n : {1, 2, 3}) {
    Group group(n);
    for (std::size_t i = 0; i < n; ++i) group.begin(i, spec_for(Op::mean, 200, 64), {}, 0.0);
    group.pump();
    for (std::size_t i = 0; i < n; ++i) {
      const RoundResult result = group.engines[i]->take_result(0, 0);
      CHECK(result.outcome == Outcome::stable);
      CHECK(decoded(result).empty());
      CHECK(result.contributors == std::vector<SlotMask>(4, 0));
    }
  }
}

TEST_CASE("who skips is not in the mean") {
  Group group(3);
  group.begin(0, spec_for(Op::mean, 100, 64), std::vector<float>(100, 1.0f));
  group.begin(1, spec_for(Op::mean, 100, 64), std::vector<float>(100, 3.0f));
  group.begin(2, spec_for(Op::mean, 100, 64), {}, 0.0);
  group.pump();
  const RoundResult result = group.engines[2]->take_result(0, 0);
  CHECK(decoded(result) == std::vector<float>(100, 2.0f));
  CHECK(result.contributors == std::vector<SlotMask>{3, 3});
  CHECK(result.peers == std::vector<std::pair<std::uint8_t, PeerId>>{{0, 100}, {1, 101}});
}

TEST_CASE("a NaN is left out and its sender named; the round goes on without it") {
  Group group(3);
  std::vector<float> bad(200, 1.0f);
  bad[70] = std::numeric_limits<float>::quiet_NaN();  // chunk 1
  bad[10] = std::numeric_limits<float>::infinity();   // chunk 0
  bad[150] = std::numeric_limits<float>::quiet_NaN();
  group.begin(0, spec_for(Op::mean, 200, 64), std::vector<float>(200, 2.0f));
  group.begin(1, spec_for(Op::mean, 200, 64), std::vector<float>(200, 4.0f));
  group.begin(2, spec_for(Op::mean, 200, 64), bad);
  group.pump();
  std::size_t named = 0;
  for (std::size_t i = 0; i < 2; ++i) {
    for (const Event& event : group.engines[i]->take_events()) {
      if (event.kind == EventKind::refused) CHECK(event.peer == 102);
      named += event.kind == EventKind::refused ? 1 : 0;
    }
  }
  CHECK(named >= 2);
  const RoundResult result = group.engines[0]->take_result(0, 0);
  CHECK(result.contributors[0] == 3);
  for (const float value : decoded(result)) CHECK(std::isfinite(value));
}

TEST_CASE("a borrowed buffer that is not finite is found by the owner, and its lender told") {
  for (const std::size_t where : {5, 70, 150, 199}) {  // own chunk and others'
    CAPTURE(where);
    Group group(3);
    const RoundSpec spec = spec_for(Op::sum, 200, 64);
    auto bad = std::make_shared<std::vector<float>>(200, 1.0f);
    (*bad)[where] = std::numeric_limits<float>::infinity();
    BeginArgs args;
    args.spec = spec;
    args.snapshot = {reinterpret_cast<const std::byte*>(bad->data()), bad, false};
    group.engines[0]->begin(std::move(args), 0.0);
    group.begin(1, spec, std::vector<float>(200, 2.0f));
    group.begin(2, spec, std::vector<float>(200, 4.0f));
    group.pump();
    const RoundResult mine = group.engines[0]->take_result(0, 0);
    const RoundResult theirs = group.engines[1]->take_result(0, 0);
    CHECK(mine.withdrawn);
    CHECK_FALSE(theirs.withdrawn);
    CHECK(mine.digest == theirs.digest);
    CHECK(theirs.contributors[where / 64] == 6);
    const std::vector<float> values = decoded(theirs);
    for (std::size_t e = 0; e < 200; ++e) CHECK(values[e] == (e / 64 == where / 64 ? 6.0f : 7.0f));
    std::size_t named = 0;
    for (auto& engine : group.engines) {
      for (const Event& event : engine->take_events()) {
        if (event.kind != EventKind::refused) continue;
        ++named;
        CHECK(event.peer == 100);
      }
    }
    CHECK(named == 1);
  }
}

TEST_CASE("finite contributions whose sum is not leave an empty chunk") {
  Group group(2);
  RoundSpec spec = spec_for(Op::sum, 100, 64);
  std::vector<float> large(100, 1.0f);
  large[70] = std::numeric_limits<float>::max();
  for (std::size_t i = 0; i < 2; ++i) group.begin(i, spec, large);
  group.pump();
  const RoundResult result = group.engines[0]->take_result(0, 0);
  CHECK(result.contributors == std::vector<SlotMask>{3, 0});
  CHECK(decoded(result) == std::vector<float>(64, 2.0f));
  CHECK_FALSE(result.withdrawn);
}

TEST_CASE("two rounds of two tags are open at once, in any order of beginning") {
  Group group(3);
  const RoundSpec spec = spec_for(Op::sum, 300, 64);
  auto begin = [&](std::size_t i, std::uint32_t tag, float value) {
    auto copy = std::make_shared<std::vector<float>>(300, value);
    BeginArgs args;
    args.tag = tag;
    args.spec = spec;
    args.snapshot = {reinterpret_cast<const std::byte*>(copy->data()), copy};
    group.engines[i]->begin(std::move(args), 0.0);
    group.pump(5);
  };
  begin(0, 4, 1.0f);
  begin(1, 9, 16.0f);
  begin(2, 9, 32.0f);
  begin(1, 4, 2.0f);
  begin(0, 9, 8.0f);
  begin(2, 4, 4.0f);
  group.pump();
  for (auto& engine : group.engines) {
    CHECK(decoded(engine->take_result(4, 0)) == std::vector<float>(300, 7.0f));
    CHECK(decoded(engine->take_result(9, 0)) == std::vector<float>(300, 56.0f));
  }
}

TEST_CASE("a round follows a round, and begin keeps its order") {
  Group group(2);
  const RoundSpec spec = spec_for(Op::mean, 10, 64);
  for (std::uint64_t seq = 0; seq < 20; ++seq) {
    CHECK(group.begin(0, spec, std::vector<float>(10, 1.0f)) == seq);
    CHECK_FALSE(group.engines[0]->may_begin(0));
    CHECK_THROWS_AS(group.begin(0, spec, std::vector<float>(10, 1.0f)), std::logic_error);
    CHECK(group.begin(1, spec, std::vector<float>(10, 2.0f)) == seq);
    group.pump();
    CHECK(decoded(group.engines[0]->take_result(0, seq)) == std::vector<float>(10, 1.5f));
    CHECK(group.engines[1]->take_result(0, seq).seq == seq);
  }
}

TEST_CASE("a round may be begun before the one it follows has ended, and they end in order") {
  Group group(3);
  RoundSpec spec = spec_for(Op::sum, 10, 64);
  spec.ahead = 2;
  for (std::uint64_t seq = 0; seq < 3; ++seq) {
    for (std::size_t i = 0; i < 2; ++i) {
      CHECK(group.begin(i, spec, std::vector<float>(10, 1.0f)) == seq);
    }
  }
  CHECK_FALSE(group.engines[0]->may_begin(0, 2));
  CHECK(group.engines[0]->may_begin(0, 3));
  group.pump();  // the third peer keeps what comes early
  for (std::uint64_t seq = 0; seq < 3; ++seq) {
    CHECK_FALSE(group.engines[0]->ready(0, seq));
    group.begin(2, spec, std::vector<float>(10, 1.0f));
  }
  // Round 0 lacks a DONE: rounds 1 and 2 are complete and have to wait for it.
  group.lost = [](std::size_t from, const Header& header) {
    return from == 2 && header.type == FrameType::done && header.seq == 0;
  };
  group.pump();
  for (std::uint64_t seq = 0; seq < 3; ++seq) {
    CHECK_FALSE(group.engines[0]->ready(0, seq));
    CHECK(decoded(group.engines[2]->take_result(0, seq)) == std::vector<float>(10, 3.0f));
  }
  group.lost = nullptr;
  for (std::size_t i = 0; i < 2; ++i) {
    group.engines[i]->on_link_reset(102, 0.0);
    group.engines[2]->on_link_reset(100 + i, 0.0);
  }
  group.pump();
  for (std::uint64_t seq = 0; seq < 3; ++seq) {
    CHECK(decoded(group.engines[0]->take_result(0, seq)) == std::vector<float>(10, 3.0f));
  }
}

// All results since round 0 are worth nothing without what round 0 goes on from (seed 60808).
TEST_CASE("results cover a tag whose state is at version 0, not one whose state is void") {
  for (const std::int64_t declared : {-1, -2}) {
    Group group(3, {}, 1);
    group.engines[2]->declare({{0, declared}});
    const RoundSpec spec = spec_for(Op::sum, 10, 64);
    for (std::size_t i = 0; i < 2; ++i) group.begin(i, spec, std::vector<float>(10, 1.0f));
    group.pump();
    REQUIRE(group.engines[2]->missed(0).size() == 1);
    const Report report = group.engines[2]->freeze({1, 2});
    REQUIRE(report.tags.size() == 1);
    CHECK(report.tags[0].covered == (declared == -1 ? 0 : -1));
  }
}

// A peer returned round 0, the others redo it without it: its branch is void (V11), and stays so
// although it observes the round that takes its place.
TEST_CASE("a branch that became void is not covered by the results that come after it") {
  Group group(3);
  group.engines[2]->declare({{0, -1}});
  const RoundSpec spec = spec_for(Op::sum, 10, 64);
  for (std::size_t i = 0; i < 3; ++i) group.begin(i, spec, std::vector<float>(10, 1.0f));
  group.lost = [](std::size_t from, const Header& header) {
    return from == 2 && header.type == FrameType::done;
  };
  group.pump();
  group.lost = nullptr;
  REQUIRE(group.engines[2]->ready(0, 0));
  REQUIRE_FALSE(group.engines[0]->ready(0, 0));
  Install next = group.install;
  next.view.id += 1;
  next.view.members[2].active = false;
  next.answers = {1, 2};
  next.reported = 3;
  next.tags = {{0, -1, 0}};
  for (auto& one : group.engines) {
    one->freeze({1, 2});
    REQUIRE(one->install(next, 0.0));
  }
  CHECK(group.engines[2]->take_result(0, 0).outcome == Outcome::lost);
  group.pump();
  REQUIRE(group.engines[0]->ready(0, 0));
  REQUIRE(group.engines[2]->missed(0).size() == 1);
  CHECK(group.engines[2]->freeze({1, 3}).tags[0].covered == -1);
}

// An owner on a slow link: nobody has its results, so nobody says DONE, and nobody is late with it.
TEST_CASE("an owner that is late with its results is named, one of several that are not") {
  EngineOptions options;
  options.done_bound_s = 1.0;
  Group group(4, options);
  const RoundSpec spec = spec_for(Op::sum, 256, 64);  // a chunk for each of them
  for (std::size_t i = 0; i < 4; ++i) group.begin(i, spec, std::vector<float>(256, 1.0f));
  std::size_t late = 1;  // so many owners do not send their results
  group.lost = [&](std::size_t from, const Header& header) {
    return from >= 4 - late && header.type == FrameType::result;
  };
  SUBCASE("one of four") {}
  SUBCASE("two of four: who is slow?") { late = 2; }
  group.pump();
  std::vector<PeerId> named;
  for (int quarter = 0; quarter < 40; ++quarter) {
    const double now = 0.25 * quarter;
    group.engines[0]->tick(now);
    for (const Event& event : group.engines[0]->take_events()) {
      REQUIRE(event.kind == EventKind::late_done);
      named.push_back(event.peer);
      CHECK(now <= 1.5 * options.done_bound_s);
    }
  }
  CHECK(named == (late == 1 ? std::vector<PeerId>{103} : std::vector<PeerId>{}));
}

// Who has said DONE waits for the others twice as long as owners are waited for: the others may
// lack what an owner has not sent, and name it first.
TEST_CASE("who is late with DONE is named after two bounds") {
  EngineOptions options;
  options.done_bound_s = 1.0;
  Group group(3, options);
  const RoundSpec spec = spec_for(Op::sum, 256, 64);
  for (std::size_t i = 0; i < 3; ++i) group.begin(i, spec, std::vector<float>(256, 1.0f));
  group.lost = [](std::size_t from, const Header& header) {
    return from == 2 && header.type == FrameType::done;
  };
  group.pump();
  group.engines[0]->tick(1.9);
  CHECK(group.engines[0]->take_events().empty());
  group.engines[0]->tick(2.1);
  const std::vector<Event> events = group.engines[0]->take_events();
  REQUIRE(events.size() == 1);
  CHECK(events[0].kind == EventKind::late_done);
  CHECK(events[0].peer == 102);
}

// What a plan calls a value is sent by an active holder: the lowest may be observing for being
// slow.
TEST_CASE("a value is sent by an active holder before an observer") {
  Group group(3);
  const RoundSpec spec = spec_for(Op::sum, 256, 64);
  for (std::size_t i = 0; i < 3; ++i) group.begin(i, spec, std::vector<float>(256, 1.0f));
  group.lost = [](std::size_t, const Header& header) {
    return header.type == FrameType::done || (header.type == FrameType::result && header.dst == 2);
  };
  group.pump();
  Install next = group.install;
  next.view.id += 1;
  next.view.members[0].active = false;
  next.answers = {1, 2};
  next.tags = {{0, -1, 0}};
  RoundPlan round;
  round.spec = spec;
  round.chunks.resize(4);
  for (std::size_t i = 0; i < 3; ++i) {
    const Report report = group.engines[i]->freeze({1, 2});
    for (std::size_t c = 0; c < 4; ++c) {
      const ChunkReport& held = report.rounds[0].chunks[c];
      if (held.born == 0) continue;
      ChunkPlan& plan = round.chunks[c];
      plan.kind = ChunkPlan::Kind::value;
      plan.digest = held.digest;
      plan.born = held.born;
      plan.contributors = held.contributors;
      plan.holders |= SlotMask{1} << i;
    }
  }
  next.rounds = {round};
  for (auto& one : group.engines) REQUIRE(one->install(next, 0.0));
  std::size_t sent = 0;
  group.lost = [&](std::size_t from, const Header& header) {
    if (header.type != FrameType::result) return false;
    ++sent;
    CHECK(from == 1);
    return false;
  };
  group.pump();
  CHECK(sent > 0);
  CHECK(group.engines[2]->ready(0, 0));
}

// The end of a round by the plan looks at the round after it: DONEs that this one has got in the
// view before must not make it stable (simulator seed 1410).
TEST_CASE("words of the view before do not end the round after the last stable one") {
  Group group(4, {}, 1);
  const Engine& observer = *group.engines[3];
  const RoundSpec spec = spec_for(Op::sum, 10, 64);
  for (std::size_t i = 0; i < 3; ++i) group.begin(i, spec, std::vector<float>(10, 1.0f));
  group.lost = [](std::size_t from, const Header& header) {
    const bool to_observer = header.dst == 3;
    return from == 2 && header.type == FrameType::done && (to_observer || header.seq == 1);
  };
  group.pump();
  std::uint64_t digest = 0;
  for (std::size_t i = 0; i < 3; ++i) digest = group.engines[i]->take_result(0, 0).digest;
  for (std::size_t i = 0; i < 3; ++i) group.begin(i, spec, std::vector<float>(10, 2.0f));
  group.pump();
  CHECK(observer.missed(0).empty());

  Install next = group.install;
  next.view.id += 1;
  next.answers = {1, 2};
  next.view.members.erase(next.view.members.begin() + 2);
  next.reported = 0b1011;
  next.tags = {{0, 0, digest}};
  for (const std::size_t i : {0, 1}) group.engines[i]->freeze(next.answers);
  for (const RoundReport& round : group.engines[3]->freeze(next.answers).rounds) {
    if (round.seq == 0) continue;  // closed elsewhere: the plan does not name it
    const ChunkReport& chunk = round.chunks.at(0);
    REQUIRE(chunk.born != 0);
    next.rounds.push_back({0, 1, spec, false, {}});
    next.rounds.back().chunks.push_back({ChunkPlan::Kind::value, kNoSlot, 0, chunk.digest,
                                         chunk.born, next.reported, chunk.contributors});
  }
  REQUIRE(next.rounds.size() == 1);
  REQUIRE(group.engines[3]->install(next, 0.0));
  CHECK(observer.missed(0) == std::vector<std::uint64_t>{0});
  for (const std::size_t i : {0, 1}) REQUIRE(group.engines[i]->install(next, 0.0));
  group.pump();
  CHECK(observer.missed(0) == std::vector<std::uint64_t>{0, 1});
}

// Who gave most of the last round is most of a quorum.
TEST_CASE("grace begins when a quorum by weight is in") {
  EngineOptions options;
  options.grace_s = 1.0;
  options.quorum = 0.6;
  Group group(3, options);
  const RoundSpec spec = spec_for(Op::mean, 400, 64);
  const double weights[] = {6.0, 1.0, 1.0};  // each owns some of the chunks, and learns them
  const auto begin = [&](std::size_t peer, float value) {
    group.begin(peer, spec, std::vector<float>(400, value), weights[peer]);
  };
  const auto later = [&] {
    group.pump();
    for (auto& engine : group.engines) engine->tick(2.0);
    group.pump();
  };
  for (std::size_t peer = 0; peer < 3; ++peer) begin(peer, 1.0f);
  group.pump();
  for (auto& engine : group.engines) CHECK(engine->take_result(0, 0).outcome == Outcome::stable);

  for (const std::size_t peer : {1, 2}) begin(peer, 2.0f);  // two of three, and a quarter of it
  later();
  for (const std::size_t peer : {1, 2}) CHECK_FALSE(group.engines[peer]->ready(0, 1));
  begin(0, 2.0f);
  later();
  for (auto& engine : group.engines) {
    CHECK(engine->take_result(0, 1).contributors == std::vector<SlotMask>(7, 0b111));
  }

  for (const std::size_t peer : {0, 1}) begin(peer, 3.0f);  // seven eighths
  later();
  for (const std::size_t peer : {0, 1}) {
    CHECK(group.engines[peer]->take_result(0, 2).contributors == std::vector<SlotMask>(7, 0b011));
  }
}

TEST_CASE("another specification changes nothing and is named") {
  Group group(2);
  group.begin(0, spec_for(Op::mean, 30000, 64), std::vector<float>(30000, 1.0f));
  group.begin(1, spec_for(Op::mean, 30000, 128), std::vector<float>(30000, 1.0f));
  group.pump();
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK_FALSE(group.engines[i]->ready(0, 0));
    const auto events = group.engines[i]->take_events();
    REQUIRE(events.size() == 1);
    CHECK(events[0].kind == EventKind::spec_mismatch);
    CHECK(events[0].peer == 101 - i);
  }
}
