#include "net/channel.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

namespace decotrain::net {
namespace {

constexpr int kBacklog = 256;
constexpr std::uint32_t kNoRateLimit = ~std::uint32_t{0};
constexpr double kRateMax = 4e9;  // bytes a second that 32 bits hold
constexpr std::size_t kDescriptorsKept = 4;

void set_int(int fd, int level, int name, int value) {
  // Options improve latency or throughput; a kernel that refuses one still moves bytes.
  (void)setsockopt(fd, level, name, &value, sizeof value);
}

Moved outcome(ssize_t n, bool zero_is_end) {
  Moved moved;
  if (n > 0) {
    moved.bytes = static_cast<std::size_t>(n);
  } else if (n == 0) {
    moved.failed = zero_is_end;
    moved.blocked = !zero_is_end;
  } else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) {
    moved.blocked = true;
  } else {
    moved.failed = true;
    moved.error = errno;
  }
  return moved;
}

}  // namespace

void Fd::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

Moved Channel::read(iovec* parts, int count) {
  if (tls_ != nullptr) return tls_->read(parts, count);
  if (takes_descriptors_) return receive(parts, count);
  ssize_t n = 0;
  do {
    n = ::readv(fd_.get(), parts, count);
  } while (n < 0 && errno == EINTR);
  return outcome(n, true);
}

Moved Channel::receive(iovec* parts, int count) {
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kDescriptorsKept * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = static_cast<std::size_t>(count);
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t n = 0;
  do {
    n = ::recvmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return outcome(n, true);
  for (cmsghdr* one = CMSG_FIRSTHDR(&message); one != nullptr; one = CMSG_NXTHDR(&message, one)) {
    if (one->cmsg_level != SOL_SOCKET || one->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t bytes = one->cmsg_len - CMSG_LEN(0);
    for (std::size_t at = 0; at + sizeof(int) <= bytes; at += sizeof(int)) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(one) + at, sizeof fd);
      descriptors_.emplace_back(fd);
    }
  }
  while (descriptors_.size() > kDescriptorsKept) descriptors_.pop_front();
  Moved moved = outcome(n, true);
  moved.cut_short = message.msg_controllen != 0 || (message.msg_flags & MSG_CTRUNC) != 0;
  return moved;
}

Fd Channel::next_descriptor() {
  if (descriptors_.empty()) return {};
  Fd fd = std::move(descriptors_.front());
  descriptors_.pop_front();
  return fd;
}

Moved Channel::write(iovec* parts, int count, int descriptor) {
  if (tls_ != nullptr) return tls_->write(parts, count);
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = static_cast<std::size_t>(count);
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  if (descriptor >= 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* const one = CMSG_FIRSTHDR(&message);
    one->cmsg_level = SOL_SOCKET;
    one->cmsg_type = SCM_RIGHTS;
    one->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(one), &descriptor, sizeof descriptor);
  }
  ssize_t n = 0;
  do {
    n = ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (n < 0 && errno == EINTR);
  return outcome(n, false);
}

std::size_t Channel::unacknowledged_bytes() const {
  const std::size_t held = tls_ == nullptr ? 0 : tls_->unsent_bytes();
  int value = 0;
  if (ioctl(fd_.get(), SIOCOUTQ, &value) != 0 || value < 0) return held;
  return held + static_cast<std::size_t>(value);
}

int Channel::pending_error() const {
  int error = 0;
  socklen_t size = sizeof error;
  if (getsockopt(fd_.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) return errno;
  return error;
}

double Channel::rtt_s() const {
  tcp_info info{};
  socklen_t size = sizeof info;
  if (is_unix_ || getsockopt(fd_.get(), IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return 0.0;
  return 1e-6 * info.tcpi_rtt;
}

std::string Channel::congestion() const {
  std::array<char, 17> name{};
  socklen_t size = name.size() - 1;
  if (is_unix_ || getsockopt(fd_.get(), IPPROTO_TCP, TCP_CONGESTION, name.data(), &size) != 0) {
    return "";
  }
  return name.data();
}

bool Channel::fears_loss() const {
  const std::string name = congestion();
  return !name.empty() && name.substr(0, 3) != "bbr";
}

void Channel::limit_unsent(std::size_t bytes) {
  set_int(fd_.get(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, static_cast<int>(bytes));
}

void Channel::choose_congestion(const std::string& name) {
  // Refused where the administrator has not allowed it: the default is as good as before.
  (void)setsockopt(fd_.get(), IPPROTO_TCP, TCP_CONGESTION, name.data(),
                   static_cast<socklen_t>(name.size()));
}

bool fearless(const std::string& congestion) {
  Channel probe(Fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)), false);
  if (congestion.empty() || !probe) return false;
  probe.choose_congestion(congestion);
  return probe.congestion() == congestion && !probe.fears_loss();
}

void Channel::restart_control() {
  const std::string name = congestion();
  choose_congestion(
      "reno");  // every kernel has it; a control that is chosen again is not begun anew
  choose_congestion(name);
}

void Channel::limit_rate(double bytes_per_s) {
  const bool limited = bytes_per_s > 0.0 && bytes_per_s < kRateMax;
  const std::uint32_t rate = limited ? static_cast<std::uint32_t>(bytes_per_s) : kNoRateLimit;
  (void)setsockopt(fd_.get(), SOL_SOCKET, SO_MAX_PACING_RATE, &rate, sizeof rate);
}

bool Channel::same_user() const {
  ucred far{};
  socklen_t size = sizeof far;
  return getsockopt(fd_.get(), SOL_SOCKET, SO_PEERCRED, &far, &size) == 0 && far.uid == geteuid();
}

bool Channel::same_host() const {
  Address far;
  far.length = sizeof far.storage;
  if (is_unix_) return true;
  if (getpeername(fd_.get(), far.get(), &far.length) != 0) return false;
  return far.origin() == bound_address(fd_.get()).origin();
}

void Channel::limit_in_flight(std::size_t bytes) {
  set_int(fd_.get(), SOL_SOCKET, SO_SNDBUF, static_cast<int>(bytes));
}

Fd listen_on(const Address& address) {
  Fd fd(::socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return fd;
  if (!address.is_unix()) set_int(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (address.family() == AF_INET6) set_int(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, 0);
  // With SO_REUSEADDR two processes can bind one port and only listen() tells them apart: the
  // loser must start again with a fresh socket, so both steps fail the same way here.
  if (::bind(fd.get(), address.get(), address.length) != 0 || ::listen(fd.get(), kBacklog) != 0) {
    const int error = errno;
    fd.reset();
    errno = error;
  }
  return fd;
}

void set_options(int fd, bool is_unix, const SocketOptions& options) {
  if (is_unix) {
    set_int(fd, SOL_SOCKET, SO_SNDBUF, static_cast<int>(options.unix_buffer_bytes));
    return;
  }
  set_int(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_int(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(options.user_timeout_s * 1000.0));
  set_int(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, static_cast<int>(options.tcp_notsent_bytes));
}

Fd start_connect(const Address& address, const SocketOptions& options) {
  Fd fd(::socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return fd;
  set_options(fd.get(), address.is_unix(), options);
  // A Unix connect that would block (full backlog) says EAGAIN and is not under way.
  if (::connect(fd.get(), address.get(), address.length) != 0 && errno != EINPROGRESS) {
    const int error = errno;
    fd.reset();
    errno = error;
  }
  return fd;
}

Address bound_address(int fd) {
  Address out;
  out.length = sizeof out.storage;
  if (getsockname(fd, out.get(), &out.length) != 0) out.length = 0;
  return out;
}

}  // namespace decotrain::net
