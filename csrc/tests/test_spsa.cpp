// SPSA kernels: every twin against the definition, element by element, on odd ranges.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "simd.h"
#include "spsa/code.h"
#include "spsa/spsa.h"

namespace decotrain::spsa {
namespace {

constexpr std::uint64_t kKey = 0x0123456789abcdefu;

struct LevelGuard {
  Simd before = simd();
  ~LevelGuard() { set_simd(before); }
};

std::vector<Simd> levels() {
  std::vector<Simd> all{Simd::scalar};
  if (best_simd() >= Simd::avx2) all.push_back(Simd::avx2);
  if (best_simd() >= Simd::avx512) all.push_back(Simd::avx512);
  return all;
}

// z of one element, straight from the text of noise.h.
float z_sign(std::uint32_t c2, std::uint32_t c3, std::uint64_t e) {
  const std::uint64_t counter = (e >> 11) * 16 + (e & 15);
  const std::uint32_t row = (e >> 4) & 127;
  const Philox p = philox(static_cast<std::uint32_t>(counter),
                          static_cast<std::uint32_t>(counter >> 32), c2, c3, kKey);
  return ((p.word[row / 32] >> ((row % 8) * 4 + (row / 8) % 4)) & 1u) != 0 ? -1.0f : 1.0f;
}

float z_integer(std::uint32_t c2, std::uint32_t c3, std::uint64_t e) {
  const std::uint32_t row = (e >> 4) & 127;
  const std::uint64_t counter = (e >> 11) * 512 + std::uint64_t{row / 4} * 16 + (e & 15);
  const Philox p = philox(static_cast<std::uint32_t>(counter),
                          static_cast<std::uint32_t>(counter >> 32), c2, c3, kKey);
  int sum = -510;
  for (int byte = 0; byte < 4; ++byte) sum += (p.word[row % 4] >> (8 * byte)) & 0xff;
  return static_cast<float>(sum);
}

float term_move(Noise noise, const Term& term, std::uint64_t e) {
  if (noise == Noise::rademacher) return z_sign(term.c2, term.c3, e) * term.value;
  return (term.value * (1.0f / 147.8f)) * z_integer(term.c2, term.c3, e);
}

float sum_of(Noise noise, const Term* terms, std::size_t count, std::uint64_t e) {
  float sum = 0.0f;
  const std::size_t width = noise == Noise::rademacher ? 4 : 1;
  for (std::size_t k = 0; k < count; k += width) {
    float group = term_move(noise, terms[k], e);
    for (std::size_t j = k + 1; j < std::min(k + width, count); ++j) {
      group += term_move(noise, terms[j], e);
    }
    sum += group;
  }
  return sum;
}

std::vector<float> random_floats(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(count);
  for (float& value : values) value = std::ldexp(static_cast<float>(random()), -36);
  return values;
}

std::vector<Term> random_terms(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Term> terms(count);
  for (Term& term : terms) {
    term.c2 = static_cast<std::uint32_t>(random() % 64);
    term.c3 = static_cast<std::uint32_t>(random());
    term.value = decode(static_cast<std::uint8_t>(random()));
  }
  return terms;
}

bool same(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

TEST_CASE("replay is the definition on every level, for odd ranges and any number of terms") {
  const LevelGuard guard;
  struct Range {
    std::uint64_t first;
    std::size_t size;
  };
  const std::vector<Range> ranges{{0, 1},    {5, 40},      {0, 2048},
                                  {2047, 2}, {2040, 4200}, {(std::uint64_t{1} << 43) - 100, 2300}};
  const std::vector<Step> steps{{1, 1e-3f, 1.0f},   {0, 1e-3f, 0.99f}, {4, 3e-2f, 1.0f},
                                {7, 1e-4f, 0.999f}, {64, 1e-2f, 1.0f}, {130, 1e-3f, 1.0f}};
  const std::vector<Term> terms = random_terms(1 + 4 + 7 + 64 + 130, 7);
  for (const Noise noise : {Noise::rademacher, Noise::gaussian}) {
    for (const Range& range : ranges) {
      const std::vector<float> start = random_floats(range.size, 3);
      std::vector<float> want = start;
      for (std::size_t i = 0; i < range.size; ++i) {
        const Term* at = terms.data();
        for (const Step& step : steps) {
          const float sum = sum_of(noise, at, step.terms, range.first + i);
          const float kept = want[i] * step.decay;
          const float move = step.rate * sum;
          want[i] = kept - move;
          at += step.terms;
        }
      }
      for (const Simd level : levels()) {
        set_simd(level);
        std::vector<float> got = start;
        replay(noise, kKey, terms, steps, range.first, got);
        CHECK_MESSAGE(same(got, want), simd_name(level), " first ", range.first, " size ",
                      range.size, " noise ", static_cast<int>(noise));
      }
    }
  }
}

TEST_CASE("perturb is the definition on every level and in every storage type") {
  const LevelGuard guard;
  const std::size_t size = 2 * 2048 + 77;
  const std::uint64_t first = 2048 * 3 - 31;
  std::vector<float> theta = random_floats(size, 11);
  // Values at which casts go wrong: ties, overflow, denormals, infinities.
  const std::uint32_t hard[] = {0x3f808000u, 0x3f818000u, 0x7f7fffffu, 0x477ff000u, 0x477fefffu,
                                0x33000000u, 0x33000001u, 0x387fffffu, 0x38800000u, 0x7f800000u,
                                0xff800000u, 0x00000001u, 0x80000000u, 0x7fc01234u};
  for (const Noise noise : {Noise::rademacher, Noise::gaussian}) {
    for (const float epsilon : {1e-3f, -1e-3f, 0.0f}) {
      for (std::size_t i = 0; i < std::size(hard); ++i) theta[100 + i] = bits_float(hard[i]);
      std::vector<float> want(size);
      const Term term{9, 77, epsilon};
      for (std::size_t i = 0; i < size; ++i) {
        want[i] = theta[i] + term_move(noise, term, first + i);
      }
      for (const Simd level : levels()) {
        set_simd(level);
        std::vector<float> got(size);
        perturb(noise, kKey, 9, 77, epsilon, first, theta, Store::f32, got.data());
        CHECK(same(got, want));
        for (const Store store : {Store::bf16, Store::f16}) {
          std::vector<std::uint16_t> half(size);
          perturb(noise, kKey, 9, 77, epsilon, first, theta, store, half.data());
          std::size_t wrong = 0;
          for (std::size_t i = 0; i < size; ++i) {
            wrong += half[i] != (store == Store::bf16 ? to_bf16(want[i]) : to_f16(want[i]));
          }
          CHECK(wrong == 0);
        }
      }
    }
  }
}

TEST_CASE("replay in one call equals step by step, and any cut of the range") {
  const std::size_t size = 9000;
  const std::vector<Term> terms = random_terms(std::size_t{40} * 16, 5);
  const std::vector<Step> steps(40, Step{16, 1e-3f, 0.9999f});
  const std::vector<float> start = random_floats(size, 1);
  std::vector<float> whole = start;
  replay(Noise::rademacher, kKey, terms, steps, 1000, whole);
  std::vector<float> live = start;
  for (std::size_t s = 0; s < steps.size(); ++s) {
    replay(Noise::rademacher, kKey, std::span(terms).subspan(16 * s, 16),
           std::span(steps).subspan(s, 1), 1000, live);
  }
  CHECK(same(whole, live));
  std::vector<float> cut = start;
  std::size_t at = 0;
  for (const std::size_t length : {1u, 700u, 2048u, 3u, 4096u, 2152u}) {
    replay(Noise::rademacher, kKey, terms, steps, 1000 + at, std::span(cut).subspan(at, length));
    at += length;
  }
  REQUIRE(at == size);
  CHECK(same(whole, cut));
}

TEST_CASE("signs are balanced and streams differ") {
  std::vector<float> zero(1 << 20, 0.0f);
  std::vector<float> a(zero.size());
  std::vector<float> b(zero.size());
  perturb(Noise::rademacher, kKey, 1, 5 << 12, 1.0f, 0, zero, Store::f32, a.data());
  perturb(Noise::rademacher, kKey, 1, 5 << 12 | 1, 1.0f, 0, zero, Store::f32, b.data());
  double sum = 0;
  double product = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    sum += a[i];
    product += a[i] * b[i];
  }
  CHECK(std::fabs(sum) < 5 * 1024);
  CHECK(std::fabs(product) < 5 * 1024);
  perturb(Noise::gaussian, kKey, 1, 5 << 12, 1.0f, 0, zero, Store::f32, a.data());
  double square = 0;
  for (const float value : a) square += static_cast<double>(value) * value;
  CHECK(square / static_cast<double>(a.size()) == doctest::Approx(1.0).epsilon(0.01));
}

TEST_CASE("the one-byte code") {
  CHECK(encode(NAN) == kSkip);
  CHECK(encode(INFINITY) == kSkip);
  CHECK(encode(0.0f) == kZero);
  CHECK(encode(-1e-30f) == kZero);
  CHECK(encode(1e30f) == 0x7f);
  CHECK(encode(-1e30f) == 0xff);
  CHECK(decode(kSkip) == 0.0f);
  for (int code = 1; code < 256; ++code) {
    CHECK(encode(decode(static_cast<std::uint8_t>(code))) == code);
  }
  for (int k = 1; k < 128; ++k) {
    const double exact = std::exp2((k - 64) / 6.0);
    CHECK(std::fabs(kMagnitude[k] - exact) <= exact * 6e-8);
  }
  std::mt19937 random(3);
  int far = 0;
  for (int i = 0; i < 100000; ++i) {
    const float value = std::ldexp(1.0f + static_cast<float>(random() % 4096) / 4096.0f,
                                   static_cast<int>(random() % 19) - 10);
    far += std::fabs(decode(encode(value)) - value) > 0.0595f * value;
  }
  CHECK(far == 0);
}

}  // namespace
}  // namespace decotrain::spsa
