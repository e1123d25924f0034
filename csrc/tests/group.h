// Engines that exchange frames without sockets, streams or faults of their own. For tests only.
#pragma once

#include <doctest/doctest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "engine.h"

namespace decotrain::test {

// Engines that exchange frames in a seeded order; no faults but what `lost` says. The last
// `observers` of them observe.
struct Group {
  explicit Group(std::size_t n, EngineOptions options = {}, std::size_t observers = 0) {
    install.view.id = (ViewId{1} << 32) | 1;
    install.answers = {1, 1};
    for (std::size_t i = 0; i < n; ++i) {
      engines.push_back(std::make_unique<Engine>(PeerId{100 + i}, options));
      const bool active = i + observers < n;
      install.view.members.push_back({100 + i, static_cast<std::uint8_t>(i), active, 1.0});
      install.reported |= SlotMask{1} << i;
    }
    for (auto& one : engines) {
      one->freeze({1, 1});
      REQUIRE(one->install(install, 0.0));
    }
  }

  // Moves up to `frames` frames.
  void pump(std::size_t frames = std::numeric_limits<std::size_t>::max()) {
    for (; frames > 0; --frames) {
      std::vector<std::pair<std::size_t, std::size_t>> ready;
      for (std::size_t i = 0; i < engines.size(); ++i) {
        for (std::size_t j = 0; j < engines.size(); ++j) {
          if (i != j && engines[i]->has_frames(100 + j)) ready.emplace_back(i, j);
        }
      }
      if (ready.empty()) return;
      const auto [i, j] = ready[rng() % ready.size()];
      OutFrame frame;
      if (!engines[i]->next_frame(100 + j, frame)) continue;
      if (lost && lost(i, frame.header)) continue;
      if (forge) forge(i, frame);
      accepted.push_back(give(i, j, frame));
    }
  }

  Accept give(std::size_t i, std::size_t j, const OutFrame& frame) {
    Incoming incoming = engines[j]->on_header(100 + i, frame.header, 0.0);
    const Accept accept = incoming.accept;
    if (accept != Accept::take) return accept;
    if (frame.header.payload_bytes > 0) {
      std::memcpy(incoming.target, frame.payload, frame.header.payload_bytes);
    }
    engines[j]->on_payload(100 + i, frame.header, std::move(incoming), 0.0);
    return accept;
  }

  std::uint64_t begin(std::size_t i, const RoundSpec& spec, const std::vector<float>& values,
                      double weight = 1.0) {
    auto copy = std::make_shared<std::vector<float>>(values);
    BeginArgs args;
    args.spec = spec;
    args.snapshot = {reinterpret_cast<const std::byte*>(copy->data()), copy};
    args.collect_bytes = spec.op == Op::collect ? values.size() * sizeof(float) : 0;
    args.weight = weight;
    return engines[i]->begin(std::move(args), 0.0);
  }

  std::vector<std::unique_ptr<Engine>> engines;
  Install install;
  std::function<bool(std::size_t from, const Header&)> lost;
  std::function<void(std::size_t from, OutFrame&)> forge;
  std::vector<Accept> accepted;  // what became of each frame
  std::mt19937 rng{7};
};

inline std::vector<float> decoded(const RoundResult& result) {
  std::vector<float> values;
  for (std::size_t c = 0; c < result.chunks.size(); ++c) {
    const std::size_t old = values.size();
    values.resize(old + result.chunk_bytes[c] / sizeof(float));
    if (result.chunk_bytes[c] > 0) {
      std::memcpy(values.data() + old, result.chunks[c], result.chunk_bytes[c]);
    }
  }
  return values;
}

inline RoundSpec spec_for(Op op, std::uint64_t elements, std::uint32_t chunk_elements) {
  RoundSpec spec;
  spec.op = op;
  spec.rule = op == Op::sum ? Rule::sum : Rule::mean;
  spec.elements = op == Op::collect ? 0 : elements;
  spec.chunk_elements = chunk_elements;
  return spec;
}

}  // namespace decotrain::test
