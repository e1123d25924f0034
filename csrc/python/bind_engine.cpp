// Engine for Python: what the simulator drives. Frames are bytes here, copied at every hop; a
// process uses Node instead, where they are not.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <string>

#include "buffers.h"
#include "engine.h"
#include "maps.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace decotrain {
namespace {

nb::bytes to_bytes(const std::byte* at, std::size_t size) {
  return nb::bytes(reinterpret_cast<const char*>(at), size);
}

std::span<const std::byte> view_of(const nb::bytes& bytes) {
  return {reinterpret_cast<const std::byte*>(bytes.c_str()), bytes.size()};
}

RoundSpec spec_of(const nb::bytes& packed) {
  const auto spec = unpack_spec(view_of(packed));
  if (!spec) throw nb::value_error("not a packed round specification");
  return *spec;
}

const char* name(Accept accept) {
  switch (accept) {
    case Accept::take:
      return "take";
    case Accept::drop:
      return "drop";
    case Accept::later:
      return "later";
    case Accept::refuse:
      return "refuse";
  }
  return "";
}

const char* name(EventKind kind) {
  switch (kind) {
    case EventKind::stable:
      return "stable";
    case EventKind::refused:
      return "refused";
    case EventKind::spec_mismatch:
      return "spec_mismatch";
    case EventKind::diverged:
      return "diverged";
    case EventKind::late_done:
      return "late_done";
    case EventKind::waived:
      return "waived";
    case EventKind::open:
      return "open";
  }
  return "";
}

const char* name(Outcome outcome) {
  return outcome == Outcome::stable ? "stable" : outcome == Outcome::lost ? "lost" : "left";
}

// Between a frame's header and its payload, so that the world may change in between.
struct Receiving {
  Header header;
  Incoming incoming;
};

std::optional<Header> header_of(const nb::bytes& frame) {
  if (frame.size() < kHeaderBytes) return std::nullopt;
  return parse(view_of(frame).first<kHeaderBytes>());
}

Receiving on_header(Engine& engine, PeerId from, const nb::bytes& frame, double now) {
  Receiving receiving;
  const auto header = header_of(frame);
  if (!header) {
    receiving.incoming = {Accept::refuse, nullptr, nullptr, "not a header"};
    return receiving;
  }
  receiving.header = *header;
  receiving.incoming = engine.on_header(from, *header, now);
  return receiving;
}

void on_payload(Engine& engine, PeerId from, Receiving& receiving, const nb::bytes& payload,
                double now) {
  if (receiving.incoming.accept != Accept::take) throw nb::value_error("the frame is not taken");
  if (payload.size() != receiving.header.payload_bytes) {
    throw nb::value_error("the payload has not the length its header says");
  }
  if (payload.size() > 0) {
    std::memcpy(receiving.incoming.target, payload.c_str(), payload.size());
  }
  Incoming incoming = std::move(receiving.incoming);
  receiving.incoming = {};
  engine.on_payload(from, receiving.header, std::move(incoming), now);
}

std::string on_frame(Engine& engine, PeerId from, const nb::bytes& frame, double now) {
  Receiving receiving = on_header(engine, from, frame, now);
  const Accept accept = receiving.incoming.accept;
  if (accept == Accept::take) {
    const auto payload = view_of(frame).subspan(kHeaderBytes);
    on_payload(engine, from, receiving, to_bytes(payload.data(), payload.size()), now);
  }
  return name(accept);
}

std::optional<nb::bytes> next_frame(Engine& engine, PeerId to) {
  OutFrame frame;
  if (!engine.next_frame(to, frame)) return std::nullopt;
  std::string out(kHeaderBytes + frame.header.payload_bytes, '\0');
  auto* const at = reinterpret_cast<std::byte*>(out.data());
  write(frame.header, std::span<std::byte, kHeaderBytes>(at, kHeaderBytes));
  if (frame.header.payload_bytes > 0) {
    std::memcpy(at + kHeaderBytes, frame.payload, frame.header.payload_bytes);
  }
  return nb::bytes(out.data(), out.size());
}

// Copies the caller's data; with `encoded` false they are float32 values, encoded here.
Snapshot snapshot_of(const RoundSpec& spec, std::span<const std::byte> data, bool encoded) {
  const std::uint32_t chunks = chunk_count(spec);
  std::size_t expected = 0;
  for (std::uint32_t c = 0; c < chunks; ++c) {
    const std::size_t elements = chunk_elements(spec, c);
    expected += encoded ? encoded_bytes(spec.contribution, elements) : elements * sizeof(float);
  }
  if (spec.op == Op::collect) expected = data.size();
  if (data.size() != expected) throw nb::value_error("data of a wrong length for this round");
  if (encoded || spec.op == Op::collect) {
    auto copy = allocate(data.size());
    if (!data.empty()) std::memcpy(copy.get(), data.data(), data.size());
    const std::byte* const at = copy.get();
    return {at, std::move(copy)};
  }
  std::vector<float> values(data.size() / sizeof(float));
  if (!data.empty()) std::memcpy(values.data(), data.data(), data.size());
  const std::size_t stride = encoded_bytes(spec.contribution, spec.chunk_elements);
  auto block = allocate(chunks * stride);
  for (std::uint32_t c = 0; c < chunks; ++c) {
    const std::span<const float> part(values.data() + std::size_t{c} * spec.chunk_elements,
                                      chunk_elements(spec, c));
    if (!encode(spec.contribution, part, block.get() + c * stride)) {
      throw nb::value_error("a value is not finite");
    }
  }
  const std::byte* const at = block.get();
  return {at, std::move(block)};
}

std::uint64_t begin(Engine& engine, std::uint32_t tag, const nb::bytes& packed,
                    std::optional<nb::bytes> data, double weight, std::uint64_t state_digest,
                    bool encoded, double now) {
  BeginArgs args;
  args.tag = tag;
  args.spec = spec_of(packed);
  args.weight = data ? weight : 0.0;
  args.state_digest = state_digest;
  if (data) {
    args.snapshot = snapshot_of(args.spec, view_of(*data), encoded);
    args.collect_bytes = args.spec.op == Op::collect ? data->size() : 0;
  }
  return engine.begin(std::move(args), now);
}

nb::bytes values(const RoundResult& result) {
  std::string out;
  for (std::size_t c = 0; c < result.chunks.size(); ++c) {
    if (result.chunk_bytes[c] == 0) continue;
    out.append(reinterpret_cast<const char*>(result.chunks[c]), result.chunk_bytes[c]);
  }
  return nb::bytes(out.data(), out.size());
}

nb::bytes chunk_bytes(const RoundResult& result, std::size_t chunk) {
  if (chunk >= result.chunks.size()) throw nb::index_error("no such chunk");
  return to_bytes(result.chunks[chunk], result.chunk_bytes[chunk]);
}

nb::list events(Engine& engine) {
  nb::list out;
  for (const Event& event : engine.take_events()) {
    nb::dict one;
    one["kind"] = name(event.kind);
    one["tag"] = event.tag;
    one["seq"] = event.seq;
    one["peer"] = event.peer;
    one["detail"] = event.detail;
    out.append(one);
  }
  return out;
}

nb::bytes pack_spec(std::uint8_t op, std::uint8_t rule, std::uint8_t contribution,
                    std::uint8_t result, float rule_parameter, std::uint64_t elements,
                    std::uint32_t chunk_elements_each, std::uint8_t ahead) {
  if (op > 2 || rule >= kRuleCount || contribution >= kCodecCount || result >= kCodecCount) {
    throw nb::value_error("operation, rule or codec out of range");
  }
  RoundSpec spec{static_cast<Op>(op),
                 static_cast<Rule>(rule),
                 static_cast<Codec>(contribution),
                 static_cast<Codec>(result),
                 rule_parameter,
                 elements,
                 chunk_elements_each,
                 ahead};
  if (const char* why = fault(spec); *why != '\0') throw nb::value_error(why);
  const auto bytes = pack(spec);
  return to_bytes(bytes.data(), bytes.size());
}

void bind_results(nb::module_& m) {
  nb::class_<RoundResult>(m, "RoundResult")
      .def_ro("tag", &RoundResult::tag)
      .def_ro("seq", &RoundResult::seq)
      .def_ro("view", &RoundResult::view)
      .def_ro("digest", &RoundResult::digest)
      .def_ro("begun", &RoundResult::begun)
      .def_ro("contributors", &RoundResult::contributors)
      .def_ro("chunk_bytes", &RoundResult::chunk_bytes)
      .def_ro("peers", &RoundResult::peers)
      .def_prop_ro("outcome", [](const RoundResult& r) { return name(r.outcome); })
      .def_prop_ro("values", &values, "All chunks, encoded, one after the other.")
      .def("chunk", &chunk_bytes, "chunk"_a);
  nb::class_<Receiving>(m, "Receiving")
      .def_prop_ro("accept", [](const Receiving& r) { return name(r.incoming.accept); })
      .def_prop_ro("reason", [](const Receiving& r) { return r.incoming.reason; })
      .def_prop_ro("payload_bytes", [](const Receiving& r) { return r.header.payload_bytes; });
}

}  // namespace
}  // namespace decotrain

void bind_engine(nb::module_& m) {
  using namespace decotrain;
  bind_results(m);
  m.def("pack_spec", &pack_spec, "op"_a = 0, "rule"_a = 0, "contribution"_a = 0, "result"_a = 0,
        "rule_parameter"_a = 0.0f, "elements"_a = 0, "chunk_elements"_a = 262144, "ahead"_a = 0);
  m.def("digest", [](const nb::bytes& bytes) { return digest(view_of(bytes)); }, "data"_a);
  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* at, PeerId peer, double grace_s, double quorum, double done_bound_s,
             std::size_t parked_bytes, std::size_t missed_rounds, std::size_t missed_bytes) {
            new (at) Engine(
                peer, {grace_s, quorum, done_bound_s, parked_bytes, missed_rounds, missed_bytes});
          },
          "peer"_a, "grace_s"_a = 0.0, "quorum"_a = 1.0, "done_bound_s"_a = 0.0,
          "parked_bytes"_a = EngineOptions{}.parked_bytes,
          "missed_rounds"_a = EngineOptions{}.missed_rounds,
          "missed_bytes"_a = EngineOptions{}.missed_bytes)
      .def("begin", &begin, "tag"_a, "spec"_a, "data"_a.none(), "weight"_a = 1.0,
           "state_digest"_a = 0, "encoded"_a = true, "now"_a = 0.0,
           "Copies `data` and begins the tag's next round; None contributes nothing.")
      .def("may_begin", &Engine::may_begin, "tag"_a, "ahead"_a = 0)
      .def("next", &Engine::next, "tag"_a)
      .def("ready", &Engine::ready, "tag"_a, "seq"_a)
      .def("take_result", &Engine::take_result, "tag"_a, "seq"_a)
      .def("missed", &Engine::missed, "tag"_a)
      .def("declare", &Engine::declare, "covered"_a)
      .def("set_covered", &Engine::set_covered, "tag"_a, "seq"_a)
      .def("next_frame", &next_frame, "peer"_a)
      .def("has_frames", &Engine::has_frames, "peer"_a)
      .def("on_frame", &on_frame, "peer"_a, "frame"_a, "now"_a)
      .def("on_header", &on_header, "peer"_a, "frame"_a, "now"_a)
      .def("on_payload", &on_payload, "peer"_a, "receiving"_a, "payload"_a, "now"_a)
      .def("on_link_reset", &Engine::on_link_reset, "peer"_a, "now"_a)
      .def("tick", &Engine::tick, "now"_a)
      .def("next_deadline", &Engine::next_deadline)
      .def(
          "freeze",
          [](Engine& engine, std::uint32_t term, std::uint64_t number) {
            return to_map(engine.freeze({term, number}));
          },
          "term"_a, "number"_a)
      .def(
          "install",
          [](Engine& engine, const nb::dict& map, double now) {
            return engine.install(install_from_map(map), now);
          },
          "plan"_a, "now"_a)
      .def("view", [](const Engine& engine) { return to_map(engine.view()); })
      .def_prop_ro("frozen", &Engine::frozen)
      .def("take_events", &events)
#ifdef DT_PLANT
      .def(
          "plant", [](Engine& engine, std::uint8_t bug) { engine.plant(static_cast<Plant>(bug)); },
          "bug"_a)
#endif
      ;
}
