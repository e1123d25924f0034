// Shared state for Python: what Node serves and fetches; and what memory the rounds use.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>
#include <nanobind/typing.h>

#include <mutex>
#include <string>

#include "buffers.h"
#include "node.h"
#include "python/arrays.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace decotrain {
namespace {

using Guard = nb::call_guard<nb::gil_scoped_release>;
using Items = nb::typed<nb::list, nb::any>;  // of arrays

struct Heap {
  std::mutex mutex;
  std::vector<std::shared_ptr<void>> arrays;
};

Heap& heap() {
  static Heap* const one = new Heap;  // never destroyed: nodes may outlive static objects
  return *one;
}

template <typename Array>
StatePieces pieces_of(const Items& items, std::vector<Array>& arrays) {
  std::vector<StateArray> out;
  for (std::size_t i = 0; i < items.size(); ++i) {
    Array array;
    if (!nb::try_cast(nb::borrow(items[i]), array, false)) {
      throw nb::type_error(
          ("array " + std::to_string(i) + " is not contiguous (and, to be fetched into, writable)")
              .c_str());
    }
    // Published arrays are only read.
    auto* data = const_cast<std::byte*>(static_cast<const std::byte*>(array.data()));
    out.push_back({{data, array.nbytes()}, array.size()});
    arrays.push_back(std::move(array));
  }
  return StatePieces(out);
}

void publish(Node& node, std::uint32_t tag, const Items& items, std::uint64_t version,
             std::uint64_t kind) {
  release_dropped();
  std::vector<ReadArray> arrays;
  StatePieces pieces = pieces_of(items, arrays);
  auto keep = keep_arrays(std::move(arrays));
  const nb::gil_scoped_release released;
  node.store().publish(tag, std::move(pieces), version, std::move(keep), kind);
}

std::shared_ptr<FetchWork> fetch(Node& node, std::uint32_t tag, std::vector<PeerId> peers,
                                 const Items& into, bool follows, std::uint64_t kind) {
  release_dropped();
  std::vector<WriteArray> arrays;
  StatePieces pieces = pieces_of(into, arrays);
  auto keep = keep_arrays(std::move(arrays));
  const nb::gil_scoped_release released;
  return node.fetch(tag, std::move(peers), std::move(pieces), follows, std::move(keep), kind);
}

}  // namespace

void drop_later(std::shared_ptr<void> arrays) {
  const std::lock_guard lock(heap().mutex);
  heap().arrays.push_back(std::move(arrays));
}

void release_dropped() {
  std::vector<std::shared_ptr<void>> old;
  {
    const std::lock_guard lock(heap().mutex);
    old.swap(heap().arrays);
  }
}

void bind_fetch(nb::module_& m) {
  nb::class_<FetchWork>(m, "Fetch", "A fragment on its way into the caller's arrays.")
      .def("done", &FetchWork::done)
      .def("wait", &FetchWork::wait, "timeout_s"_a = -1.0, Guard(),
           "False when the time is over first. Below zero: no bound.")
      .def("wait_quiet", &FetchWork::wait_quiet, "timeout_s"_a, Guard(),
           "False when the time is over before every request is answered.")
      .def_prop_ro(
          "version", [](const FetchWork& work) { return work.progress().version; },
          "Of the pieces here; final when done.")
      .def_prop_ro("bytes", [](const FetchWork& work) { return work.progress().bytes; })
      .def_prop_ro(
          "other_bytes", [](const FetchWork& work) { return work.progress().other_bytes; },
          "The size of what all servers hold instead: another size, or another kind. 0: it fits.")
      .def_prop_ro("total_bytes", [](const FetchWork& work) { return work.progress().total_bytes; })
      .def_prop_ro(
          "restarts", [](const FetchWork& work) { return work.progress().restarts; },
          "How often the version moved and everything was asked for again.")
      .def_prop_ro(
          "damaged", [](const FetchWork& work) { return work.progress().damaged; },
          "Pieces whose digest was wrong; they were asked for again.");
}

void bind_state(nb::class_<Node>& node) {
  node.def("publish", &publish, "tag"_a, "arrays"_a, "version"_a, "kind"_a = 0,
           "Serves the arrays from where they lie: write to them only between begin_update and "
           "end_update. `kind`, a digest of what they are, is compared with the fetcher's.")
      .def(
          "withdraw", [](Node& n, std::uint32_t tag) { n.store().withdraw(tag); }, "tag"_a, Guard())
      .def(
          "begin_update", [](Node& n, std::uint32_t tag) { n.store().begin_update(tag); }, "tag"_a,
          Guard())
      .def(
          "end_update",
          [](Node& n, std::uint32_t tag, std::uint64_t version) {
            n.store().end_update(tag, version);
          },
          "tag"_a, "version"_a, Guard())
      .def(
          "published_version", [](Node& n, std::uint32_t tag) { return n.store().version(tag); },
          "tag"_a)
      .def(
          "fetch", &fetch, "tag"_a, "peers"_a, "into"_a, "follows"_a = false, "kind"_a = 0,
          "Pulls the fragment from these peers; the arrays belong to the fetch until it is done or "
          "cancelled. With `follows` it does not start again when the version moves: the caller "
          "moves what is there along, with pause_fetch, lock_fetch and advance_fetch.")
      .def("pause_fetch", &Node::pause_fetch, "fetch"_a, Guard(),
           "No more requests until advance_fetch.")
      .def("lock_fetch", &Node::lock_fetch, "fetch"_a, Guard(),
           "The arrays are the caller's until advance_fetch. False: the fetch has ended.")
      .def("advance_fetch", &Node::advance_fetch, "fetch"_a, "version"_a, Guard(),
           "What is there has moved to this version.")
      .def("set_fetch_peers", &Node::set_fetch_peers, "fetch"_a, "peers"_a, Guard(),
           "Others to ask from now on; what is fetched stays.")
      .def("cancel", &Node::cancel, "fetch"_a, Guard());
}

void bind_pool(nb::module_& m) {
  m.def(
      "pool_figures",
      [](bool reset) {
        const PoolFigures figures = pool_figures(reset);
        nb::typed<nb::dict, nb::str, nb::any> out;
        out["in_use_bytes"] = figures.in_use_bytes;
        out["peak_bytes"] = figures.peak_bytes;
        out["free_bytes"] = figures.free_bytes;
        return out;
      },
      "reset_peak"_a = false, "Memory of all rounds of this process: in use, at most, kept free.");
}

}  // namespace decotrain
