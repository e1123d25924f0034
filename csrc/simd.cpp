// Level detection and the float environment; see simd.h.
#include "simd.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace decotrain {
namespace {

#if defined(__x86_64__)
bool has_f16c() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

Simd capped(Simd level) {
  if (level == Simd::scalar || best_simd() == Simd::neon) {
    return level == Simd::scalar ? level : best_simd();
  }
  return level > best_simd() ? best_simd() : level;
}

Simd from_environment() {
  const char* wanted = std::getenv("DECOTRAIN_SIMD");
  if (wanted != nullptr) {
    for (const Simd level : {Simd::scalar, Simd::avx2, Simd::avx512, Simd::neon}) {
      if (std::strcmp(wanted, simd_name(level)) == 0) return capped(level);
    }
  }
  return best_simd();
}

std::atomic<Simd>& current() {
  static std::atomic<Simd> level{from_environment()};
  return level;
}

}  // namespace

Simd best_simd() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system whether it keeps the wide registers.
  static const Simd best = [] {
    if (!__builtin_cpu_supports("avx2") || !has_f16c()) return Simd::scalar;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? Simd::avx512 : Simd::avx2;
  }();
  return best;
#elif defined(__aarch64__)
  return Simd::neon;
#else
  return Simd::scalar;
#endif
}

Simd simd() { return current().load(std::memory_order_relaxed); }

Simd set_simd(Simd level) {
  const Simd now = capped(level);
  current().store(now, std::memory_order_relaxed);
  return now;
}

const char* simd_name(Simd level) {
  switch (level) {
    case Simd::avx2:
      return "avx2";
    case Simd::avx512:
      return "avx512";
    case Simd::neon:
      return "neon";
    case Simd::scalar:
      break;
  }
  return "scalar";
}

#if defined(__x86_64__)
ExactFloat::ExactFloat() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
ExactFloat::~ExactFloat() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
ExactFloat::ExactFloat() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
}
ExactFloat::~ExactFloat() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
ExactFloat::ExactFloat() = default;
ExactFloat::~ExactFloat() = default;
#endif

}  // namespace decotrain
