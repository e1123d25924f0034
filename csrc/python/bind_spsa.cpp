// Bindings of csrc/spsa: flat buffers in, bytes out. Checks sizes and types; the GIL is released
// while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "simd.h"
#include "spsa/code.h"
#include "spsa/spsa.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

namespace spsa = decotrain::spsa;

using Theta = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ThetaOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<const std::uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void bad(const std::string& what) { throw std::invalid_argument(what); }

spsa::Noise noise_of(const std::string& name) {
  if (name == "rademacher") return spsa::Noise::rademacher;
  if (name == "gaussian") return spsa::Noise::gaussian;
  bad("noise is 'rademacher' or 'gaussian', not '" + name + "'");
}

spsa::Store store_of(const nb::dlpack::dtype& type) {
  using Code = nb::dlpack::dtype_code;
  const auto code = static_cast<Code>(type.code);
  if (code == Code::Float && type.bits == 32) return spsa::Store::f32;
  if (code == Code::Float && type.bits == 16) return spsa::Store::f16;
  if (code == Code::Bfloat && type.bits == 16) return spsa::Store::bf16;
  bad("the output is float32, bfloat16 or float16");
}

void check_range(std::uint64_t first, std::size_t size) {
  if (first > spsa::kMaxElements || size > spsa::kMaxElements - first) {
    bad("elements " + std::to_string(first) + " + " + std::to_string(size) +
        " lie outside the parameter space");
  }
}

void perturb(const Theta& theta, const Out& out, std::uint64_t key, std::uint32_t c2,
             std::uint32_t c3, float epsilon, std::uint64_t first, const std::string& noise) {
  check_range(first, theta.size());
  if (out.size() != theta.size()) bad("the output has another length than theta");
  const spsa::Noise kind = noise_of(noise);
  const spsa::Store store = store_of(out.dtype());
  const std::span<const float> from(theta.data(), theta.size());
  void* to = out.data();
  const nb::gil_scoped_release release;
  spsa::perturb(kind, key, c2, c3, epsilon, first, from, store, to);
}

void replay(const ThetaOut& theta, std::uint64_t key, const Words& streams, const Values& values,
            const Counts& counts, const Values& rates, const Values& decays, std::uint64_t first,
            const std::string& noise) {
  check_range(first, theta.size());
  const spsa::Noise kind = noise_of(noise);
  if (streams.shape(1) != 2 || streams.shape(0) != values.size()) {
    bad("streams is (terms, 2) and values (terms,)");
  }
  if (rates.size() != counts.size() || decays.size() != counts.size()) {
    bad("counts, rates and decays have one entry for each step");
  }
  std::vector<spsa::Step> steps(counts.size());
  std::size_t total = 0;
  for (std::size_t s = 0; s < steps.size(); ++s) {
    steps[s] = spsa::Step{counts.data()[s], rates.data()[s], decays.data()[s]};
    total += steps[s].terms;
  }
  if (total != values.size()) bad("the counts do not add up to the number of terms");
  std::vector<spsa::Term> terms(values.size());
  for (std::size_t k = 0; k < terms.size(); ++k) {
    terms[k] = spsa::Term{streams.data()[2 * k], streams.data()[2 * k + 1], values.data()[k]};
  }
  const std::span<float> to(theta.data(), theta.size());
  const nb::gil_scoped_release release;
  spsa::replay(kind, key, terms, steps, first, to);
}

nb::bytes encode(const Values& values) {
  std::string codes(values.size(), '\0');
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<char>(spsa::encode(values.data()[i]));
  }
  return nb::bytes(codes.data(), codes.size());
}

std::vector<float> magnitudes() {
  return {std::begin(spsa::kMagnitude), std::end(spsa::kMagnitude)};
}

decotrain::Simd level_of(const std::string& name) {
  using decotrain::Simd;
  for (const Simd level : {Simd::scalar, Simd::avx2, Simd::avx512, Simd::neon}) {
    if (name == decotrain::simd_name(level)) return level;
  }
  bad("a SIMD level is 'scalar', 'avx2', 'avx512' or 'neon', not '" + name + "'");
}

}  // namespace

void bind_spsa(nb::module_& m) {
  m.def(
      "spsa_perturb", &perturb, "theta"_a, "out"_a, "key"_a, "c2"_a, "c3"_a, "epsilon"_a,
      "first"_a = 0, "noise"_a = "rademacher",
      nb::sig("def spsa_perturb(theta: object, out: object, key: int, c2: int, c3: int, "
              "epsilon: float, first: int = 0, noise: str = 'rademacher') -> None"),
      "out = cast(theta + epsilon * z). theta is flat float32, out float32, bfloat16 or float16;\n"
      "element 0 of both is element `first` of the parameter space.");
  m.def("spsa_replay", &replay, "theta"_a, "key"_a, "streams"_a, "values"_a, "counts"_a, "rates"_a,
        "decays"_a, "first"_a = 0, "noise"_a = "rademacher",
        nb::sig("def spsa_replay(theta: object, key: int, streams: object, values: object, "
                "counts: object, rates: object, decays: object, first: int = 0, "
                "noise: str = 'rademacher') -> None"),
        "For each step s in order: theta = theta * decays[s] - rates[s] * sum of value * z over\n"
        "its counts[s] terms, in place, one pass over memory.");
  m.def("spsa_encode", &encode, "values"_a, nb::sig("def spsa_encode(values: object) -> bytes"),
        "The one-byte code of each float32 value.");
  m.def("spsa_magnitudes", &magnitudes, nb::sig("def spsa_magnitudes() -> list[float]"),
        "The 128 magnitudes of the one-byte code.");
  m.def(
      "simd", [] { return std::string(decotrain::simd_name(decotrain::simd())); },
      "The SIMD level in use: scalar, avx2, avx512 or neon.");
  m.def(
      "set_simd",
      [](const std::string& name) {
        return std::string(decotrain::simd_name(decotrain::set_simd(level_of(name))));
      },
      "level"_a,
      "For tests: use this SIMD level, or the CPU's best below; returns the one in use.");
}
