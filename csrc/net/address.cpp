#include "net/address.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <charconv>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "wire.h"

namespace decotrain::net {
namespace {

constexpr std::string_view kTcp = "tcp://";
constexpr std::string_view kUnix = "unix://";
constexpr std::size_t kUnixNameMax = 80;  // below sun_path with its leading zero byte

struct HostPort {
  std::string host;
  std::uint16_t port = 0;
};

std::optional<HostPort> split_tcp(std::string_view text) {
  if (!text.starts_with(kTcp)) return std::nullopt;
  text.remove_prefix(kTcp.size());
  const auto colon = text.rfind(':');
  if (colon == std::string_view::npos) return std::nullopt;
  std::string_view host = text.substr(0, colon);
  const std::string_view port = text.substr(colon + 1);
  HostPort out;
  const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), out.port);
  if (error != std::errc{} || end != port.data() + port.size()) return std::nullopt;
  if (host.starts_with('[')) {
    if (!host.ends_with(']')) return std::nullopt;
    host = host.substr(1, host.size() - 2);
  }
  if (host.empty() || host.size() > 255) return std::nullopt;
  out.host = host;
  return out;
}

std::optional<Address> numeric_tcp(const HostPort& from) {
  Address out;
  auto* v4 = reinterpret_cast<sockaddr_in*>(&out.storage);
  if (inet_pton(AF_INET, from.host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(from.port);
    out.length = sizeof(sockaddr_in);
    return out;
  }
  out.storage = {};
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&out.storage);
  if (inet_pton(AF_INET6, from.host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(from.port);
    out.length = sizeof(sockaddr_in6);
    return out;
  }
  return std::nullopt;
}

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

std::optional<Address> numeric_unix(std::string_view text) {
  text.remove_prefix(kUnix.size());
  const auto slash = text.find('/');
  if (slash == std::string_view::npos || text.substr(0, slash) != hex(host_id())) {
    return std::nullopt;
  }
  const std::string_view name = text.substr(slash + 1);
  if (name.empty() || name.size() > kUnixNameMax) return std::nullopt;
  Address out;
  auto* local = reinterpret_cast<sockaddr_un*>(&out.storage);
  local->sun_family = AF_UNIX;
  std::memcpy(local->sun_path + 1, name.data(), name.size());  // leading zero: abstract
  out.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return out;
}

}  // namespace

std::uint64_t host_id() {
  static const std::uint64_t id = [] {
    std::string words;
    std::ifstream file("/proc/sys/kernel/random/boot_id");
    std::getline(file, words);
    struct stat space{};
    if (stat("/proc/self/ns/net", &space) == 0) words += ':' + std::to_string(space.st_ino);
    const auto bytes = std::as_bytes(std::span(words));
    const std::uint64_t value = digest(bytes);
    return value == 0 ? 1 : value;
  }();
  return id;
}

std::string Address::text() const {
  char host[INET6_ADDRSTRLEN] = "?";
  if (family() == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(&storage);
    inet_ntop(AF_INET, &v4->sin_addr, host, sizeof host);
    return "tcp://" + std::string(host) + ':' + std::to_string(ntohs(v4->sin_port));
  }
  if (family() == AF_INET6) {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&storage);
    inet_ntop(AF_INET6, &v6->sin6_addr, host, sizeof host);
    return "tcp://[" + std::string(host) + "]:" + std::to_string(ntohs(v6->sin6_port));
  }
  const auto* local = reinterpret_cast<const sockaddr_un*>(&storage);
  const std::size_t start = offsetof(sockaddr_un, sun_path) + 1;
  const std::size_t size = length > start ? length - start : 0;
  return "unix://" + hex(host_id()) + '/' + std::string(local->sun_path + 1, size);
}

std::uint64_t Address::origin() const {
  if (family() == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(&storage);
    return (std::uint64_t{4} << 32) | v4->sin_addr.s_addr;
  }
  if (family() == AF_INET6) {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&storage);
    std::uint64_t prefix = 0;  // one customer usually holds a whole /64
    std::memcpy(&prefix, v6->sin6_addr.s6_addr, sizeof prefix);
    if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr) || IN6_IS_ADDR_LOOPBACK(&v6->sin6_addr)) {
      std::memcpy(&prefix, v6->sin6_addr.s6_addr + 8, sizeof prefix);
    }
    return prefix;
  }
  return 1;
}

std::optional<Address> parse_numeric(std::string_view text) {
  if (text.starts_with(kUnix)) return numeric_unix(text);
  const auto parts = split_tcp(text);
  if (!parts) return std::nullopt;
  return numeric_tcp(*parts);
}

std::vector<std::string> resolve(const std::string& text) {
  const auto parts = split_tcp(text);
  if (!parts || numeric_tcp(*parts)) return {text};
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const std::string port = std::to_string(parts->port);
  if (getaddrinfo(parts->host.c_str(), port.c_str(), &hints, &found) != 0) return {text};
  std::vector<std::string> out;
  for (const addrinfo* it = found; it != nullptr; it = it->ai_next) {
    if (it->ai_addrlen > sizeof(sockaddr_storage)) continue;
    Address address;
    std::memcpy(&address.storage, it->ai_addr, it->ai_addrlen);
    address.length = it->ai_addrlen;
    if (address.family() == AF_INET || address.family() == AF_INET6) out.push_back(address.text());
  }
  freeaddrinfo(found);
  return out.empty() ? std::vector<std::string>{text} : out;
}

std::string fresh_unix_address() {
  std::uint64_t words[2] = {};
  if (getrandom(words, sizeof words, 0) != static_cast<ssize_t>(sizeof words)) {
    words[0] = static_cast<std::uint64_t>(getpid());
  }
  return "unix://" + hex(host_id()) + "/decotrain-" + hex(words[0]) + hex(words[1]);
}

}  // namespace decotrain::net
