// Packets of the lab's forwarder: shared buffers, and pieces cut out of segmentation-offload
// packets.
//
// The kernel hands a TUN reader up to 64 KiB of one TCP stream at once, with a virtio header that
// says how long the segments are that it stands for (MTU 1500: 1448 bytes of payload each). We
// keep them together, which is what makes 1 Gbit/s cheap, but count, lose, queue and reorder by
// segment: a run of segments can be cut out as a packet of its own. IPv4 only.
#pragma once

#include <arpa/inet.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace lab {

// What stands before each packet on a device opened with IFF_VNET_HDR. <linux/virtio_net.h> has it,
// but newer versions of that header are no C++.
struct VnetHeader {
  std::uint8_t flags;
  std::uint8_t gso_type;
  std::uint16_t header_bytes;
  std::uint16_t gso_size;
  std::uint16_t checksum_start;
  std::uint16_t checksum_offset;
};
constexpr std::size_t kVnetBytes = sizeof(VnetHeader);
static_assert(kVnetBytes == 10);
constexpr std::uint8_t kGsoNone = 0;
constexpr std::uint8_t kGsoTcp4 = 1;
constexpr std::uint8_t kGsoEcn = 0x80;  // a flag beside the type

constexpr std::size_t kReadBytes = kVnetBytes + 65536;
constexpr std::size_t kHeadBytes =
    kVnetBytes + 60 + 60;  // virtio, IP with options, TCP with options
constexpr std::size_t kSmallBytes = 2048;

// Bytes as read from a TUN device. Several packets may point into one buffer.
using Buffer = std::shared_ptr<std::vector<std::uint8_t>>;

struct Packet {
  std::uint8_t from = 0;
  std::uint8_t to = 0;
  std::uint8_t head_bytes = 0;  // virtio header, IP and TCP headers; virtio header alone if whole
  std::uint16_t segments = 1;
  std::uint16_t segment_bytes = 0;  // payload of each segment but the last; 0: not divisible
  std::uint32_t payload_at = 0;     // in `buffer`
  std::uint32_t payload_bytes = 0;
  std::array<std::uint8_t, kHeadBytes> head{};
  Buffer buffer;

  // Bytes on the link: those of the IP packets, headers counted for every segment.
  std::size_t link_bytes() const {
    return payload_bytes + std::size_t{segments} * (head_bytes - kVnetBytes);
  }
};

inline std::uint32_t sum16(const std::uint8_t* bytes, std::size_t count, std::uint32_t sum) {
  for (std::size_t i = 0; i + 1 < count; i += 2) sum += (bytes[i] << 8) | bytes[i + 1];
  return sum;
}

inline std::uint16_t fold(std::uint32_t sum) {
  while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
  return static_cast<std::uint16_t>(sum);
}

// Destination of an IPv4 packet as read (virtio header first); 0 when it is not one.
inline std::uint32_t destination(const std::uint8_t* bytes, std::size_t count) {
  if (count < kVnetBytes + sizeof(iphdr) || (bytes[kVnetBytes] >> 4) != 4) return 0;
  std::uint32_t address;
  std::memcpy(&address, bytes + kVnetBytes + 16, 4);
  return ntohl(address);
}

// Describes what was read: divisible if it is a TCP/IPv4 offload packet, else one whole segment.
inline Packet describe(Buffer buffer, std::size_t count, std::uint8_t from, std::uint8_t to) {
  Packet packet;
  packet.from = from;
  packet.to = to;
  const std::uint8_t* bytes = buffer->data();
  VnetHeader vnet;
  std::memcpy(&vnet, bytes, kVnetBytes);
  std::size_t head = kVnetBytes;
  if ((vnet.gso_type & ~kGsoEcn) == kGsoTcp4 && vnet.gso_size > 0) {
    const std::size_t ip = (bytes[kVnetBytes] & 15) * 4u;
    const std::size_t tcp = (bytes[kVnetBytes + ip + 12] >> 4) * 4u;
    if (kVnetBytes + ip + tcp <= count) {
      head = kVnetBytes + ip + tcp;
      packet.segment_bytes = vnet.gso_size;
      packet.segments = static_cast<std::uint16_t>(
          std::max<std::size_t>(1, (count - head + vnet.gso_size - 1) / vnet.gso_size));
    }
  }
  std::memcpy(packet.head.data(), bytes, head);
  packet.head_bytes = static_cast<std::uint8_t>(head);
  packet.payload_at = static_cast<std::uint32_t>(head);
  packet.payload_bytes = static_cast<std::uint32_t>(count - head);
  packet.buffer = std::move(buffer);
  return packet;
}

// Segments [first, first + count) of a packet as a packet of its own.
inline Packet cut(const Packet& whole, unsigned first, unsigned count) {
  if (count >= whole.segments) return whole;
  Packet piece = whole;
  const std::uint32_t skip = std::uint32_t{first} * whole.segment_bytes;
  const bool last = first + count >= whole.segments;
  piece.segments = static_cast<std::uint16_t>(count);
  piece.payload_at += skip;
  piece.payload_bytes =
      last ? whole.payload_bytes - skip : std::uint32_t{count} * whole.segment_bytes;

  VnetHeader vnet;
  std::memcpy(&vnet, piece.head.data(), kVnetBytes);
  if (count == 1) vnet.gso_type = kGsoNone, vnet.gso_size = 0;
  std::memcpy(piece.head.data(), &vnet, kVnetBytes);

  std::uint8_t* ip = piece.head.data() + kVnetBytes;
  const std::size_t ip_bytes = (ip[0] & 15) * 4u;
  std::uint8_t* tcp = ip + ip_bytes;
  const auto put16 = [](std::uint8_t* at, std::uint32_t value) {
    at[0] = static_cast<std::uint8_t>(value >> 8), at[1] = static_cast<std::uint8_t>(value);
  };
  const auto tcp_total =
      static_cast<std::uint32_t>(piece.payload_bytes + piece.head_bytes - kVnetBytes - ip_bytes);
  put16(ip + 2, tcp_total + static_cast<std::uint32_t>(ip_bytes));
  put16(ip + 4, ((ip[4] << 8) | ip[5]) + first);  // identification counts segments
  put16(ip + 10, 0);
  put16(ip + 10, static_cast<std::uint16_t>(~fold(sum16(ip, ip_bytes, 0))));
  std::uint32_t sequence;
  std::memcpy(&sequence, tcp + 4, 4);
  sequence = htonl(ntohl(sequence) + skip);
  std::memcpy(tcp + 4, &sequence, 4);
  if (!last) tcp[13] &= static_cast<std::uint8_t>(~(TH_FIN | TH_PUSH));
  if (first > 0) tcp[13] &= 0x7f;  // CWR belongs to the first segment
  // The kernel left the checksum to the device: the field holds the sum of the pseudo header.
  put16(tcp + 16, fold(sum16(ip + 12, 8, IPPROTO_TCP + tcp_total)));
  return piece;
}

}  // namespace lab
