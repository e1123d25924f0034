// Bytes of a peer, taken as a frame's header and a packed specification: what parses is within its
// bounds and is written back as the same bytes.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "wire.h"

using namespace decotrain;

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

void check_header(std::span<const std::byte, kHeaderBytes> bytes) {
  const auto header = parse(bytes);
  if (!header) return;
  require(header->src < kMaxPeers || header->src == kNoSlot);
  require(header->dst < kMaxPeers || header->dst == kNoSlot);
  require(header->payload_bytes <= kMaxChunkBytes);
  std::array<std::byte, kHeaderBytes> again;
  write(*header, again);
  require(std::equal(again.begin(), again.end(), bytes.begin()));
}

void check_spec(std::span<const std::byte> bytes) {
  const auto spec = unpack_spec(bytes);
  if (!spec) return;
  const auto again = pack(*spec);
  require(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()));
  const std::uint32_t chunks = chunk_count(*spec);
  require(chunks <= kMaxChunks);
  std::uint64_t elements = 0;
  for (std::uint32_t chunk = 0; chunk < chunks; ++chunk) {
    const std::size_t some = chunk_elements(*spec, chunk);
    require(some <= spec->chunk_elements);
    require(encoded_bytes(spec->result, some) <= kMaxChunkBytes || spec->op == Op::collect);
    elements += some;
  }
  require(spec->op == Op::collect || elements == spec->elements);
}

}  // namespace

// The header, then the specification, whatever length it has.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < kHeaderBytes) return 0;
  // Copies of exactly the right length, so that the sanitizer sees one byte too many.
  std::vector<std::byte> bytes(size);
  std::memcpy(bytes.data(), data, size);
  check_header(std::span<const std::byte, kHeaderBytes>(bytes.data(), kHeaderBytes));
  const std::vector<std::byte> rest(bytes.begin() + kHeaderBytes, bytes.end());
  check_spec(rest);
  return 0;
}
