// Class Node for Python: a peer's data plane. Every call that may wait lets go of the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <nanobind/typing.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "buffers.h"
#include "node.h"
#include "python/arrays.h"
#include "python/maps.h"
#include "segments.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace decotrain {
namespace {

using Map = nb::typed<nb::dict, nb::str, nb::any>;
using Items = nb::typed<nb::list, nb::any>;  // of buffers
using FloatsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The caller's arrays, and what keeps them alive while the core reads them.
template <typename Array>
struct Buffers {
  Segments segments;
  std::vector<Array> arrays;
};

// An array, or (array of 16-bit words, "bf16") where the library has no bfloat16 to export.
template <typename Array>
Segment segment_of(nb::handle item, std::size_t index, std::vector<Array>& arrays) {
  std::string named;
  nb::object holder = nb::borrow(item);
  if (nb::isinstance<nb::tuple>(item) && nb::len(item) == 2) {
    named = nb::cast<std::string>(item[1]);
    holder = nb::borrow(item[0]);
  }
  Array array;
  if (!nb::try_cast(holder, array, false)) {
    throw nb::type_error(("buffer " + std::to_string(index) +
                          " is no contiguous (and, to be written to, writable) array in CPU memory")
                             .c_str());
  }
  const nb::dlpack::dtype type = array.dtype();
  Segment segment;
  if (type == nb::dtype<float>()) {
    segment.type = Codec::f32;
  } else if (type == kBf16 || (type == kU16 && named == codec_name(Codec::bf16))) {
    segment.type = Codec::bf16;
  } else if (type == kF16) {
    segment.type = Codec::f16;
  } else {
    throw nb::type_error(("buffer " + std::to_string(index) + " is not f32, bf16 or f16").c_str());
  }
  // Read-only arrays are read only: begin() takes them, decode_into() does not.
  segment.data = const_cast<std::byte*>(static_cast<const std::byte*>(array.data()));
  segment.elements = array.size();
  arrays.push_back(std::move(array));
  return segment;
}

template <typename Array>
Buffers<Array> buffers_of(const Items& items) {
  Buffers<Array> out;
  for (std::size_t i = 0; i < items.size(); ++i) {
    out.segments.push_back(segment_of(items[i], i, out.arrays));
  }
  return out;
}

std::shared_ptr<Work> begin(Node& node, const Items& items, std::uint32_t tag,
                            const std::string& op, const std::string& codec,
                            const std::optional<std::string>& result_codec, double weight,
                            bool borrow, const std::optional<Items>& residual,
                            std::uint64_t state_digest, const std::optional<std::string>& rule,
                            float rule_parameter, std::optional<std::uint32_t> chunk_elements,
                            std::optional<std::uint64_t> chance,
                            const std::optional<FlatFloats>& owner_residual) {
  release_dropped();
  Buffers<ReadArray> from = buffers_of<ReadArray>(items);
  Buffers<WriteArray> feedback;
  if (residual) feedback = buffers_of<WriteArray>(*residual);
  if (residual && total_elements(feedback.segments) != total_elements(from.segments)) {
    throw nb::value_error("the residual has another number of elements than the buffers");
  }
  BeginArgs args = args_of({tag, op, codec, result_codec.value_or(codec), weight, state_digest,
                            rule, rule_parameter, chunk_elements, owner_residual},
                           total_elements(from.segments));
  if (chance && (residual || !has_stochastic(args.spec.contribution))) {
    throw nb::value_error("stochastic rounding is for int8, e2m1 and e3m0 without a residual");
  }
  const std::shared_ptr<const void> owner =
      borrow ? keep_arrays(std::move(from.arrays)) : std::shared_ptr<const void>{};
  std::optional<std::size_t> bad;
  std::shared_ptr<Work> work;
  {
    const nb::gil_scoped_release released;
    try {
      if (weight > 0.0) {
        args.snapshot =
            encode_segments(args.spec, from.segments, feedback.segments, borrow, owner, chance);
      }
      const RoundSpec spec = args.spec;
      const Snapshot sent = args.snapshot;
      work = node.begin(std::move(args));
      // Only now: a contribution that is refused has changed nothing.
      if (sent.bytes != nullptr && residual) {
        keep_lost(spec, from.segments, feedback.segments, sent.bytes);
      }
    } catch (const NotFinite& error) {
      bad = error.segment;
    }
  }
  if (bad) {
    throw nb::value_error(("buffer " + std::to_string(*bad) + " contains NaN or infinity").c_str());
  }
  return work;
}

std::shared_ptr<Work> collect(Node& node, const std::optional<nb::bytes>& data, std::uint32_t tag,
                              std::uint32_t max_bytes, std::uint64_t state_digest,
                              std::uint8_t ahead) {
  if (data && data->size() > max_bytes) throw nb::value_error("more bytes than max_bytes");
  BeginArgs args;
  args.tag = tag;
  args.spec.op = Op::collect;
  args.spec.chunk_elements = max_bytes;
  args.spec.ahead = ahead;
  if (const char* why = fault(args.spec); *why != '\0') throw nb::value_error(why);
  args.state_digest = state_digest;
  args.weight = data ? 1.0 : 0.0;
  if (data) {
    auto copy = std::make_shared<std::vector<std::byte>>(std::max<std::size_t>(data->size(), 1));
    std::memcpy(copy->data(), data->data(), data->size());
    args.collect_bytes = data->size();
    args.snapshot = {copy->data(), copy};
  }
  const nb::gil_scoped_release released;
  return node.begin(std::move(args));
}

const char* outcome_name(Outcome outcome) {
  switch (outcome) {
    case Outcome::stable:
      return "stable";
    case Outcome::lost:
      return "lost";
    case Outcome::left:
      return "left";
  }
  return "unknown";
}

// Peer ids of a set of slots.
std::vector<PeerId> peers_in(const RoundResult& result, SlotMask mask) {
  std::vector<PeerId> out;
  for (const auto& [slot, peer] : result.peers) {
    if ((mask >> slot & 1) != 0) out.push_back(peer);
  }
  return out;
}

SlotMask any_contributor(const RoundResult& result) {
  SlotMask all = 0;
  for (const SlotMask mask : result.contributors) all |= mask;
  return all;
}

std::vector<std::vector<PeerId>> chunk_contributors(const RoundResult& result) {
  std::vector<std::vector<PeerId>> out;
  for (const SlotMask mask : result.contributors) out.push_back(peers_in(result, mask));
  return out;
}

bool is_partial(const RoundResult& result) {
  if (result.spec.op == Op::collect) return false;
  const SlotMask all = any_contributor(result);
  for (const SlotMask mask : result.contributors) {
    if (mask != all || mask == 0) return true;
  }
  return false;
}

nb::typed<nb::dict, int, nb::bytes> parts(const RoundResult& result) {
  nb::dict out;
  if (result.spec.op != Op::collect) throw nb::type_error("only a collect round has parts");
  for (std::size_t slot = 0; slot < result.chunks.size(); ++slot) {
    if (result.contributors[slot] == 0) continue;
    out[nb::int_(slot)] = nb::bytes(result.chunks[slot], result.chunk_bytes[slot]);
  }
  return out;
}

void decode_into(const RoundResult& result, const Items& items) {
  const Buffers<WriteArray> to = buffers_of<WriteArray>(items);
  const nb::gil_scoped_release released;
  decode_segments(result, to.segments);
}

// Into an owner's residual: what the values that we made have lost, where they stand.
void keep_lost_of(const RoundResult& result, const FloatsOut& residual) {
  if (residual.size() != result.spec.elements) {
    throw nb::value_error("the owner's residual has another number of elements than the result");
  }
  for (const Lost& one : result.lost) {
    const std::size_t count = chunk_elements(result.spec, one.chunk);
    std::copy_n(one.values.get(), count,
                residual.data() + std::size_t{one.chunk} * result.spec.chunk_elements);
  }
}

// The result's floats where they lie; None when they are not one span of f32.
nb::object view_f32(const std::shared_ptr<const RoundResult>& result) {
  const bool floats = result->spec.op != Op::collect && result->spec.result == Codec::f32;
  if (!floats || result->chunks.empty()) return nb::none();
  for (std::size_t i = 0; i < result->chunks.size(); ++i) {
    const auto* const end = i > 0 ? result->chunks[i - 1] + result->chunk_bytes[i - 1] : nullptr;
    if (result->chunk_bytes[i] == 0 || (i > 0 && result->chunks[i] != end)) return nb::none();
  }
  using View = nb::ndarray<nb::numpy, const float, nb::ndim<1>>;
  const nb::capsule owner(new Held{result}, [](void* p) noexcept { delete static_cast<Held*>(p); });
  return nb::cast(View(result->chunks[0], {result->spec.elements}, owner));
}

Map event_dict(const NodeEvent& event) {
  nb::dict out;
  out["kind"] = event.kind;
  out["tag"] = event.tag;
  out["seq"] = event.seq;
  out["peer"] = event.peer;
  out["detail"] = event.detail;
  return out;
}

Map link_dict(const net::LinkStats& link) {
  nb::dict out;
  out["peer"] = link.peer;
  out["up"] = link.up;
  out["ours"] = link.ours;
  out["unix"] = link.is_unix;
  out["tls"] = link.is_tls;
  out["shared"] = link.is_shared;
  out["streams"] = link.streams;
  out["sent_bytes"] = link.sent_bytes;
  out["received_bytes"] = link.received_bytes;
  out["rtt_s"] = link.rtt_s;
  out["rate_bps"] = link.rate_bps;
  out["pace_bps"] = link.pace_bps;
  out["congestion"] = link.congestion;
  out["via"] = link.via;
  return out;
}

void make_node(Node* at, PeerId peer, const std::vector<std::string>& listen,
               std::uint64_t run_fingerprint, std::size_t streams, bool force_tcp,
               double link_timeout_s, double grace_s, double quorum, double done_bound_s,
               const nb::bytes& tls_key, bool pair_keys, const std::string& congestion, bool pace,
               bool shared_memory) {
  NodeOptions options;
  const bool whole_key = tls_key.size() == 0 || tls_key.size() == net::kTlsKeyBytes;
  if (!whole_key) throw nb::value_error("tls_key has 32 bytes, or none");
  options.mesh.run_fingerprint = run_fingerprint;
  options.mesh.tls_key.assign(tls_key.c_str(), tls_key.size());
  options.mesh.pair_keys = pair_keys;
  options.mesh.streams = streams;
  options.mesh.force_tcp = force_tcp;
  if (!shared_memory) options.mesh.shared_bytes = 0;
  options.mesh.link_timeout_s = link_timeout_s;
  options.mesh.socket.congestion = congestion;
  options.mesh.socket.pace = pace;
  options.engine.grace_s = grace_s;
  options.engine.quorum = quorum;
  options.engine.done_bound_s = done_bound_s;
  new (at) Node(peer, listen, options);
}

using PeerTuple = std::tuple<PeerId, std::uint8_t, std::vector<std::string>>;
void set_peers(Node& node, const std::vector<PeerTuple>& peers,
               const std::map<PeerId, nb::bytes>& keys) {
  std::vector<net::PeerInfo> out;
  for (const auto& [peer, slot, addresses] : peers) {
    net::PeerInfo info{peer, slot, addresses};
    if (const auto it = keys.find(peer); it != keys.end()) {
      if (it->second.size() != net::kTlsKeyBytes)
        throw nb::value_error("a pair's key has 32 bytes");
      info.pair_key.assign(it->second.c_str(), it->second.size());
    }
    out.push_back(std::move(info));
  }
  const nb::gil_scoped_release released;
  node.set_peers(std::move(out));
}

template <typename Item, typename Convert>
nb::typed<nb::list, Map> list_of(const std::vector<Item>& items, Convert convert) {
  nb::list out;
  for (const Item& item : items) out.append(convert(item));
  return out;
}

Map freeze(Node& node, std::uint32_t term, std::uint64_t number) {
  Report report;
  {
    const nb::gil_scoped_release released;
    report = node.freeze({term, number});
  }
  return to_map(report);
}

bool install(Node& node, const Map& plan) {
  const Install install = install_from_map(plan);
  const nb::gil_scoped_release released;
  return node.install(install);
}

Map view_of(Node& node) {
  View view;
  {
    const nb::gil_scoped_release released;
    view = node.view();
  }
  return to_map(view);
}

nb::class_<Held> bind_results(nb::module_& m) {
  nb::class_<Held> type(m, "Result", "What a round gave: the same bits on every peer.");
  type.def_prop_ro("tag", [](const Held& h) { return h.result->tag; })
      .def_prop_ro("seq", [](const Held& h) { return h.result->seq; })
      .def_prop_ro("digest", [](const Held& h) { return h.result->digest; })
      .def_prop_ro("view", [](const Held& h) { return h.result->view; })
      .def_prop_ro("begun", [](const Held& h) { return h.result->begun; })
      .def_prop_ro(
          "withdrawn", [](const Held& h) { return h.result->withdrawn; },
          "The borrowed buffer holds NaN or infinity; chunks that show it lack our contribution.")
      .def_prop_ro("outcome", [](const Held& h) { return outcome_name(h.result->outcome); })
      .def_prop_ro("elements", [](const Held& h) { return h.result->spec.elements; })
      .def_prop_ro(
          "contributors",
          [](const Held& h) { return peers_in(*h.result, any_contributor(*h.result)); },
          "Peer ids in at least one chunk, by slot.")
      .def_prop_ro(
          "slots", [](const Held& h) { return any_contributor(*h.result); },
          "Of the contributors when the round was made, a bit for each.")
      .def_prop_ro(
          "chunk_contributors", [](const Held& h) { return chunk_contributors(*h.result); },
          "Peer ids, for each chunk.")
      .def_prop_ro(
          "partial", [](const Held& h) { return is_partial(*h.result); },
          "Some chunk lacks a contributor that another one has, or nobody contributed.")
      .def(
          "parts", [](const Held& h) { return parts(*h.result); },
          "Of a collect round: slot -> bytes.")
      .def(
          "decode_into",
          [](const Held& h, const Items& buffers) { decode_into(*h.result, buffers); }, "buffers"_a,
          "Writes the result to a list of arrays; zeros where nobody contributed.")
      .def(
          "keep_lost",
          [](const Held& h, const FloatsOut& residual) { keep_lost_of(*h.result, residual); },
          "owner_residual"_a,
          "Of a round begun with this residual: replaces its parts by what our values lost.")
      .def(
          "view_f32", [](const Held& h) { return view_f32(h.result); },
          "A read-only view of an f32 result in one piece, or None.");
  nb::class_<Work>(m, "Work", "A round that was begun.")
      .def_prop_ro("tag", &Work::tag)
      .def_prop_ro("seq", &Work::seq)
      .def("done", &Work::done)
      .def("wait", &Work::wait, "timeout_s"_a = -1.0, nb::call_guard<nb::gil_scoped_release>(),
           "False when the time is over first. Below zero: no bound.")
      .def(
          "result",
          [](const Work& work) {
            release_dropped();
            auto result = work.result();
            return result ? std::optional(Held{std::move(result)}) : std::nullopt;
          },
          "After wait(). None: missed results must be taken before this round can begin.");
  return type;
}

nb::typed<nb::list, Map> links_of(Node& node) {
  std::vector<net::LinkStats> links;
  {
    const nb::gil_scoped_release released;
    links = node.links();
  }
  return list_of(links, link_dict);
}

}  // namespace
}  // namespace decotrain

void bind_node(nb::module_& m) {
  using namespace decotrain;
  bind_pool(m);
  nb::class_<Held> held = bind_results(m);
  bind_fetch(m);
  using Guard = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Node> type(m, "Node", "A peer's rounds and links, on a thread of its own.");
  type.def("__init__", &make_node, "peer"_a, "listen"_a, "run_fingerprint"_a, nb::kw_only(),
           "streams"_a = 0, "force_tcp"_a = false, "link_timeout_s"_a = 5.0, "grace_s"_a = 0.0,
           "quorum"_a = 1.0, "done_bound_s"_a = 0.0, "tls_key"_a = nb::bytes("", 0),
           "pair_keys"_a = false, "congestion"_a = net::SocketOptions{}.congestion, "pace"_a = true,
           "shared_memory"_a = true)
      .def_prop_ro("peer", &Node::self)
      .def_prop_ro("addresses", &Node::addresses)
      .def_prop_ro("event_fd", &Node::event_fd, "Readable while there are events.")
      .def("begin", &begin, "buffers"_a, nb::kw_only(), "tag"_a = 0, "op"_a = "mean",
           "codec"_a = "f32", "result_codec"_a = nb::none(), "weight"_a = 1.0, "borrow"_a = false,
           "residual"_a = nb::none(), "state_digest"_a = 0, "rule"_a = nb::none(),
           "rule_parameter"_a = 0.0f, "chunk_elements"_a = nb::none(), "chance"_a = nb::none(),
           "owner_residual"_a = nb::none(),
           "Begins the tag's next round with the buffers as one flat space; returns at once.")
      .def("collect", &collect, "data"_a.none(), nb::kw_only(), "tag"_a = 0,
           "max_bytes"_a = 1 << 16, "state_digest"_a = 0, "ahead"_a = 0)
      .def("missed", &Node::missed, "tag"_a, Guard())
      .def(
          "take_missed",
          [](Node& node, std::uint32_t tag) {
            std::vector<Held> out;
            for (auto& result : node.take_missed(tag)) out.push_back({std::move(result)});
            return out;
          },
          "tag"_a, Guard())
      .def("declare", &Node::declare, "covered"_a, Guard())
      .def("set_covered", &Node::set_covered, "tag"_a, "seq"_a, Guard())
      .def("freeze", &freeze, "term"_a, "number"_a, "Stops rounds; the report (docs/protocol.md).")
      .def("install", &install, "plan"_a, "False when it does not answer the newest freeze.")
      .def_prop_ro("view", &view_of)
      .def("set_peers", &set_peers, "peers"_a, "keys"_a = nb::dict(),
           "Everybody in the view: (peer, slot, addresses), and keys of TLS that we share with one "
           "of them alone.")
      .def("set_route", &Node::set_route, "peer"_a, "via"_a, Guard())
      .def(
          "events", [](Node& node) { return list_of(node.take_events(), event_dict); },
          "What happened since the last call: kind, tag, seq, peer, detail.")
      .def("links", &links_of,
           "One map for each link: peer, up, ours, unix, tls, streams, bytes, rates, congestion, "
           "via.")
      .def(
          "measures",
          [](Node& node) {
            const Node::Measures seen = [&] {
              const nb::gil_scoped_release released;
              return node.measures();
            }();
            nb::dict held_up;
            for (const auto& [peer, seconds] : seen.held_up_s) held_up[nb::int_(peer)] = seconds;
            Map out;
            out["uplink_bps"] = seen.uplink_bps;
            out["held_up_s"] = held_up;
            out["sent_bytes"] = seen.traffic.sent_bytes;
            out["received_bytes"] = seen.traffic.received_bytes;
            return out;
          },
          "uplink_bps (0: not measured), for whose contributions alone we waited how long, and "
          "bytes "
          "over all links there ever were.")
      .def("close", &Node::close, Guard());
  bind_encoded(m, type, held);
  bind_state(type);
}
