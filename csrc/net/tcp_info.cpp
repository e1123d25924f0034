// Channel, what the kernel knows of a TCP connection. Apart, because the kernel's own header, which
// has all fields, cannot be included beside the C library's.
#include <linux/tcp.h>
#include <sys/socket.h>

#include <cstddef>

#include "net/channel.h"

namespace decotrain::net {
namespace {

constexpr int kTcpLevel = 6;  // IPPROTO_TCP

}  // namespace

std::optional<PathProgress> Channel::progress() const {
  tcp_info info{};
  socklen_t size = sizeof info;
  if (is_unix_ || getsockopt(fd_.get(), kTcpLevel, TCP_INFO, &info, &size) != 0) return {};
  if (size < offsetof(tcp_info, tcpi_bytes_retrans) + sizeof info.tcpi_bytes_retrans) return {};
  PathProgress out;
  out.delivered_bytes = std::uint64_t{info.tcpi_delivered} * info.tcpi_snd_mss;
  out.resent_bytes = info.tcpi_bytes_retrans;
  out.rtt_s = 1e-6 * info.tcpi_rtt;
  out.rtt_min_s = 1e-6 * info.tcpi_min_rtt;
  return out;
}

}  // namespace decotrain::net
