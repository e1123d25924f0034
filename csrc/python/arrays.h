// Python's arrays as memory of the core, and how they are let go.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <vector>

#include "node.h"

namespace decotrain {

using ReadArray = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;
using WriteArray = nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>;

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

void bind_fetch(nanobind::module_& m);
void bind_pool(nanobind::module_& m);
void bind_state(nanobind::class_<Node>& node);

}  // namespace decotrain
