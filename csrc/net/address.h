// Addresses of peers: what a peer advertises, and what may be dialled from here.
//
//   tcp://203.0.113.7:29401, tcp://[2001:db8::1]:29401, tcp://name:29401
//   unix://<host id>/<name>    an abstract Unix socket, reachable only on the host with that id
//
// Host names are resolved by `resolve`, which may block: never on the network thread.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace decotrain::net {

// A numeric socket address, ready for bind or connect.
struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;

  int family() const { return storage.ss_family; }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  bool is_unix() const { return storage.ss_family == AF_UNIX; }
  std::string text() const;      // "tcp://..." or "unix://<this host>/..."
  std::uint64_t origin() const;  // equal for connections from one host; for limits only
};

// The same for every process that can reach the other's abstract Unix sockets: boot id and network
// namespace. Never 0.
std::uint64_t host_id();

// Numeric addresses only; nothing when the text is no address of ours, names a host or belongs to
// another host's Unix sockets.
std::optional<Address> parse_numeric(std::string_view text);

// The text with a host name replaced by its numeric addresses; the text itself when it is numeric
// or cannot be resolved now. Blocks.
std::vector<std::string> resolve(const std::string& text);

// A fresh abstract Unix address of this host.
std::string fresh_unix_address();

}  // namespace decotrain::net
