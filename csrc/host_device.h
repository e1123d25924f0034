// Lets one header serve g++, nvcc and NVRTC: the arithmetic of a CPU kernel and its CUDA twin is
// written once. NVRTC has no standard headers, so the few integer types are named here.
// Static: each file keeps its own copy, or the linker could give a plain CPU one that was compiled
// for AVX-512 (csrc/simd.h).
#pragma once

#if defined(__CUDACC__)
#define DT_HD static __host__ __device__ __forceinline__
#else
#define DT_HD static inline
#endif

#if defined(__CUDACC_RTC__)
namespace std {
using size_t = unsigned long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long long;
}  // namespace std
#else
#include <cstddef>
#include <cstdint>
#endif
