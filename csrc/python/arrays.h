// Python's arrays as memory of the core, and how they are let go.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "node.h"

namespace decotrain {

using ReadArray = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;
using WriteArray = nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>;

using FlatFloats =
    nanobind::ndarray<const float, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

inline constexpr nanobind::dlpack::dtype kBf16{
    static_cast<std::uint8_t>(nanobind::dlpack::dtype_code::Bfloat), 16, 1};
inline constexpr nanobind::dlpack::dtype kF16{
    static_cast<std::uint8_t>(nanobind::dlpack::dtype_code::Float), 16, 1};
inline constexpr nanobind::dlpack::dtype kU16{
    static_cast<std::uint8_t>(nanobind::dlpack::dtype_code::UInt), 16, 1};

// Arrays belong to Python, but their last user is mostly the network thread, which never takes the
// GIL: it leaves them on a heap, and the next call from Python lets them go.
void drop_later(std::shared_ptr<void> arrays);
void release_dropped();  // with the GIL

template <typename Array>
std::shared_ptr<const void> keep_arrays(std::vector<Array> arrays) {
  auto* held = new std::vector<Array>(std::move(arrays));
  return {static_cast<const void*>(held),
          [held](const void*) { drop_later(std::shared_ptr<std::vector<Array>>(held)); }};
}

// The words of Python for a round, and what they ask for; ValueError when they make no sense.
struct BeginOptions {
  std::uint32_t tag;
  std::string op, codec, result_codec;
  double weight;
  std::uint64_t state_digest;
  std::optional<std::string> rule;
  float rule_parameter;
  std::optional<std::uint32_t> chunk_elements;
  std::optional<FlatFloats> owner_residual;
};
BeginArgs args_of(const BeginOptions& options, std::uint64_t elements);

// The engine's binding has RoundResult itself, for tests; this is the one that users see.
struct Held {
  std::shared_ptr<const RoundResult> result;
};

void bind_encoded(nanobind::module_& m, nanobind::class_<Node>& node, nanobind::class_<Held>& held);
void bind_fetch(nanobind::module_& m);
void bind_pool(nanobind::module_& m);
void bind_state(nanobind::class_<Node>& node);

}  // namespace decotrain
