// The digest of long inputs, twin for AVX2; see wire.cpp. XXH3 gives the same value on every CPU.
#include <cstddef>
#include <cstdint>

#define XXH_INLINE_ALL  // everything static: nothing here can be linked by code for older CPUs
#include "xxhash.h"

namespace decotrain {

std::uint64_t digest_avx2(const void* bytes, std::size_t count);
std::uint64_t digest_avx2(const void* bytes, std::size_t count) {
  return XXH3_64bits(bytes, count);
}

}  // namespace decotrain
