// Rounds whose bytes are encoded and decoded elsewhere, on a GPU say: encoded chunks in, as they
// become ready, and encoded results out. And what all rounds have in common: their options.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "python/arrays.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace decotrain {
namespace {

using EncodedArray = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Codec codec_of(const std::string& name) {
  const auto codec = codec_named(name);
  if (!codec) throw nb::value_error(("no codec is called " + name).c_str());
  return *codec;
}

RoundSpec spec_of(const BeginOptions& options, std::uint64_t elements) {
  RoundSpec spec;
  if (options.op != "mean" && options.op != "sum") {
    throw nb::value_error("op is 'mean' or 'sum'");
  }
  spec.op = options.op == "sum" ? Op::sum : Op::mean;
  const std::string rule = options.rule.value_or(options.op);
  const auto named = rule_named(rule);
  if (!named) throw nb::value_error(("no rule is called " + rule).c_str());
  spec.rule = *named;
  spec.rule_parameter = options.rule_parameter;
  spec.contribution = codec_of(options.codec);
  spec.result = codec_of(options.result_codec);
  spec.elements = elements;
  spec.chunk_elements = options.chunk_elements.value_or(default_chunk_elements(elements));
  if (const char* why = fault(spec); *why != '\0') throw nb::value_error(why);
  return spec;
}

std::shared_ptr<Work> begin_encoded(Node& node, const EncodedArray& encoded, std::uint64_t elements,
                                    std::uint32_t tag, const std::string& op,
                                    const std::string& codec, const std::string& result_codec,
                                    double weight, std::uint64_t state_digest,
                                    const std::optional<std::string>& rule, float rule_parameter,
                                    std::uint32_t chunk_elements,
                                    const std::optional<FlatFloats>& owner_residual) {
  release_dropped();
  BeginArgs args = args_of({tag, op, codec, result_codec, weight, state_digest, rule,
                            rule_parameter, chunk_elements, owner_residual},
                           elements);
  if (weight > 0.0) {
    if (encoded.size() != round_bytes(args.spec, args.spec.contribution)) {
      throw nb::value_error("the encoded bytes have a wrong length");
    }
    args.snapshot.bytes = reinterpret_cast<const std::byte*>(encoded.data());
    args.snapshot.keep = keep_arrays(std::vector<EncodedArray>{encoded});
    args.snapshot.ready = 0;
  }
  const nb::gil_scoped_release released;
  return node.begin(std::move(args));
}

void encoded_into(const RoundResult& result, const BytesOut& to) {
  const RoundSpec& spec = result.spec;
  if (spec.op == Op::collect || to.size() != round_bytes(spec, spec.result)) {
    throw nb::value_error("the buffer is not as long as the encoded result");
  }
  const nb::gil_scoped_release released;
  auto* at = reinterpret_cast<std::byte*>(to.data());
  for (std::uint32_t i = 0; i < result.chunks.size(); ++i) {
    const std::size_t bytes = encoded_bytes(spec.result, chunk_elements(spec, i));
    if (result.chunk_bytes[i] == 0) {
      std::memset(at, 0, bytes);  // which every codec decodes to zeros
    } else {
      std::memcpy(at, result.chunks[i], bytes);
    }
    at += bytes;
  }
}

}  // namespace

BeginArgs args_of(const BeginOptions& options, std::uint64_t elements) {
  if (!(options.weight >= 0.0) || !std::isfinite(options.weight)) {
    throw nb::value_error("weight is not below 0");
  }
  BeginArgs args;
  args.tag = options.tag;
  args.spec = spec_of(options, elements);
  args.weight = options.weight;
  args.state_digest = options.state_digest;
  if (options.owner_residual) {
    const FlatFloats& kept = *options.owner_residual;
    if (kept.size() != elements) {
      throw nb::value_error("the owner's residual has another number of elements than the buffers");
    }
    if (!valid(Codec::f32, reinterpret_cast<const std::byte*>(kept.data()), elements)) {
      throw nb::value_error("the owner's residual is not finite");
    }
    args.owner_residual = {kept.data(), keep_arrays(std::vector<FlatFloats>{kept})};
  }
  return args;
}

void bind_encoded(nb::module_& m, nb::class_<Node>& node, nb::class_<Held>& held) {
  m.def("round_chunk_elements", &default_chunk_elements, "elements"_a,
        "Elements of a chunk in a round of so many, when the caller names none.");
  using Guard = nb::call_guard<nb::gil_scoped_release>;
  node.def("begin_encoded", &begin_encoded, "encoded"_a, "elements"_a, nb::kw_only(), "tag"_a,
           "op"_a, "codec"_a, "result_codec"_a, "weight"_a, "state_digest"_a, "rule"_a.none(),
           "rule_parameter"_a, "chunk_elements"_a, "owner_residual"_a = nb::none(),
           "Begins a round with encoded chunks that need not be there yet: chunks_ready follows.")
      .def("chunks_ready", &Node::chunks_ready, "work"_a, "chunks"_a, Guard(),
           "So many chunks of a round of begin_encoded, from the first on, are there.")
      .def("abandon", &Node::abandon, "work"_a, Guard(),
           "The chunks that are not there will never be: our contribution ends here.");
  held.def_prop_ro("codec", [](const Held& h) { return codec_name(h.result->spec.result); })
      .def_prop_ro("chunk_elements", [](const Held& h) { return h.result->spec.chunk_elements; })
      .def(
          "encoded_into", [](const Held& h, const BytesOut& out) { encoded_into(*h.result, out); },
          "out"_a, "Copies the encoded result, chunk after chunk; zeros where nobody contributed.");
}

}  // namespace decotrain
