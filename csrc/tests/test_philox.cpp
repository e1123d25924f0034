// Known answers of Philox4x32-10 (Random123's kat_vectors) and the SIMD level's rules.
#include <doctest/doctest.h>

#include "philox.h"
#include "simd.h"

namespace decotrain {
namespace {

void check(const Philox& got, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  CHECK(got.word[0] == a);
  CHECK(got.word[1] == b);
  CHECK(got.word[2] == c);
  CHECK(got.word[3] == d);
}

TEST_CASE("philox gives Random123's known answers") {
  check(philox(0, 0, 0, 0, 0), 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u);
  const std::uint32_t f = 0xffffffffu;
  check(philox(f, f, f, f, ~std::uint64_t{0}), 0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu);
  check(philox(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0x299f31d0a4093822u),
        0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u);
}

TEST_CASE("a SIMD level never exceeds the CPU's") {
  const Simd before = simd();
  CHECK(set_simd(Simd::scalar) == Simd::scalar);
  CHECK(simd() == Simd::scalar);
  CHECK(set_simd(Simd::avx512) == best_simd());
  set_simd(before);
}

TEST_CASE("ExactFloat keeps denormals and gives the environment back") {
#if defined(__x86_64__)
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040);
  volatile float tiny = 1e-38f;
  {
    const ExactFloat exact;
    CHECK(tiny * 0.125f != 0.0f);
  }
  CHECK(tiny * 0.125f == 0.0f);
  __builtin_ia32_ldmxcsr(before);
#endif
}

}  // namespace
}  // namespace decotrain
