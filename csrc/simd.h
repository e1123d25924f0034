// Which SIMD twin of a kernel runs. All twins of a kernel give the same bits, so the level is a
// matter of speed only; tests force each level in turn.
//
// A twin lives in its own file named *_avx2.cpp, *_avx512.cpp or *_neon.cpp, which CMake compiles
// with the flags of that level. Such a file must define nothing that another file could link to by
// chance (no inline functions or templates from shared headers that are not static): the linker
// keeps one copy of those, and it may be the one an older CPU cannot run.
#pragma once

#include <cstdint>

namespace decotrain {

enum class Simd : std::uint8_t { scalar = 0, avx2 = 1, avx512 = 2, neon = 3 };

// avx2 means AVX2 and F16C; avx512 means F, BW, DQ and VL besides; neon is every 64-bit Arm CPU.
Simd best_simd();  // what this CPU has

// The level in use: best_simd(), capped by DECOTRAIN_SIMD=scalar|avx2|avx512|neon in the
// environment.
Simd simd();

// For tests. A level this CPU lacks is replaced by best_simd(); returns the level now in use.
Simd set_simd(Simd level);

const char* simd_name(Simd level);

// Round to nearest, denormals kept, for the life of the object: other libraries switch a thread to
// flush-to-zero, and then two peers' sums differ.
class ExactFloat {
 public:
  ExactFloat();
  ~ExactFloat();
  ExactFloat(const ExactFloat&) = delete;
  ExactFloat& operator=(const ExactFloat&) = delete;

 private:
  std::uint64_t saved_ = 0;
};

}  // namespace decotrain
