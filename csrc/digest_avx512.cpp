// The digest of long inputs, twin for AVX-512; see wire.cpp. XXH3 gives the same value anywhere.
#include <cstddef>
#include <cstdint>

#define XXH_INLINE_ALL  // everything static: nothing here can be linked by code for older CPUs
#include "xxhash.h"

namespace decotrain {

std::uint64_t digest_avx512(const void* bytes, std::size_t count);
std::uint64_t digest_avx512(const void* bytes, std::size_t count) {
  return XXH3_64bits(bytes, count);
}

}  // namespace decotrain
