// Bindings of csrc/codec: flat buffers in and out. Checks names and lengths; the GIL is released
// while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "codec/codec.h"
#include "codec/topk.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using decotrain::Codec;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Residual = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void bad(const std::string& what) { throw std::invalid_argument(what); }

Codec codec_of(const std::string& name) {
  const auto codec = decotrain::codec_named(name);
  if (!codec) bad("there is no codec '" + name + "'");
  return *codec;
}

void check_bytes(Codec codec, std::size_t elements, std::size_t bytes) {
  const std::size_t wanted = decotrain::encoded_bytes(codec, elements);
  if (bytes != wanted) {
    bad(std::to_string(elements) + " values of " + decotrain::codec_name(codec) + " take " +
        std::to_string(wanted) + " bytes, not " + std::to_string(bytes));
  }
}

const std::byte* raw(const Bytes& bytes) {
  return reinterpret_cast<const std::byte*>(bytes.data());
}
std::byte* raw(const BytesOut& bytes) { return reinterpret_cast<std::byte*>(bytes.data()); }

bool encode(const std::string& name, const Floats& values, const BytesOut& out, bool as_cuda) {
  const Codec codec = codec_of(name);
  check_bytes(codec, values.size(), out.size());
  const std::span<const float> from(values.data(), values.size());
  const nb::gil_scoped_release release;
  if (as_cuda) return decotrain::encode_as_cuda(codec, from, raw(out));
  return decotrain::encode(codec, from, raw(out));
}

bool encode_with_feedback(const std::string& name, const Floats& values, const Residual& residual,
                          const BytesOut& out) {
  const Codec codec = codec_of(name);
  check_bytes(codec, values.size(), out.size());
  if (residual.size() != values.size()) bad("the residual has another length than the values");
  const std::span<const float> from(values.data(), values.size());
  using Code = nb::dlpack::dtype_code;
  const auto code = static_cast<Code>(residual.dtype().code);
  const bool full = code == Code::Float && residual.dtype().bits == 32;
  const bool half = code != Code::Float && residual.dtype().bits == 16;
  if (!full && !half) bad("the residual is float32, bfloat16, or uint16 that holds bfloat16");
  const auto both = [&](auto* data) {
    const std::span kept(data, from.size());
    using Kept = std::remove_reference_t<decltype(*data)>;
    if (!decotrain::encode_fed(codec, from, std::span<const Kept>(kept), raw(out))) return false;
    decotrain::keep_lost(codec, from, raw(out), kept);
    return true;
  };
  void* data = residual.data();
  const nb::gil_scoped_release release;
  return full ? both(static_cast<float*>(data)) : both(static_cast<std::uint16_t*>(data));
}

bool decode(const std::string& name, const Bytes& bytes, const FloatsOut& out, bool as_cuda) {
  const Codec codec = codec_of(name);
  check_bytes(codec, out.size(), bytes.size());
  const std::span<float> to(out.data(), out.size());
  const nb::gil_scoped_release release;
  if (as_cuda) return decotrain::decode_as_cuda(codec, raw(bytes), to);
  return decotrain::decode(codec, raw(bytes), to);
}

bool valid(const std::string& name, const Bytes& bytes, std::size_t elements) {
  const Codec codec = codec_of(name);
  if (bytes.size() != decotrain::encoded_bytes(codec, elements)) return false;
  const nb::gil_scoped_release release;
  return decotrain::valid(codec, raw(bytes), elements);
}

bool combine(const std::string& rule_text, const std::string& name,
             const std::vector<Bytes>& contributions, const std::vector<float>& weights,
             std::size_t elements, const std::string& result_name, const BytesOut& out,
             float parameter, const std::optional<Floats>& residual,
             const std::optional<FloatsOut>& lost) {
  const Codec codec = codec_of(name);
  const Codec result = codec_of(result_name);
  const auto rule = decotrain::rule_named(rule_text);
  if (!rule) bad("there is no rule '" + rule_text + "'");
  if (contributions.size() != weights.size()) bad("every contribution has one weight");
  std::vector<decotrain::Contribution> from;
  for (std::size_t k = 0; k < contributions.size(); ++k) {
    check_bytes(codec, elements, contributions[k].size());
    from.push_back({raw(contributions[k]), weights[k]});
  }
  check_bytes(result, elements, out.size());
  if ((residual && residual->size() != elements) || (lost && lost->size() != elements)) {
    bad("the residual has another length than the values");
  }
  const decotrain::OwnerFeedback feedback{residual ? residual->data() : nullptr,
                                          lost ? lost->data() : nullptr};
  const nb::gil_scoped_release release;
  return decotrain::combine(*rule, parameter, codec, from, elements, result, raw(out), feedback);
}

bool encode_stochastic(const std::string& name, const Floats& values, std::uint64_t key,
                       std::uint64_t stream, const BytesOut& out) {
  const Codec codec = codec_of(name);
  if (!decotrain::has_stochastic(codec)) bad(name + " has no stochastic rounding");
  check_bytes(codec, values.size(), out.size());
  const std::span<const float> from(values.data(), values.size());
  const nb::gil_scoped_release release;
  return decotrain::encode_stochastic(codec, from, key, stream, raw(out));
}

std::size_t topk_bytes(std::size_t elements, std::size_t k) {
  if (k < 1 || k > decotrain::kTopkChunk) bad("k is 1 to " + std::to_string(decotrain::kTopkChunk));
  return decotrain::topk_bytes(elements, k);
}

bool topk_encode(const Floats& values, std::size_t k, const BytesOut& out) {
  if (out.size() != topk_bytes(values.size(), k)) bad("the output has a wrong length");
  const std::span<const float> from(values.data(), values.size());
  const nb::gil_scoped_release release;
  return decotrain::topk_encode(from, k, raw(out));
}

bool topk_add(const Bytes& data, std::size_t k, float weight, const FloatsOut& total) {
  if (data.size() != topk_bytes(total.size(), k)) return false;
  const std::span<float> to(total.data(), total.size());
  const nb::gil_scoped_release release;
  return decotrain::topk_add(raw(data), k, weight, to);
}

std::pair<std::string, std::string> codec_pair(const std::string& name) {
  const auto pair = decotrain::codec_pair_named(name);
  if (!pair) {
    bad("codec '" + name +
        "' is neither a codec (f32, bf16, f16, int8, e2m1, e3m0, int2) nor a "
        "pair of two, contributions + results");
  }
  return {decotrain::codec_name(pair->first), decotrain::codec_name(pair->second)};
}

}  // namespace

void bind_codec(nb::module_& m) {
  m.def(
      "codec_bytes",
      [](const std::string& name, std::size_t n) {
        return decotrain::encoded_bytes(codec_of(name), n);
      },
      "codec"_a, "elements"_a, "Bytes of so many encoded values.");
  m.def("codec_pair", &codec_pair, "name"_a,
        "(contribution, result) codecs of a name such as 'int8' or 'e2m1+int8'.");
  m.def("codec_encode", &encode, "codec"_a, "values"_a, "out"_a, "as_cuda"_a = false,
        "Encodes flat float32 values; False when one is NaN or infinite.\n"
        "as_cuda (tests): by the CUDA kernels' code, run on the CPU.");
  m.def("codec_encode_with_feedback", &encode_with_feedback, "codec"_a, "values"_a, "residual"_a,
        "out"_a,
        "Encodes y = values + residual and leaves y - decode(encode(y)) in the residual\n"
        "(float32, bfloat16, or uint16 that holds bfloat16); False, with the residual as before,\n"
        "when a sum is NaN or infinite.");
  m.def("codec_encode_stochastic", &encode_stochastic, "codec"_a, "values"_a, "key"_a, "stream"_a,
        "out"_a, "Encodes with stochastic rounding (int8, e2m1, e3m0) from Philox.");
  m.def("codec_decode", &decode, "codec"_a, "data"_a, "out"_a, "as_cuda"_a = false,
        "Decodes into flat float32; False when the bytes are no valid encoding.");
  m.def("codec_valid", &valid, "codec"_a, "data"_a, "elements"_a,
        "True when the bytes are a valid encoding of so many finite values.");
  m.def("codec_combine", &combine, "rule"_a, "codec"_a, "contributions"_a, "weights"_a,
        "elements"_a, "result_codec"_a, "out"_a, "parameter"_a = 0.0f, "residual"_a = nb::none(),
        "lost"_a = nb::none(),
        "Combines encoded contributions in the order given into one encoded result; False when\n"
        "the value is not finite or the rule's parameter is wrong. The owner's feedback: residual\n"
        "is added to the value, and lost is then what the result lost.");
  m.def("topk_bytes", &topk_bytes, "elements"_a, "k"_a,
        "Bytes of the k largest of every 4096 values.");
  m.def("topk_encode", &topk_encode, "values"_a, "k"_a, "out"_a,
        "Encodes the k largest magnitudes of every 4096; False when a value is NaN or infinite.");
  m.def("topk_add", &topk_add, "data"_a, "k"_a, "weight"_a, "total"_a,
        "total += weight * decoded; False, with total as before, for foreign or broken bytes.");
}
