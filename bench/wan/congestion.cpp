// Preloaded into a site's programs: every TCP socket gets the congestion control DT_LAB_CONGESTION.
//
// Only for machines that refuse to make it the default of a namespace (one that is not listed in
// net.ipv4.tcp_allowed_congestion_control): setting it on a socket needs rights inside the
// namespace only. Accepted sockets inherit it from the listening one.
#include <dlfcn.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cstdlib>
#include <cstring>

extern "C" int socket(int domain, int type, int protocol) {
  using Socket = int (*)(int, int, int);
  static const Socket original = reinterpret_cast<Socket>(dlsym(RTLD_NEXT, "socket"));
  const int fd = original(domain, type, protocol);
  const char* const name = std::getenv("DT_LAB_CONGESTION");
  const bool tcp = (domain == AF_INET || domain == AF_INET6) && (type & 0xf) == SOCK_STREAM;
  if (fd >= 0 && tcp && name != nullptr) {
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, static_cast<socklen_t>(std::strlen(name)));
  }
  return fd;
}
