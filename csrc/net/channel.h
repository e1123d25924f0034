// Channel: the bytes of one connection. Non-blocking reads and writes, plain or through TLS, and
// the socket options that go with them. It knows nothing of frames.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "net/address.h"
#include "net/pacer.h"
#include "net/tls.h"

namespace decotrain::net {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) reset(std::exchange(other.fd_, -1));
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset(int fd = -1);

 private:
  int fd_ = -1;
};

// What one read or write did. `blocked` and `failed` never come with bytes.
struct Moved {
  std::size_t bytes = 0;
  bool blocked = false;
  bool failed = false;
  bool cut_short = false;  // a read ended at a descriptor: more may be there
  int error = 0;           // errno of a failure; 0: the other side closed
};

class Channel {
 public:
  Channel() = default;
  Channel(Fd fd, bool is_unix) : fd_(std::move(fd)), is_unix_(is_unix) {}

  int fd() const { return fd_.get(); }
  bool is_unix() const { return is_unix_; }
  explicit operator bool() const { return static_cast<bool>(fd_); }
  void close() {
    tls_.reset();
    descriptors_.clear();
    fd_.reset();
  }
  // From now on all bytes go through TLS, made for this descriptor.
  void secure(std::unique_ptr<Tls> tls) { tls_ = std::move(tls); }
  bool secured() const { return tls_ != nullptr; }
  // False when a key was agreed with another peer or for another stream.
  bool vouches_for(std::uint64_t peer, std::uint64_t stream) const {
    return tls_ == nullptr || tls_->vouches_for(peer, stream);
  }
  bool same_user() const;  // at the other end of a Unix socket

  Moved read(iovec* parts, int count);
  // With a descriptor it goes along with the first byte (Unix sockets).
  Moved write(iovec* parts, int count, int descriptor = -1);
  // From now on descriptors that come with bytes are kept, the last few of them.
  void take_descriptors() { takes_descriptors_ = true; }
  Fd next_descriptor();
  // What a write took and has not given to the kernel yet. Blocked: there is no room.
  Moved flush() { return tls_ == nullptr ? Moved{} : tls_->flush(); }
  // Bytes written that the other side has not taken yet (TCP: not acknowledged).
  std::size_t unacknowledged_bytes() const;
  int pending_error() const;  // result of a non-blocking connect
  double rtt_s() const;       // as the kernel measures it, from the handshake on; 0: unknown
  // Slows down at every lost packet (Reno, CUBIC), as opposed to BBR.
  bool fears_loss() const;
  std::string congestion() const;  // name of its control; empty: none (a Unix socket)
  bool same_host() const;
  std::optional<PathProgress> progress() const;  // nothing: the kernel does not say
  // Asks for a congestion control, and has it or the kernel's default after.
  void choose_congestion(const std::string& name);
  void restart_control();                   // it forgets what it knows of the path
  void limit_rate(double bytes_per_s);      // of what is sent; 0: no limit
  void limit_in_flight(std::size_t bytes);  // what the kernel may hold, sent or not
  void limit_unsent(std::size_t bytes);     // what the kernel may hold and has not sent yet

 private:
  Fd fd_;
  Moved receive(iovec* parts, int count);
  bool is_unix_ = false;
  bool takes_descriptors_ = false;
  std::deque<Fd> descriptors_;
  std::unique_ptr<Tls> tls_;
};

struct SocketOptions {
  std::size_t tcp_notsent_bytes = std::size_t{512} << 10;  // what waits unsent in the kernel,
  std::size_t long_notsent_bytes = 64 << 10;               // on a long path
  std::size_t local_buffer_bytes = 256 << 10;  // within a host: small enough to stay in cache
  std::size_t unix_buffer_bytes = 512 << 10;
  double user_timeout_s = 30.0;
  std::string congestion = "bbr";  // on a long path, where allowed; empty: as the kernel has it
  bool pace = true;                // a long path: see Pacer
};

// A control that does not slow down at lost packets, and that this process may choose.
bool fearless(const std::string& congestion);

// Every function gives an empty Fd and sets errno on failure.
Fd listen_on(const Address& address);
Fd start_connect(const Address& address, const SocketOptions& options);
void set_options(int fd, bool is_unix, const SocketOptions& options);
Address bound_address(int fd);

}  // namespace decotrain::net
